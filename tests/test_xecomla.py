"""GQA made into MLA by singular values: products and ranks of an independent computation, hybrids, exact cases."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import xecomla_oracle as oracle
from flax import nnx

import models
from configs import attention, base, fields, validate
from layers.cache import SlotCache
from models.conversion import ConversionError, report, svd, upcycle, xecomla
from models.conversion.report import log_probabilities

VOCABULARY, WIDTH, LENGTH = 40, 24, 12
GQA = dict(heads=4, kv_heads=2, head_dim=8)
FIXED = dict(kv_rank=16, q_rank=16)


@pytest.fixture(autouse=True, scope="module")
def quick_compilation():
    """Tiny programs: compiling them well costs far more than running them."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


def config(depth: int = 2, rope: dict | None = None, dtype: str = "float32", **options):
    made = base.get_config().model
    made.width, made.depth, made.max_length, made.mlp.width, made.init_std = WIDTH, depth, LENGTH, 16, 0.25
    made.attention = attention.get("gqa")
    made.attention.update(GQA | options)
    made.attention.rope.update(rope or {})
    made.param_dtype = made.compute_dtype = dtype
    return made


def network(wanted):
    """A network of random arrays, biases among them, without the seconds that compiling generators takes."""
    model = nnx.eval_shape(lambda: models.build(wanted, vocab_size=VOCABULARY, rngs=nnx.Rngs(0)))
    definition, state = nnx.split(model)
    draw = np.random.default_rng(2)
    filled = lambda leaf: jnp.asarray(0.25 * draw.standard_normal(leaf.shape), leaf.dtype)  # noqa: E731
    return nnx.merge(definition, jax.tree.map(filled, state))


def text(rows: int = 3) -> np.ndarray:
    return np.random.default_rng(0).integers(0, VOCABULARY, (rows, LENGTH)).astype(np.int32)


def matrices(model, layer: int = 0) -> dict[str, np.ndarray]:
    own = model.layers()[layer].attention
    found = {name: getattr(own, name, None) for name in ("query", "key", "value", "out")}
    return {
        name: np.asarray(linear.weight[...], np.float64) for name, linear in found.items() if hasattr(linear, "weight")
    }


def products(model, layer: int = 0) -> oracle.Student:
    """What a layer of MLA computes with, its matrices multiplied out."""
    own = model.layers()[layer].attention
    get = lambda linear: np.asarray(linear.weight[...], np.float64)  # noqa: E731
    cut = lambda matrix: np.split(matrix, own.heads, axis=1)  # noqa: E731
    queries = cut(get(own.query_down) @ get(own.query) if own.q_rank else get(own.query))
    return oracle.Student(
        [head[:, : own.nope] for head in queries], [head[:, own.nope :] for head in queries],
        cut(get(own.latent) @ get(own.key_up)), get(own.rope_key), cut(get(own.latent) @ get(own.value_up)),
    )  # fmt: skip


def outputs(layer, x: np.ndarray) -> np.ndarray:
    """The attention of one row, compiled as a whole, which is quicker than operation by operation."""
    definition, state = nnx.split(layer)
    run = jax.jit(lambda state, x: nnx.merge(definition, state)(x, models.decoder.sequence(LENGTH)).out[0])
    return np.asarray(run(state, jnp.asarray(x[None], jnp.float32)))


def apart(found, expected) -> float:
    found, expected = (np.concatenate([np.ravel(part) for part in each]) for each in (found, expected))
    return float(np.abs(found - expected).max() / np.abs(expected).max())


# Of a head of 8 channels, which are turned in pairs (i, i + 4): half of them each.
CHANNELS = {"released": ([0, 1, 2, 3], [4, 5, 6, 7]), "matched": ([3, 7, 1, 5], [0, 2, 4, 6])}


