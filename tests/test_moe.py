"""Mixtures of experts against float64 NumPy, on meshes, in models, in configs and in training."""

import collections
import functools
import math
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import layers_oracle
import moe_oracle as oracle
import numpy as np
import pytest
from flax import nnx
from layers_oracle import QUICK, Blank, relative

import sharding
from configs import base, fields
from configs.command_line import parse
from configs.errors import ConfigError
from configs.validate import check
from kernels.platform import compiling_for
from kernels.tokens import Tokens, sequence
from layers.mlp import MLP
from layers.moe import Experts, channel_mixer
from models import account
from tests.models_oracle import built
from training import setup


@pytest.fixture(autouse=True, scope="module")
def quick_compilation():
    """Tiny programs: compiling them well costs far more than running them."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


WIDTH = 8
DEFAULTS = {name: value for name, value in base.experts().to_dict().items() if name != "width"}
ROUTERS = {
    "mixtral": dict(count=6, chosen=2, balance=0.3, z_loss=0.1),
    "deepseek-v2-lite": dict(count=6, chosen=3, renormalise=False, shared=2, balance=1.0, balance_form="sequence"),
    "deepseek-v2": dict(count=8, chosen=3, groups=4, groups_chosen=2, renormalise=False, scale=16.0, shared=1),
    "deepseek-v3": dict(
        count=12, chosen=4, groups=3, groups_chosen=2, group_score="top2", router="sigmoid", correction=True,
        scale=2.5, shared=1, balance=0.5, balance_form="sequence", z_loss=0.2,
    ),
    "all of them": dict(count=4, chosen=4, router="sigmoid", renormalise=False, balance=1.0),
}  # fmt: skip
# Padding at the end of a row, and a row of nothing else.
VALID = np.arange(7) < np.array([[7], [4], [0]])


def made(name: str = "deepseek-v3", kind: str = "swiglu", width: int = 5, dtype: str = "float64", **changes):
    """(layer, its numbers, the oracle's options, the correction) with every number drawn."""
    options = DEFAULTS | ROUTERS[name] | changes
    setting = Blank(WIDTH, param_dtype=dtype, compute_dtype=dtype)
    layer = Experts(setting, kind=kind, width=width, rngs=nnx.Rngs(0), **options)
    numbers = layers_oracle.parameters(layer)
    correction = 0.0
    if options["correction"]:  # Scores + correction of either sign: a group's place must not be taken by zeros.
        correction = np.random.default_rng(1).normal(-0.8, 0.3, options["count"]).astype(np.float32).astype(np.float64)
        layer.router.correction[...] = jnp.asarray(correction, jnp.float32)
    return layer, numbers, options, correction


def draw(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape)


run = jax.jit(lambda layer, x, valid: layer(x, sequence(x.shape[1], valid=valid)), compiler_options=QUICK)


@pytest.mark.parametrize("name", ROUTERS)
def test_output_and_losses(name):
    with jax.enable_x64(True):
        layer, numbers, options, correction = made(name)
        x = draw(*VALID.shape, WIDTH)
        out, losses = run(layer, x, VALID)
    assert relative(out, oracle.mixture(numbers, x, options, "swiglu", correction)) < 1e-13
    balance, z = oracle.balance(numbers, x, VALID, options, correction)
    wanted = {"loss/expert_balance": options["balance"] * balance, "loss/expert_z": options["z_loss"] * z}
    assert losses.keys() == {key for key, value in wanted.items() if value}
    for key, value in losses.items():
        assert math.isclose(value, wanted[key], rel_tol=1e-12)
    assert layer.parameter_count() == sum(value.size for value in numbers.values())


@pytest.mark.parametrize("kind", ["geglu", "relu2"])
def test_other_kinds_of_expert(kind):
    with jax.enable_x64(True):
        layer, numbers, options, _ = made("mixtral", kind, shared=1)
        x = draw(1, 5, WIDTH)
        assert relative(run(layer, x, None)[0], oracle.mixture(numbers, x, options, kind)) < 1e-13
    assert layer.parameter_count() == sum(value.size for value in numbers.values())
    assert ("gate" in numbers) == (kind == "geglu")


@pytest.mark.parametrize("name", ["deepseek-v2", "deepseek-v3"])
def test_gradients(name):
    """Along random directions against differences of the oracle: of x and of every parameter, losses included."""
    with jax.enable_x64(True):
        layer, numbers, options, correction = made(name, balance=0.5, z_loss=0.2)
        x, weights = draw(*VALID.shape, WIDTH), draw(*VALID.shape, WIDTH, seed=3)
        definition, state, rest = nnx.split(layer, nnx.Param, ...)

        def total(state, x):
            out, losses = nnx.merge(definition, state, rest)(x, sequence(x.shape[1], valid=VALID))
            return jnp.sum(out * weights) + sum(losses.values())

        gradient, dx = jax.jit(jax.grad(total, (0, 1)), compiler_options=QUICK)(state, x)
        found = {".".join(path): np.asarray(each[...]) for path, each in nnx.to_flat_state(gradient)}
        found["x"] = np.asarray(dx)

    def wanted(point):
        x = point.pop("x")
        balance, z = oracle.balance(point, x, VALID, options, correction)
        out = oracle.mixture(point, x, options, "swiglu", correction)
        return np.sum(out * weights) + options["balance"] * balance + options["z_loss"] * z

    point = numbers | {"x": x}
    for i, name in enumerate(point):
        direction, step = draw(*point[name].shape, seed=10 + i), 1e-6
        ends = [wanted(point | {name: point[name] + sign * step * direction}) for sign in (1, -1)]
        slope = (ends[0] - ends[1]) / (2 * step)
        assert math.isclose(np.sum(found[name] * direction), slope, rel_tol=1e-6, abs_tol=1e-8), name


def test_all_tokens_to_one_expert():
    """600 tokens, more than any tile, and the other experts without one: none is dropped."""
    with jax.enable_x64(True):
        layer, numbers, *_ = made("deepseek-v3", chosen=1, groups=1, groups_chosen=1, scale=1.0, shared=0)
        layer.router.correction[...] = layer.router.correction[...].at[7].set(100)
        x = draw(2, 300, WIDTH)
        definition, state, rest = nnx.split(layer, nnx.Param, ...)

        def total(state):
            out, losses = nnx.merge(definition, state, rest)(x)
            return jnp.sum(out * out), (out, losses)

        gradient, (out, losses) = jax.jit(jax.grad(total, has_aux=True), compiler_options=QUICK)(state)
    one = {f"{name}.weight": numbers[name][7] for name in ("gate", "up", "down")}
    assert relative(out, layers_oracle.mlp(one, x, "swiglu", False)) < 1e-13
    used = np.any(np.asarray(gradient["up"][...]) != 0, axis=(1, 2))
    assert list(np.flatnonzero(used)) == [7]
    assert float(losses["loss/expert_balance"]) > 0


def test_one_expert_is_a_dense_mlp():
    with jax.enable_x64(True):
        layer, numbers, _, _ = made("mixtral", count=1, chosen=1)
        dense = MLP(Blank(WIDTH, param_dtype="float64"), width=5, rngs=nnx.Rngs(0))
        for name in ("gate", "up", "down"):
            getattr(dense, name).weight[...] = jnp.asarray(numbers[name][0])
        x = draw(2, 3, WIDTH)
        assert relative(run(layer, x, None)[0], np.asarray(dense(jnp.asarray(x)))) < 1e-14
        assert math.isclose(run(layer, x, None)[1]["loss/expert_balance"], 0.3)  # All get the same.


def test_equal_scores_go_to_the_first_experts():
    layer, _, _, _ = made("mixtral", dtype="float32", groups=3, groups_chosen=2, chosen=3)
    weights, experts = layer.routing(jnp.zeros((4, 6)))
    np.testing.assert_array_equal(experts, [[0, 1, 2]] * 4)
    np.testing.assert_allclose(weights, 1 / 3, rtol=1e-6)


def test_padding_changes_no_other_token_and_no_loss():
    layer, _, _, _ = made("deepseek-v3", dtype="float32")
    x, other = (draw(*VALID.shape, WIDTH).astype(np.float32) for _ in range(2))
    other[~VALID] = 1e3 * draw(np.sum(~VALID), WIDTH, seed=5)
    (first, losses), (second, others) = run(layer, x, VALID), run(layer, other, VALID)
    np.testing.assert_array_equal(first[VALID], second[VALID])
    assert losses == others and np.any(first != second)
    nothing = run(layer, x, np.zeros_like(VALID))[1]
    assert all(value == 0 for value in nothing.values())


def test_routing_is_in_float32_whatever_the_activations():
    """Two experts whose logits bfloat16 could not tell apart."""
    layer, _, _, _ = made("mixtral", dtype="bfloat16", count=2, chosen=1)
    weight = np.ones((WIDTH, 2))
    weight[0, 1] += 2.0**-7
    layer.router.weight[...] = jnp.asarray(weight, jnp.bfloat16)
    out, logits = jax.jit(lambda layer, x: (layer(x)[0], layer.router(x)))(layer, jnp.ones((1, 3, WIDTH), jnp.bfloat16))
    assert out.dtype == jnp.bfloat16 and logits.dtype == jnp.float32
    np.testing.assert_array_equal(np.asarray(logits[0]), [[8, 8 + 2.0**-7]] * 3)


# On a mesh.


def on(preset: str, devices: int, **options) -> sharding.Layout:
    config = base.sharding()
    config.update(dict(preset=preset, **options))
    return sharding.build(config, jax.devices()[:devices])


# Each with what one pass sends: (operation, mesh axes) -> numbers per token of one device.
SUM = {("all-reduce", ("model",)): WIDTH}
MESHES = {
    "tp of 2": (lambda: on("tp", 2), SUM),
    "tp of 4": (lambda: on("tp", 4), SUM),
    "tp of 4, hidden units": (lambda: on("tp", 4, rules=(("experts", None), ("expert_mlp", "model"))), SUM),
    "tp of 4, whole experts": (lambda: on("tp", 4, rules=(("experts", None),)), SUM),
    "fsdp_tp of 2 x 4": (lambda: on("fsdp_tp", 8, model=4), SUM),
    "tpla of 2 x 2": (lambda: on("tpla", 4), {("all-reduce", ("latent", "head")): WIDTH}),
}


def on_mesh(layout: sharding.Layout, gradient: bool):
    """(program, arguments): output and losses, or gradients of their sum, of four rows, three of them with padding."""
    layer, *_ = made(dtype="float32", width=8, balance_form="switch")
    definition, state = nnx.split(layer)
    x = draw(4, 7, WIDTH).astype(np.float32)
    tokens = Tokens(np.arange(7)[None], valid=jnp.arange(7) < jnp.array([[7], [4], [0], [6]]))

    def outputs(state, x, tokens):
        with layout.activate():
            out, losses = nnx.merge(definition, state)(x, tokens)
            return out, losses

    def gradients(state, x, tokens):
        def total(state, x):
            out, losses = outputs(state, x, tokens)
            return jnp.sum(jnp.sin(out)) + sum(losses.values())

        return jax.grad(total, (0, 1))(state, x)

    rows = layout.batch_sharding()
    places = (layout.param_shardings(state), rows, Tokens(layout.replicated(), valid=rows))
    arguments = jax.device_put((state, x, tokens), places)
    program = jax.jit(gradients if gradient else outputs, in_shardings=places)
    return program.lower(*arguments).compile(compiler_options=QUICK), arguments


@functools.cache
def alone(gradient: bool) -> list[np.ndarray]:
    program, arguments = on_mesh(on("single", 1), gradient)
    return [np.asarray(leaf) for leaf in jax.tree.leaves(program(*arguments))]


@pytest.mark.parametrize("name", MESHES)
def test_a_mesh_changes_nothing_and_sends_what_it_declares(name):
    layout, declared = MESHES[name][0](), MESHES[name][1]
    program, arguments = on_mesh(layout, False)
    for got, want in zip(jax.tree.leaves(program(*arguments)), alone(False), strict=True):
        np.testing.assert_allclose(got, want, rtol=0, atol=2e-5 * np.abs(want).max())
    tokens = 4 * 7 // layout.mesh.shape["data"]
    found = collections.Counter()
    for operation, entries in sharding.collectives(program, layout.mesh).items():
        for one in entries:
            assert one.exact
            if one.axes == ("data",):  # Weights gathered, and the means of the losses: never a token.
                assert operation == "all-gather" or math.prod(one.shape) <= 12
            else:
                found[operation, one.axes] += one.times * math.prod(one.shape) / tokens
    assert found == declared


@pytest.mark.parametrize("name", ["tp of 4, hidden units", "fsdp_tp of 2 x 4"])
def test_gradients_on_a_mesh(name):
    program, arguments = on_mesh(MESHES[name][0](), True)
    for got, want in zip(jax.tree.leaves(program(*arguments)), alone(True), strict=True):
        np.testing.assert_allclose(got, want, rtol=0, atol=5e-5 * max(np.abs(want).max(), 1e-6))


def test_experts_that_do_not_divide_are_one_line():
    layer, *_ = made("mixtral", dtype="float32")
    with on("tp", 4).activate(), pytest.raises(sharding.ShardingError) as error:
        layer(jnp.zeros((2, 3, WIDTH)))
    line = str(error.value)
    assert "\n" not in line and "config.model.mlp.experts.count" in line and "('experts', None)" in line


def test_lowers_for_tpu_and_gpu():
    layer, *_ = made(dtype="bfloat16")
    x = jnp.zeros((2, 8, WIDTH), jnp.bfloat16)
    for platform, target in (("tpu", "tpu"), ("gpu", "cuda")):
        with compiling_for(platform):
            step = jax.jit(nnx.grad(lambda layer, x: jnp.sum(layer(x)[0])))
            lowered = step.trace(layer, x).lower(lowering_platforms=(target,))
        assert lowered.as_text().count('"chlo.ragged_dot"') == 7  # Gate and up share the functions of three products.


# In models, configs and training.


def small(**changes) -> dict:
    """`config.model` of four blocks, a mixture in every other one."""
    config = base.model()
    config.update(dict(width=16, depth=4, max_length=16, init_std=0.3, per_layer=(("::2", {"mlp.experts.count": 0}),)))
    config.mlp.width = 24
    config.attention.update(dict(heads=2, kv_heads=1, head_dim=8))
    experts = dict(count=4, width=12, shared=1, balance=0.1, router="sigmoid", correction=True)
    config.mlp.experts.update(experts | changes)
    return config.to_dict()


def test_mixed_stacks_scan_and_decode():
    config, ids = small(correction=False), np.random.default_rng(0).integers(0, 30, (2, 9))
    model = built(config | {"scan_layers": "always"})
    assert [(stack.period, stack.repeats) for stack in model.stacks] == [(2, 2)]
    assert [type(block.mlp) for block in model.stacks[0].blocks] == [MLP, Experts]

    scanned = jax.jit(lambda model, ids: model(ids), compiler_options=QUICK)(model, ids)
    losses = [value for key, value in scanned.aux.items() if key == "loss/expert_balance"]
    assert len(losses) == len(scanned.aux) == 1 and losses[0] > 0

    @functools.partial(jax.jit, compiler_options=QUICK)
    def in_two(model, ids):  # Block by block.
        first = model(ids[:, :6], caches=model.init_caches(2, 9))
        return jnp.concatenate([first.logits, model(ids[:, 6:], caches=first.caches).logits], axis=1)

    np.testing.assert_allclose(in_two(model, ids), scanned.logits, atol=2e-5)


def test_account_counts_the_experts_a_token_meets():
    config = small()
    found, dense = (account(each, 30, length=8) for each in (config, small(count=0)))
    expert, router, mlp = 3 * 16 * 12, 16 * 4, 3 * 16 * 24
    assert found.parameters - dense.parameters == 2 * (router + 5 * expert - mlp)
    assert found.parameters - found.active_parameters == 2 * 2 * expert
    assert dense.active_parameters == dense.parameters and "active" not in dense.lines()[0]
    assert found.forward_flops_per_token - dense.forward_flops_per_token == 2 * 2 * (router + 3 * expert - mlp)
    assert f"{found.active_parameters:,} active per token" in found.lines()[0]


REFUSALS = [
    (dict(chosen=5), "config.model.mlp.experts.chosen must not exceed config.model.mlp.experts.count = 4, got 5"),
    (dict(groups=3), "config.model.mlp.experts.groups must divide config.model.mlp.experts.count = 4, got 3"),
    (dict(groups=2, groups_chosen=3), "groups_chosen must not exceed config.model.mlp.experts.groups = 2, got 3"),
    (dict(groups=4, groups_chosen=1), "experts.chosen must not exceed the 1 experts of the groups chosen, got 2"),
    (dict(groups=4, groups_chosen=2, group_score="top2"), "experts.group_score needs two experts or more in a group"),
    (dict(group_score="top3"), "'top3': did you mean top2?"),
    (dict(router="sigmoidal"), "'sigmoidal': did you mean sigmoid?"),
    (dict(balance_form="rows"), "config.model.mlp.experts.balance_form"),
    (dict(balance=-1.0), "experts.balance must be 0 or more"),
    (dict(scale=0.0), "experts.scale must be above 0"),
    (dict(count=-1), "experts.count must be 0 or more"),
    (dict(bias=True), "config.model.mlp.bias must be false where config.model.mlp.experts.count is above 0"),
]


@pytest.mark.parametrize(("changes", "line"), REFUSALS)
def test_contradictions_are_one_line(changes, line):
    config = base.get_config()
    config.model.mlp.bias = changes.get("bias", False)
    config.model.mlp.experts.update(dict(count=4) | {name: value for name, value in changes.items() if name != "bias"})
    with pytest.raises(ConfigError) as error:
        check(config)
    assert line in str(error.value) and "\n" not in str(error.value)


def test_a_layer_refuses_what_no_config_check_saw():
    setting, common = Blank(WIDTH), dict(rngs=nnx.Rngs(0), count=4)
    for options, line in (
        (dict(bias=True), "no biases"),
        (dict(balance_form="x"), "balance_form"),
        (dict(router="x"), "router"),
        (dict(group_score="x"), "group_score"),
        (dict(groups=3), "groups"),
        (dict(chosen=5), "chosen"),
        (dict(kind="x"), "kind 'x'"),
    ):
        with pytest.raises(ValueError, match=line):
            Experts(setting, **common, **options)
    dense = channel_mixer(setting, width=6, experts=dict(count=0, width=3), rngs=nnx.Rngs(0))
    assert isinstance(dense, MLP) and dense.width == 6
    assert channel_mixer(setting, width=6, experts=dict(count=2, width=0), rngs=nnx.Rngs(0)).width == 6


def test_training_from_the_command_line_evens_the_load():
    """The ordinary step on two devices by expert, from a router that favours one of them."""
    typed = "--config=configs/lm.py:smoke --config.model.mlp.experts.count=4 --config.model.mlp.experts.balance=1.0"
    config, _ = parse(typed.split())
    check(config)
    changes = {"model.width": 32, "model.mlp.width": 32, "model.depth": 1, "data.length": 16, "model.max_length": 16}
    config = fields.apply(config, changes | {"optimizer.weight_decay": 0.0, "sharding.preset": "tp"})
    tokenizer = SimpleNamespace(vocab_size=64)
    layout = sharding.build(config.sharding, jax.devices()[:2])
    training = setup.build(config, setup.network(config, tokenizer), layout, tokenizer)
    ids = np.random.default_rng(0).integers(1, 64, (4, 17)).astype(np.int32)
    columns = dict(inputs=ids[:, :-1], targets=ids[:, 1:], segment=np.ones((4, 16), np.int32))
    columns |= dict(position=np.arange(16, dtype=np.int32) + 0 * ids[:, 1:], weight=np.ones((4, 16), np.float32))
    batch = layout.put(columns)
    state = training.init(jax.random.key(0))
    step = training.step.lower(training.abstract, batch).compile(compiler_options=QUICK)
    losses = []
    for _ in range(20):
        state, report = step(state, batch)
        losses.append((float(report.metrics["loss/expert_balance"]), float(report.metrics["cross_entropy"])))
    (first, before), (last, after) = losses[0], losses[-1]
    assert first > last and abs(last - 1) < 0.7 * abs(first - 1) and after < before, losses
