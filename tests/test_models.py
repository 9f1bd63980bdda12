"""Decoders put together from layers: against NumPy and against their blocks by hand; their plan, cost and budgets."""

import functools
import gc
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import models
import models.decoder
import sharding
from configs import base, fields
from configs.errors import ConfigError
from kernels.lightning.decay import decay_rates
from kernels.tokens import sequence
from layers.attention import contract
from layers.hooks import Hooks
from models import budget
from tests import models_oracle as oracle
from tests.models_oracle import (
    MIXED,
    NORM,
    RESIDUAL,
    ROWS,
    SWIGLU,
    VOCABULARY,
    built,
    call,
    scans,
    small,
    some_ids,
)
from training import setup


@pytest.fixture(autouse=True, scope="module")
def quick_compilation():
    """Tiny programs: compiling them well costs far more than running them."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


DECODERS = {
    "untied": small(),
    "tied, scaled and capped": small(tie_embeddings=True, embedding_scale=3.0, logit_cap=2.0, init_std=0.5),
    "normed before and after": small(residual=RESIDUAL | dict(form="sandwich")),
    "residual normed and scaled": small(
        residual=dict(form="carried", keep_attention=1.3, gain_attention=0.7, keep_mlp=0.8, gain_mlp=1.6)
    ),
    "windows and sinks, capped": small("sliding", logit_cap=4.0, init_std=0.5),
}


@functools.cache
def plain(name):
    return built(DECODERS[name])


@pytest.mark.parametrize("name", DECODERS)
def test_logits_are_those_of_the_formula(name):
    """Pre-norm residual blocks, norm, head, cap; rows of the table without a token never get probability."""
    config, ids = DECODERS[name], some_ids(2, 11)
    model = plain(name)
    logits = np.asarray(call(model, ids).logits)
    wanted = oracle.decoder(model, config, ids)
    assert logits.shape == (2, 11, ROWS) and (model.head is None) == config["tie_embeddings"]
    np.testing.assert_allclose(logits[..., :VOCABULARY], wanted, atol=2e-5 * np.abs(wanted).max())
    assert (logits[..., VOCABULARY:] == np.finfo(np.float32).min).all()
    assert np.asarray(jax.nn.softmax(logits))[..., VOCABULARY:].max() == 0


def test_vocabulary_and_rows():
    """The tokenizer's size unless the config has its own, rounded up to whole multiples for the tables only."""
    for changes, tokenizer, vocabulary, rows in (
        ({}, 50, 50, 64), ({}, 48, 48, 48), ({"vocab_size": 60}, 50, 60, 64), ({"vocab_multiple": 1}, 51, 51, 51),
    ):  # fmt: skip
        model = nnx.merge(*models.abstract(small(**changes), tokenizer))
        tables = model.embedding.table.shape[0], model.head.weight.shape[1]
        assert model.vocab_size == vocabulary and tables == (rows, rows)


def test_backbone_takes_embeddings():
    """The way in for inputs that are no ids: rows of the table give the model's logits, a new one only later ones."""
    model, ids = built(small(depth=1, embedding_scale=2.0)), some_ids(1, 9)
    definition, state = nnx.split(model)

    @jax.jit
    def logits(state, x):
        model = nnx.merge(definition, state)
        hidden, caches, aux = model.backbone(x, sequence(9))
        assert caches is None and aux == {} and hidden.shape == x.shape
        return model.unembed(hidden)

    rows = 2.0 * model.embedding.table[...][ids]
    usual = call(model, ids).logits
    np.testing.assert_allclose(logits(state, rows), usual, rtol=1e-6, atol=1e-6)
    moved = np.asarray(logits(state, rows.at[:, 5].add(1.0)) != usual).any(-1)[0]
    assert moved.tolist() == [False] * 5 + [True] * 4


def on(devices):
    config = base.sharding()
    config.preset = "fsdp"
    return sharding.build(config, jax.devices()[:devices]).activate()


def test_which_stacks_are_scanned(monkeypatch):
    assert scans(scan_layers="always", depth=3) == [3]
    assert scans(scan_layers="always", depth=1) == []
    assert scans(scan_layers="never", depth=17) == []
    assert scans(scan_layers="auto", depth=16) == []
    assert scans(scan_layers="auto", depth=17) == [17]
    with on(2):
        assert scans(scan_layers="auto", depth=2) == [2]
        assert scans(scan_layers="auto", depth=1) == []
        assert scans(scan_layers="never", depth=2) == []
    with on(1):
        assert scans(scan_layers="auto", depth=2) == []
    monkeypatch.setattr(models.decoder, "default_platform", lambda: "gpu")
    assert scans(scan_layers="auto", depth=2) == [2]