@pytest.mark.parametrize("rope", ["released", "matched"])
@pytest.mark.parametrize("sigma", ["down", "up"])
def test_products_are_those_of_an_independent_decomposition(sigma, rope):
    model = network(config(value_dim=6))
    made = upcycle(model, config(value_dim=6), sigma=sigma, rope=rope, **FIXED)
    nope, turned = CHANNELS[rope]
    for layer in range(2):
        own = matrices(model, layer)
        given = [own.pop(name) for name in ("query", "key", "value")]
        shape = dict(heads=4, kv_heads=2, q_rank=16, kv_rank=16, nope=nope, rope=turned)
        expected, found = oracle.student(*given, **shape), products(made.model, layer)
        for name in oracle.Student._fields:
            assert apart(getattr(found, name), getattr(expected, name)) < 1e-5, name
        np.testing.assert_array_equal(matrices(made.model, layer)["out"], own["out"])
        separate, per_head = (oracle.student(*given, **shape, wrong=wrong) for wrong in ("separate", "per head"))
        assert apart(found.key_nope, separate.key_nope) > 0.03 and apart(found.value, separate.value) > 0.03
        assert apart(found.key_rope, per_head.key_rope) > 0.1
    # Where the singular values are: of the repeated matrix in the down projection, or not there at all.
    keys = oracle.repeated(given[1], 8, 2)
    values = np.linalg.svd(np.hstack([keys, oracle.repeated(given[2], 6, 2)]), compute_uv=False)[:16]
    norms = np.linalg.norm(np.asarray(made.model.layers()[1].attention.latent.weight[...]), axis=0)
    np.testing.assert_allclose(norms, values if sigma == "down" else np.ones(16), rtol=1e-4)


@pytest.mark.parametrize("stretched", [False, True])
def test_a_converted_layer_is_what_the_formulas_say(stretched):
    """The whole layer, where positions of the base are stretched with YaRN of the same factor, as the code has it."""
    rope = dict(theta=500.0) | (dict(scaling="llama3", factor=4.0, original_length=64) if stretched else {})
    wanted = config(depth=1, rope=rope, kv_heads=4)
    model = network(wanted)
    made = upcycle(model, wanted, **FIXED)
    own = matrices(model)
    frequencies, amplitude = 500.0 ** -(np.arange(0, 4, 2) / 4), 1.0
    if stretched:
        frequencies, amplitude = oracle.yarn(4, 500.0, 4.0, 4096), 0.1 * np.log(4.0) + 1
    nope, turned = CHANNELS["released"]
    shape = dict(heads=4, kv_heads=4, q_rank=16, kv_rank=16, nope=nope, rope=turned)
    expected = oracle.student(own["query"], own["key"], own["value"], **shape)
    x = np.random.default_rng(3).standard_normal((LENGTH, WIDTH))
    layer = made.model.layers()[0].attention
    wanted_out = oracle.attention(expected, own["out"], x, frequencies, amplitude)
    assert apart(outputs(layer, x), wanted_out) < 1e-5
    assert layer.latent_norm is None and layer.query_norm is None
    if not stretched:
        kept = upcycle(model, wanted, latent_norm="rms", **FIXED).model.layers()[0].attention
        assert apart(outputs(kept, x), wanted_out) > 0.1


def test_where_nothing_is_lost_the_function_is_the_same():
    """One key head, full rank, and keys only in the pairs that stay rotated: exact, biases and scale included."""
    with jax.enable_x64(True):
        wanted = config(depth=1, dtype="float64", kv_heads=1, qkv_bias=True, out_bias=True, scale=0.4, window=5)
        model = network(wanted)
        nope, _ = CHANNELS["matched"]
        for stack in model.stacks:
            key = stack.blocks[0].attention.key
            key.weight[...] = key.weight[...].at[..., jnp.array(nope)].set(0)
            key.bias[...] = key.bias[...].at[..., jnp.array(nope)].set(0)
        made = upcycle(model, wanted, kv_rank=16, q_rank=24, rope="matched")
        full = log_probabilities(model, text())
        assert np.abs(log_probabilities(made.model, text(), split=7) - full).max() < 1e-9
        less = upcycle(model, wanted, kv_rank=8, q_rank=24, rope="matched")
        assert np.abs(log_probabilities(less.model, text(), split=7) - full).max() > 1e-3