def test_patterns_are_scanned_by_rounds_and_decoding_is_not():
    apart, alternating = dict(mlp=dict(kind="gelu", width=(32, 32, 8), bias=False)), (("::2", {"mlp.width": 8}),)
    assert scans(scan_layers="always", depth=6, per_layer=alternating) == [3]
    assert scans(scan_layers="always", depth=5, **apart) == [2, 3]
    assert scans(scan_layers="always", depth=2, caches=True) == []
    assert scans(scan_layers="always", depth=2, hooks=Hooks(edits={"heads": lambda value, place: value})) == []


def test_rematerialisation_changes_no_output():
    """Nor a gradient, inside a scan."""
    ids = some_ids(2, 9)
    model = built(small(scan_layers="always", attention_implementation="reference"))
    definition, parameters, rest = nnx.split(model, nnx.Param, ...)

    def run(remat, parameters):
        def loss(parameters):
            model = nnx.merge(definition, parameters, rest)
            model.remat = remat
            logits = model(ids).logits[..., :VOCABULARY]
            return jnp.mean(jax.nn.log_softmax(logits)[..., 3]), logits

        return jax.grad(loss, has_aux=True)(parameters)

    @jax.jit  # One program, with parameters of its own for each, so that the compiler does not make them the same.
    def all_three(*parameters):
        return [run(remat, own) for remat, own in zip(("none", "full", "dots"), parameters, strict=True)]

    kept, *others = all_three(parameters, parameters, parameters)
    for again in others:
        for one, other in zip(*map(jax.tree.leaves, (again, kept)), strict=True):
            np.testing.assert_allclose(one, other, rtol=0, atol=1e-5 * np.abs(other).max())


@functools.cache
def mixed(name):
    return built(MIXED[name][0])


@pytest.mark.parametrize("name", MIXED)
def test_mixed_layers_are_their_blocks_in_order(name):
    _, scan, specs, places = MIXED[name]
    model, ids = mixed(name), some_ids(2, 11)
    assert model.depth == len(specs)
    wanted = np.asarray(oracle.by_blocks(model, specs, places, ids))[..., :VOCABULARY]
    model.scan_layers = scan
    logits = call(model, ids).logits[..., :VOCABULARY]
    np.testing.assert_allclose(logits, wanted, atol=1e-5 * np.abs(wanted).max())


def test_layers_know_their_number():
    """The decay of lightning attention depends on the depth at which a layer stands, also in a stack of a pattern."""
    kinds = mixed("three kinds of attention").layers()
    for layer in (1, 3):
        wanted = decay_rates(4, layer, 5, rule="alibi", layer_factor=True)
        np.testing.assert_allclose(kinds[layer].attention.decay[...], wanted, rtol=1e-6)
    assert not np.allclose(kinds[1].attention.decay[...], kinds[3].attention.decay[...])


def test_draws_depend_on_the_layer_and_not_on_the_grouping():
    configs = [small(mlp=SWIGLU | dict(width=width)) for width in (8, (8, 9))]
    states = jax.jit(lambda: [nnx.state(oracle.initialised(config)) for config in configs])()
    stacked, apart = (
        nnx.merge(models.abstract(config, VOCABULARY)[0], state).layers()
        for config, state in zip(configs, states, strict=True)
    )
    for one, other in zip(stacked, apart, strict=True):
        assert np.array_equal(one.attention.query.weight[...], other.attention.query.weight[...])
    first, second = (block.mlp.up.weight[...] for block in stacked)
    assert not np.isclose(first, second).any()