def test_hybrid_stacks_have_two_kinds_of_cache():
    """Layers 1 and 3 of four: the others stay as they are, caches of both kinds decode, and their sizes are as said."""
    wanted = config(depth=4)
    model = network(wanted)
    made = upcycle(model, wanted, layers=(1, 3), report_ids=text(), **FIXED)
    kinds = [block.attention for block in made.model.layers()]
    assert [type(kind).__name__ for kind in kinds] == ["MultiHeadAttention", "MultiHeadLatentAttention"] * 2
    caches = made.model.init_caches(1, LENGTH).layers
    assert all(isinstance(cache, SlotCache) for cache in caches)
    shapes = [{name: entry.shape[2:] for name, entry in cache.entries.items()} for cache in caches]
    assert shapes == [{"k": (2, 8), "v": (2, 8)}, {"latent": (1, 20)}] * 2
    for layer in (0, 2):
        np.testing.assert_array_equal(matrices(model, layer)["key"], matrices(made.model, layer)["key"])
    ups = [np.asarray(block.mlp.up.weight[...]) for each in (model, made.model) for block in each.layers()]
    for before, after in zip(ups[:4], ups[4:], strict=True):
        np.testing.assert_array_equal(before, after)
    full = log_probabilities(made.model, text())
    assert np.abs(log_probabilities(made.model, text(), split=5) - full).max() < 2e-5
    assert [kind.cache_bytes(1, 4) for kind in kinds] == [4 * 2 * 2 * 8, 4 * 20] * 2
    changed = {"model.depth": 4, "data.length": LENGTH, "model.max_length": LENGTH}
    validate.check(fields.apply(base.get_config(), {"model.per_layer": made.config["per_layer"]} | changed))
    names = [stage.name for stage in made.report.stages]
    assert names == ["original", "ranks", "x-ecomla"] and made.report.stages[0].divergence == 0
    assert made.report.stages[1].logit_distance > 1e-3
    json.dumps(report.plain(made.report))


# Llama-3.2-1B: d_qk = d_r = 32, the paper's r_kv, and what it gives for the cache and for r_q.
TABLE = [(512, 864, 0.531), (256, 1184, 0.281), (128, 1344, 0.156), (64, 1424, 0.094), (48, 1440, 0.078)]


def llama():
    made = base.get_config().model
    made.width, made.depth, made.mlp.width = 2048, 16, 8192
    made.attention = attention.get("gqa")
    made.attention.update(heads=32, kv_heads=8, head_dim=64)
    return made


@pytest.mark.parametrize(("kv_rank", "q_rank", "share"), TABLE)
def test_caches_and_query_ranks_of_the_papers_table(kv_rank, q_rank, share):
    source = llama().attention.to_dict()
    options = xecomla.new_options(0, source) | {"kv_lora_rank": kv_rank, "q_lora_rank": q_rank}
    before, after = (cache_bytes(each) for each in (source, options))
    assert (before, after) == (2 * 1024, 2 * (kv_rank + 32)) and round(after / before, 3) == pytest.approx(
        share, abs=6e-4
    )
    empty = svd.Heads(source, *(np.empty((2048, width)) for width in (2048, 512, 512, 2048)), {})
    assert 16 <= xecomla.matching_rank(empty, options) - q_rank <= 20


def cache_bytes(options: dict) -> int:
    """Per token in bfloat16, of one layer, as the accounts of models have it."""
    wanted = llama()
    wanted.depth, wanted.compute_dtype = 1, "bfloat16"
    model = nnx.eval_shape(
        lambda: models.build(fields.plain(wanted) | {"attention": options}, vocab_size=64, rngs=nnx.Rngs(0))
    )
    return model.stacks[0].blocks[0].attention.cache_bytes(1, 2)


def test_half_of_the_layers_upcycled():
    """The paper's hybrid: layers 1, 3, 5, 7, 8, 10, 12, 14 of 16 at r_kv 512 leave 78.1% of the cache, which is with
    64 rotated channels."""
    source = llama().attention.to_dict()
    options = xecomla.new_options(0, source, nope=64, rotary=64) | {"kv_lora_rank": 512, "q_lora_rank": 864}
    chosen = xecomla.configured(fields.plain(llama()), dict.fromkeys((1, 3, 5, 7, 8, 10, 12, 14), options))
    specs = models.layer_specs(chosen)
    total = sum(cache_bytes(spec["attention"]) for spec in specs)
    assert [spec["attention"]["layer"] for spec in specs].count("mla") == 8 and total / (16 * 2048) == 0.78125