def test_unstacked_is_the_same_model_bit_by_bit():
    """In a prefill and in a step of decoding, logits and caches; the model itself stays as it was."""
    model, ids = plain("untied"), some_ids(2, 9)
    apart = model.unstacked()
    assert [(stack.repeats, stack.first) for stack in apart.stacks] == [(1, 0), (1, 1)]
    assert [(stack.repeats, stack.first) for stack in model.stacks] == [(2, 0)] and apart.depth == 2

    def run(model):
        definition, state = nnx.split(model)

        def steps(state):
            model = nnx.merge(definition, state)
            first = model(ids[:, :8], None, model.init_caches(2, 12))
            return first, model(ids[:, 8:], None, first.caches)

        return jax.tree.leaves(jax.jit(steps)(state))

    for one, other in zip(run(model), run(apart), strict=True):
        np.testing.assert_array_equal(one, other)


def test_auxiliary_losses_are_summed_over_layers(monkeypatch):
    """In a scan and, with caches, in a loop; everything else keeps its layer's number."""
    monkeypatch.setattr(contract, "_VARIANTS", dict(contract._VARIANTS))
    contract.register("watched")(oracle.Watched)
    weights, ids = (2.0, 1.0, 2.0, 1.0, 5.0), some_ids(2, 6)  # A pattern of two layers, twice, and one more.
    model = built(small(depth=5, attention=dict(layer="watched", weight=weights)))

    x, wanted = model.embedding(ids), {"loss/size": 0.0, "loss/deep/sum": 0.0}
    for layer, block in enumerate(model.layers()):
        y = np.asarray(block.attention_norm(x))
        wanted["loss/size"] += weights[layer] * np.mean(y * y)
        wanted["loss/deep/sum"] += np.sum(y)
        wanted[f"first/{layer}"] = y[0, 0, 0]
        x, _, _ = block(x, sequence(6), None, None, layer)
    model.scan_layers = "always"
    for cached in (False, True):
        out = call(model, ids, caches=model.init_caches(2, 6) if cached else None)
        assert set(out.aux) == set(wanted)
        for key, value in wanted.items():
            np.testing.assert_allclose(out.aux[key], value, rtol=1e-5, atol=1e-5, err_msg=key)


def test_number_formats():
    """Compute in bfloat16: float32 logits near the exact ones, parameters as stored, caches in bfloat16."""
    ids, config = some_ids(2, 9), small(depth=1, vocab_size=ROWS)
    model, narrow = built(config), config | dict(compute_dtype="bfloat16")
    exact = np.asarray(call(model, ids).logits)
    model = nnx.merge(models.abstract(narrow, VOCABULARY)[0], nnx.state(model))
    out = call(model, ids, caches=model.init_caches(2, 9))
    assert out.logits.dtype == jnp.float32
    assert {leaf.dtype.name for cache in out.caches.layers for leaf in cache.entries.values()} == {"bfloat16"}
    error = np.asarray(out.logits) - exact
    assert 1e-4 < np.sqrt(np.mean(error**2) / np.mean(exact**2)) < 5e-2
    for stored in ("float32", "bfloat16"):
        state = models.abstract(narrow | dict(param_dtype=stored), VOCABULARY)[1]
        assert {leaf.dtype.name for leaf in jax.tree.leaves(state)} == {stored}


@pytest.mark.parametrize(("field", "values"), [("kind", ("layer", "rms")), ("epsilon", (1e-3, 1e-6))])
def test_norms_may_differ_by_layer(field, values):
    """One value per layer, the last one repeating; the norm after the last layer has one of them."""
    model = built(small(depth=3, norm=NORM | {field: values}))
    found = [getattr(block.mlp_norm, field) for block in model.layers()]
    assert found == [values[0], values[1], values[1]] and getattr(model.norm, field) in values
    assert np.isfinite(call(model, some_ids(1, 5)).logits).all()


def test_abstract_allocates_nothing():
    """A model that no machine could hold, in a moment; of a small one, exactly what `build` gives."""
    gc.collect()
    live = len(jax.live_arrays())
    _, state = models.abstract(small(width=2**16, depth=96, mlp=SWIGLU | dict(width=2**18)), 2**17)
    leaves = jax.tree.leaves(state)
    assert all(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in leaves) and len(jax.live_arrays()) == live
    assert sum(leaf.size for leaf in leaves) > 1e12

    config = small("lightning", depth=1, param_dtype="bfloat16")
    definitions = []

    @jax.jit
    def build():
        definition, state = nnx.split(models.build(config, vocab_size=VOCABULARY, rngs=nnx.Rngs(1)))
        definitions.append(definition)
        return state

    definition, shapes = models.abstract(config, VOCABULARY)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), shapes) == jax.tree.map(lambda x: (x.shape, x.dtype), build())
    assert definitions == [definition]


def account(config, length=8, **arguments):
    return models.account(config, VOCABULARY, length=length, **arguments)


COUNTED = {
    "gqa": small(depth=3),
    "sliding": small("sliding"),
    "lightning": small("lightning", depth=3),
    "mixed": MIXED["three kinds of attention"][0],
    "tied": small("mla", tie_embeddings=True, param_dtype="bfloat16"),
    "biases and layer norms": small(mlp=dict(kind="gelu", width=20, bias=True), norm=NORM | dict(kind="layer")),
}


@pytest.mark.parametrize("name", COUNTED)
def test_parameters_are_those_of_the_arrays(name):
    config = COUNTED[name]
    model = nnx.merge(*models.abstract(config, VOCABULARY))
    found = account(config)
    assert found.parameters == sum(leaf.size for leaf in jax.tree.leaves(nnx.state(model, nnx.Param)))
    assert found.embedding_parameters == ROWS * 24 * (1 if config["tie_embeddings"] else 2)
    if name in ("gqa", "sliding"):
        assert found.parameters == oracle.parameters_by_hand(config)


@pytest.mark.parametrize("length", [1, 23])
@pytest.mark.parametrize("variant", ["gqa", "sliding"])
def test_flops_are_those_counted_by_hand(variant, length):
    """Causal and window aware; the backward pass is twice the forward, whatever it computes again."""
    config = small(variant, depth=3, remat="full")
    found = account(config, length)
    assert found.forward_flops_per_token == pytest.approx(oracle.flops_by_hand(config, length), rel=1e-12)
    assert found.training_flops_per_token == pytest.approx(3 * oracle.flops_by_hand(config, length), rel=1e-12)


def test_flops_are_those_of_the_program():
    """Without causality (the dense reference computes every pair), all products of a training step, exactly."""
    config = small(attention_implementation="reference", vocab_size=ROWS)
    definition, state = models.abstract(config, VOCABULARY)

    def loss(state, ids):
        return nnx.merge(definition, state)(ids).logits.sum()

    for function, factor in ((loss, 1), (jax.value_and_grad(loss), 3)):
        traced = jax.make_jaxpr(function)(state, jax.ShapeDtypeStruct((2, 7), jnp.int32))
        assert oracle.products(traced.jaxpr) == 2 * 7 * factor * oracle.flops_by_hand(config, 7, dense=True)


def test_biases_are_no_matrix_products():
    unbiased, biased = (account(small(mlp=dict(kind="gelu", width=20, bias=bias))) for bias in (False, True))
    assert biased.parameters == unbiased.parameters + 2 * (20 + 24)
    assert biased.forward_flops_per_token == unbiased.forward_flops_per_token


@pytest.mark.parametrize("variant", ["gqa", "mla", "sliding", "lightning", "mixed"])
def test_cache_bytes_are_those_of_caches(variant):
    for length, dtype in ((4, "float32"), (32, "bfloat16")):
        config = (COUNTED["mixed"] if variant == "mixed" else small(variant)) | dict(compute_dtype=dtype)
        assert account(config, length).cache_bytes_per_token * length == oracle.remembered(config, length)


def test_tensor_parallelism_splits_what_heads_share():
    for variant, share in (("gqa", 0.5), ("mla", 1.0)):
        one, two = (account(small(variant), parts={"heads": parts}).cache_bytes_per_token for parts in (1, 2))
        assert two == share * one


@pytest.mark.parametrize(("optimizer", "stored"), [
    ("adamw", "float32"), ("lion", "float32"), ("sgd", "float32"), ("muon", "float32"), ("adamw", "bfloat16")
])  # fmt: skip
def test_state_bytes_hold_the_arrays_of_training(optimizer, stored):
    """Parameters, as many gradients, and what the optimiser keeps: exactly, but for muon and narrow averages."""
    config = base.get_config()
    config.model = small(param_dtype=stored)
    config.optimizer.name = optimizer
    tokenizer = types.SimpleNamespace(vocab_size=VOCABULARY)
    state = setup.build(config, setup.network(config, tokenizer), sharding.build(config.sharding), tokenizer).abstract
    arrays = [*state.params.values(), *state.params.values(), *jax.tree.leaves(state.opt_state)]
    held = sum(leaf.size * leaf.dtype.itemsize for leaf in arrays if leaf.ndim)
    found = account(config.model, optimizer=optimizer).state_bytes
    assert held == found if stored == "float32" and optimizer != "muon" else held <= found