@pytest.mark.parametrize("share", [0.3, 0.85, 0.95, 1.0])
def test_ranks_by_energy(share):
    model, wanted = network(config(depth=3)), config(depth=3)
    for count, rule in (("released", oracle.code_rank), ("paper", oracle.paper_rank)):
        made = upcycle(model, wanted, kv_energy=share, q_energy=share, count=count, divisor=2, fixed_ends=True, **FIXED)
        expected = {}
        for layer in range(3):
            own = matrices(model, layer)
            joint = np.hstack([oracle.repeated(own[name], 8, 2) for name in ("key", "value")])
            both = (rule(own["query"], share, 2), min(rule(joint, share, 2), WIDTH))
            expected[str(layer)] = both if layer == 1 else (16, 16)
        assert made.report.options["ranks"] == expected
        assert made.config["attention"]["kv_lora_rank"] == (
            16 if expected["1"][1] == 16 else (16, expected["1"][1], 16)
        )


def test_the_two_ways_to_count():
    """Of energies 4, 1, 1, 1, 1: half of them is one value, exactly; the code does not count what exceeds a share."""
    values = np.sqrt(np.array([4.0, 1, 1, 1, 1]))
    ranks = lambda count: xecomla.Ranks(8, 8, 0.5, 0.5, False, count, 1)  # noqa: E731
    found = {
        share: [ranks(count).by_energy(values, share) for count in ("released", "paper")] for share in (0.3, 0.5, 0.7)
    }
    assert found == {0.3: [1, 1], 0.5: [1, 1], 0.7: [2, 3]}


def test_ranks_are_rounded_and_lists_are_kept():
    wanted = config(depth=2)
    made = upcycle(network(wanted), wanted, kv_rank=(9, 3), q_rank=(0, 17))
    assert made.report.options["ranks"] == {"0": (0, 16), "1": (24, 8)}
    assert made.config["attention"]["kv_lora_rank"] == (16, 8)
    shapes = lambda state: jax.tree.map(lambda leaf: leaf.shape, nnx.to_pure_dict(state))  # noqa: E731
    assert shapes(models.abstract(made.config, VOCABULARY)[1]) == shapes(nnx.state(made.model))
    changed = {f"model.attention.{name}": made.config["attention"][name] for name in ("kv_lora_rank", "q_lora_rank")}
    validate.check(fields.apply(base.get_config(), {"model.attention": "mla", "model.depth": 2} | changed))


def test_random_weights_but_for_the_output():
    wanted = config(depth=1, out_bias=True)
    model = network(wanted)
    made, other = (upcycle(model, wanted, init="random", seed=seed, **FIXED) for seed in (0, 1))
    get = lambda made: np.asarray(made.model.layers()[0].attention.latent.weight[...])  # noqa: E731
    assert apart(get(made), get(other)) > 0.5
    for name in ("weight", "bias"):
        ours, theirs = (getattr(each.layers()[0].attention.out, name)[...] for each in (made.model, model))
        np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize(
    ("source", "options", "says"),
    [
        ({}, {"kv_rank": 99}, "kv_rank=99 is above the rank of the matrices, 24"),
        ({}, {"kv_rank": (8, 8, 8)}, "3 numbers in kv_rank for 2 layers"),
        ({}, {"kv_rank": 0}, "kv_rank must be 1 or more, not 0"),
        ({}, {"q_energy": 1.5}, "q_energy must be a share of 0 to 1, not 1.5"),
        ({}, {"layers": (1, 2)}, "there is no layer 2: the network has layers 0 to 1"),
        ({}, {"sigma": "dwn"}, "unknown sigma 'dwn': did you mean down"),
        ({}, {"rotary": 3}, "nope=4 and rotary=3 do not fit the heads of layer 0"),
        ({}, {"rope": "matched", "rotary": 6}, "rope='matched' needs rotary=6 to divide the heads of layer 0, 8 wide"),
        ({"qk_norm": True}, {}, "layer 0 has qk_norm, for which latent attention has no place"),
        ({"window": 4, "sink_tokens": 1}, {}, "layer 0 has sink_tokens, for which"),
        ({"rope": {"share": 0.5}}, {}, "layer 0 has rope.share, for which"),
    ],
)
def test_errors(source, options, says):
    wanted = config(**source)
    with pytest.raises(ConversionError, match=says):
        upcycle(network(wanted), wanted, **options)


def test_networks_without_heads_of_their_own():
    wanted = config()
    wanted.attention = attention.get("mla")
    with pytest.raises(ConversionError, match="layer 0 is mla, and only mha"):
        upcycle(network(wanted), wanted)