def activations(batch=2, length=8, **changes):
    return account(small(scan_layers="always", **changes), length, batch=batch).activation_bytes


def test_activations_are_what_the_backward_pass_is_left():
    """At least the residual stream before every block; more of it the less is computed again, and for every row."""
    stream = 4 * 2 * 8 * 24
    full, dots, everything = (activations(depth=6, remat=remat) for remat in ("full", "dots", "none"))
    assert 6 * stream <= full < dots < everything
    assert full < 0.5 * everything and dots > full + 6 * 2 * stream  # Two outputs into the stream, among others.
    one, two, four = (activations(batch, vocab_size=ROWS) for batch in (1, 2, 4))
    assert 0 < one < two < four and four - two == pytest.approx(2 * (two - one), rel=0.02)


@pytest.mark.parametrize("compute", ["float32", "bfloat16"])
@pytest.mark.parametrize("tied", [True, False])
def test_activations_do_not_shrink_with_the_vocabulary(tied, compute):
    """What is kept of a table is no activation, and nothing else may be taken off for it."""
    few, many = (activations(vocab_size=rows, tie_embeddings=tied, compute_dtype=compute) for rows in (64, 1024))
    assert many >= few > 2 * 4 * 8 * 24


def run(variant):
    config = base.get_config()
    config.model = small(variant, depth=1, max_length=16)
    return fields.apply(config, {"data.length": 16})


# Budget: the variant beside gqa, the field of each, how much of it is one step, and the same budget counted by hand.
BUDGETS = {
    "parameters": ("mqa", "model.mlp.width", "model.mlp.width", 10, lambda c: oracle.parameters_by_hand(c.model)),
    "training_flops": ("mqa", "model.mlp.width", "model.mlp.width", 2, lambda c: 3 * oracle.flops_by_hand(c.model, 16)),
    "cache_bytes": ("mla", "model.attention.head_dim", "model.attention.kv_lora_rank", 2,
                    lambda c: oracle.remembered(c.model, 16) / 16),
}  # fmt: skip


@pytest.mark.parametrize("name", BUDGETS)
def test_budgets_are_met_within_half_a_step(name):
    """Of two variants, at a target that neither meets by itself; neighbouring values are no nearer."""
    other, *by, multiple, spent = BUDGETS[name]
    by = dict(zip(("gqa", other), by, strict=True))
    variants = {variant: run(variant) for variant in by}
    target = 1.37 * spent(variants["gqa"])
    overrides = budget.equal(
        variants, VOCABULARY, budget=name, target=target, field=by, multiple=multiple, tolerance=0.08
    )
    for variant, config in variants.items():
        ((field, value),) = overrides[variant].items()
        assert field == by[variant] and value % multiple == 0
        here, below, above = (
            spent(fields.apply(config, {field: value + change})) for change in (0, -multiple, multiple)
        )
        assert abs(here - target) <= max(here - below, above - here) / 2
        assert budget.spent(fields.apply(config, {field: value}), VOCABULARY, name) == pytest.approx(here)


def test_budgets_that_cannot_be_met():
    """What the smallest value costs, what the nearest one comes to, and a field that changes nothing, are said."""
    config = run("gqa")
    smallest = oracle.parameters_by_hand(fields.apply(config, {"model.mlp.width": 1}).model)
    with pytest.raises(ConfigError, match=f"parameters: {smallest:,} at config.model.mlp.width = 1 already exceed"):
        budget.match(config, VOCABULARY, smallest / 1.6)
    assert budget.match(config, VOCABULARY, smallest / 1.4) == {"model.mlp.width": 1}
    with pytest.raises(ConfigError, match="config.model.attention.window does not change parameters"):
        budget.match(config, VOCABULARY, 1e9, field="model.attention.window")
    nearest = oracle.parameters_by_hand(fields.apply(config, {"model.mlp.width": 50}).model)
    with pytest.raises(ConfigError, match=f"variant a: parameters come to {nearest:,} at .*50.*, not within 1% of"):
        budget.equal({"a": config}, VOCABULARY, target=1.05 * nearest, multiple=50)
