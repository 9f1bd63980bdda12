"""Tensor-parallel latent attention, its relatives and its meshes, against float64 NumPy that shares no code with them.

`tpla_oracle` was written from the paper's formulas; here it stands beside the layers in every mode, in full passes and
in prefill followed by decoding. Meshes: the same function as on one device, the collectives of a decoding step one by
one, and the cache's bytes on a device as declared.
"""

import collections
import contextlib
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tpla_oracle as oracle
from flax import nnx

import layers.attention
import sharding
from configs import base
from kernels.tokens import Tokens, sequence
from layers.attention.tpla import MODES
from layers.rope import Rope
from sharding import ShardingError

WIDTH, LENGTH, PROMPT, THETA = 24, 9, 5, 100.0
SIZES = dict(heads=8, kv_lora_rank=16, qk_nope_head_dim=6, qk_rope_head_dim=4, v_head_dim=5, rope=Rope(theta=THETA))
QUICK = {"xla_backend_optimization_level": 0}
X64 = dict(param_dtype="float64", compute_dtype="float64")


@pytest.fixture(autouse=True, scope="module")
def quick_compilation():
    """Tiny programs: compiling them well costs far more than running them."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


def build(layer: str = "tpla", *, factors: bool = True, **options):
    """A layer whose gains and factors are not the trivial ones."""
    made = layers.attention.build(layer, width=WIDTH, rngs=nnx.Rngs(1), init_std=0.4, **SIZES | options)
    dtype = made.latent.weight[...].dtype
    draw = np.random.default_rng(3)
    for norm in ("latent_norm", "query_norm"):
        if getattr(made, norm, None) is not None:
            gain = getattr(made, norm).gain
            gain[...] = jnp.asarray(1 + 0.3 * draw.standard_normal(gain[...].shape), dtype)
    if layer == "tpla" and factors:
        made.norm_factor[...] = jnp.asarray(made.slices * draw.uniform(0.6, 1.6, made.slices), dtype)
        made.logit_factor[...] = jnp.asarray(draw.uniform(0.5, 2, made.slices), dtype)
    return made


def weights(layer) -> oracle.Weights:
    """The layer's parameters for the oracle."""
    get = lambda linear: np.asarray(linear.weight[...])  # noqa: E731
    low_rank = {}
    if layer.q_rank:
        low_rank = dict(query_down=get(layer.query_down), query_gain=np.asarray(layer.query_norm.gain[...]))
    return oracle.Weights(
        layer.heads, layer.nope, layer.rotary, layer.value, layer.rank, query=get(layer.query),
        latent=get(layer.latent), rope_key=get(layer.rope_key), gain=np.asarray(layer.latent_norm.gain[...]),
        key_up=get(layer.key_up), value_up=get(layer.value_up), out=get(layer.out), **low_rank,
    )  # fmt: skip


def inputs(length: int = LENGTH, dtype: str = "float32"):
    return jax.random.normal(jax.random.key(0), (2, length, WIDTH), dtype)


def rows(function, x) -> np.ndarray:
    """An oracle of one row, over a batch."""
    x = np.asarray(x, np.float64)
    return np.stack([function(row, np.arange(len(row), dtype=np.float64)) for row in x])


def outputs(layer, x, prompt: int = 0, layout=None, step: int = 1) -> np.ndarray:
    """One full pass, or a prompt into a cache and then `step` tokens at a time."""
    definition, state = nnx.split(layer)

    def run(state, x, tokens, cache):
        with contextlib.nullcontext() if layout is None else layout.activate():
            layer = nnx.merge(definition, state)
            if prompt and cache is None:
                cache = layer.init_cache(len(x), LENGTH, str(x.dtype))
            return layer(x, tokens, cache)[:2]

    if layout is not None:
        state = jax.device_put(state, layout.param_shardings(state))
    run = jax.jit(run)
    if not prompt:
        return np.asarray(run(state, x, sequence(x.shape[1]), None)[0])
    out, cache = run(state, x[:, :prompt], sequence(prompt), None)
    pieces = [np.asarray(out)]
    for t in range(prompt, x.shape[1], step):
        few = x[:, t : t + step]
        at = jnp.broadcast_to(t + jnp.arange(few.shape[1]), few.shape[:2])
        out, cache = run(state, few, Tokens(index=at, valid=jnp.ones(few.shape[:2], bool)), cache)
        pieces.append(np.asarray(out))
    return np.concatenate(pieces, axis=1)


def apart(found, expected) -> float:
    return float(np.abs(found - expected).max() / np.abs(expected).max())


def expected(layer, x, prompt: int, turning: int = 1) -> np.ndarray:
    """What the oracle says of a layer `tpla`."""
    given = weights(layer)
    options = dict(norm=layer.norm, softmax=layer.softmax)
    whole = len(x[0]) if not prompt else prompt  # Without a cache all tokens are a prompt.
    options["prefill"] = whole if layer.prefill == "whole" else 0
    alpha, mu = np.asarray(layer.norm_factor[...]), np.asarray(layer.logit_factor[...])
    epsilon = layer.latent_norm.epsilon
    sizes = (THETA, epsilon, layer.scale, layer.slices)
    return rows(lambda row, at: oracle.tpla(given, row, turning * at, *sizes, alpha, mu, **options), x)


@pytest.mark.parametrize("prompt", [0, PROMPT], ids=["full", "decoding"])
@pytest.mark.parametrize(
    ("mode", "slices"), [(mode, 2) for mode in MODES] + [("tpla", 1), ("tpla", 4), ("tpla", 8), ("tpla_pd", 4)]
)
def test_every_mode_is_what_the_formulas_say(mode, slices, prompt):
    layer = build(slices=slices, q_lora_rank=7 if slices == 4 else 0, **MODES[mode])
    x = inputs()
    assert apart(outputs(layer, x, prompt), expected(layer, x, prompt)) < 2e-6


@pytest.mark.parametrize("mode", ["tpla", "tpla_pd"])
def test_in_float64_they_agree_to_its_last_digits(mode):
    """Without rotary positions, whose angles are float32."""
    with jax.enable_x64(True):
        layer, x = build(**MODES[mode], **X64, rope=Rope(theta=0.0)), inputs(dtype="float64")
        for prompt in (0, PROMPT):
            assert apart(outputs(layer, x, prompt), expected(layer, x, prompt, turning=0)) < 1e-12


@pytest.mark.parametrize("latents", [1, 2, 4])
def test_grouped_latents(latents):
    """GLA, and MLA with one latent."""
    layer, x = build("mla", latents=latents, kv_lora_rank=16 // latents), inputs()
    wide = weights_of_gla(layer)
    plain = rows(
        lambda row, at: oracle.gla(wide, row, at, THETA, 1e-6, layer.scale, latents, np.full(latents, float(latents))),
        x,
    )
    assert apart(outputs(layer, x), plain) < 2e-6
    assert apart(outputs(layer, x, PROMPT), plain) < 2e-6


def weights_of_gla(layer) -> oracle.Weights:
    """The oracle's GLA takes W_UK of all slices; the rows of other groups' slices are not read."""
    get = lambda linear: np.asarray(linear.weight[...])  # noqa: E731
    tall = lambda up: np.tile(up, (layer.latents, 1))  # noqa: E731
    return oracle.Weights(
        layer.heads, layer.nope, layer.rotary, layer.value, layer.latents * layer.rank, query=get(layer.query),
        latent=get(layer.latent), rope_key=get(layer.rope_key), gain=np.asarray(layer.latent_norm.gain[...]),
        key_up=tall(get(layer.key_up)), value_up=tall(get(layer.value_up)), out=get(layer.out),
    )  # fmt: skip


def same_parameters(layer, other) -> None:
    """Copies the numbers of `other`'s parameters."""
    for name in ("query", "latent", "rope_key", "key_up", "value_up", "out"):
        getattr(layer, name).weight[...] = getattr(other, name).weight[...]
    layer.latent_norm.gain[...] = other.latent_norm.gain[...]


def test_one_slice_is_mla():
    mla, layer, x = build("mla"), build(slices=1, factors=False), inputs()
    same_parameters(layer, mla)
    for prompt in (0, PROMPT):
        assert apart(outputs(layer, x, prompt), outputs(mla, x, prompt)) < 2e-6


@pytest.mark.parametrize("kind", ["score_sum", "sequence"])
@pytest.mark.parametrize("parts", [2, 4])
def test_the_exact_forms_are_mla(kind, parts):
    """Scores summed over slices, and a cache in parts by tokens."""
    mla, x = build("mla"), inputs()
    layer = build("mla_sequence", parts=parts) if kind == "sequence" else build(slices=parts, **MODES[kind])
    same_parameters(layer, mla)
    for prompt, step in ((0, 1), (PROMPT, 1), (PROMPT, 2)):
        assert apart(outputs(layer, x, prompt, step=step), outputs(mla, x)) < 5e-6


def test_values_without_a_norm():
    """Latents made from another attention have no norm: then alpha has nothing to do."""
    layer, x = build(latent_norm="none"), inputs()
    before = outputs(layer, x)
    layer.norm_factor[...] = 7 * layer.norm_factor[...]
    assert np.array_equal(outputs(layer, x), before)


# Meshes


def layout(devices: int, latent: int) -> sharding.Layout:
    config = base.sharding()
    config.preset, config.latent = "tpla", latent
    return sharding.build(config, jax.devices()[:devices])


FEW, MANY = [(2, 2), (4, 2)], [(2, 1), (8, 2), (4, 4), (8, 8)]
EVERYWHERE = ("tpla", "tpla_pd", "scatter", "sequence")
EXAMPLES = [(mode, *mesh) for mode in EVERYWHERE for mesh in FEW + MANY]
EXAMPLES += [(mode, *mesh) for mode in ("tpla_norm_only", "score_sum", "gla", "mla") for mesh in FEW]


@pytest.mark.parametrize(("mode", "devices", "latent"), EXAMPLES)
def test_a_mesh_changes_nothing(mode, devices, latent):
    """Slices on devices of their own, or side by side on one: outputs to 1e-5, of a prompt and of decoding."""
    assert apart(outputs(on_mesh(mode, latent), inputs(), PROMPT, layout(devices, latent)), alone(mode, latent)) < 1e-5


def test_a_full_pass_on_a_mesh():
    layer = build(slices=4)
    assert apart(outputs(layer, inputs(), 0, layout(4, 2)), outputs(layer, inputs())) < 1e-5


@functools.cache
def alone(mode: str, latent: int) -> np.ndarray:
    """On one device."""
    return outputs(on_mesh(mode, latent), inputs(), PROMPT)


@functools.cache
def on_mesh(mode: str, latent: int):
    """A layer with as many slices as devices along "latent", or twice as many."""
    slices = latent if latent > 2 else 2 * latent
    if mode == "sequence":
        return build("mla_sequence", parts=slices)
    if mode in ("gla", "mla"):
        return build("mla", latents=latent if mode == "gla" else 1, kv_lora_rank=8)
    if mode == "scatter":
        return build(slices=slices, out_mode="scatter_heads")
    return build(slices=slices, **MODES[mode])


def decoding_step(layer, places: sharding.Layout, batch: int = 2, capacity: int = 64):
    """The compiled step of one new token per row, and the cache it is given."""
    definition, state = nnx.split(layer)
    state = jax.device_put(state, places.param_shardings(state))

    def fill(state, x):
        with places.activate():
            layer = nnx.merge(definition, state)
            return layer(x, sequence(x.shape[1]), layer.init_cache(batch, capacity, "float32")).cache

    def step(state, x, cache):
        with places.activate():
            tokens = Tokens(index=cache.length[:, None], valid=jnp.ones((batch, 1), bool))
            return nnx.merge(definition, state)(x, tokens, cache)[:2]

    cache = jax.jit(fill)(state, inputs(7))
    return jax.jit(step).lower(state, inputs(1), cache).compile(compiler_options=QUICK), cache


def sent(program, places) -> collections.Counter:
    """(collective, mesh axes, elements of the result) -> how often."""
    found = collections.Counter()
    for name, entries in sharding.collectives(program, places.mesh).items():
        for one in entries:
            assert one.exact
            found[name, one.axes, math.prod(one.shape)] += one.times
    return found


ROWS, CAPACITY, VALUE, RANK, KEY = 2, 64, 5, 16, 20
MODEL = ("latent", "head")


@pytest.mark.parametrize(("devices", "latent"), [(2, 2), (4, 2), (4, 4)])
def test_what_a_decoding_step_sends(devices, latent):
    """TPLA: one all-reduce of [B, 1, D]. The others as their docstrings say. No cache is gathered by any."""
    places, head = layout(devices, latent), devices // latent
    both = MODEL if head > 1 else ("latent",)
    one_sum = {("all-reduce", both, ROWS * WIDTH): 1}
    local = 8 // head  # Heads of a device.
    scattered = {("reduce-scatter", ("latent",), ROWS * local // latent * VALUE): 1}
    square = {("all-reduce", ("latent",), ROWS): 1}
    scores = {("all-reduce", ("latent",), ROWS * local * CAPACITY): 1}
    spread = {
        ("all-gather", ("latent",), ROWS * local * KEY): 1,
        ("all-reduce", ("latent",), ROWS * local): 1,
        ("reduce-scatter", ("latent",), ROWS * local // latent): 1,
        ("reduce-scatter", ("latent",), ROWS * local // latent * RANK): 1,
    }
    declared = {
        "tpla": one_sum,
        "tpla_pd": one_sum,
        "tpla_softmax_only": square | one_sum,
        "tpla_norm_only": scores | one_sum,
        "score_sum": square | scores | one_sum,
        "scatter": scattered | one_sum,
        "mla": one_sum,
        "gla": one_sum,
        "sequence": spread | one_sum,
    }
    for mode, wanted in declared.items():
        if devices != 4 and mode not in ("tpla", "scatter", "sequence"):
            continue
        if mode == "scatter":
            layer = build(slices=latent, out_mode="scatter_heads")
        elif mode in ("mla", "gla"):
            layer = build("mla", latents=latent if mode == "gla" else 1)
        elif mode == "sequence":
            layer = build("mla_sequence", parts=latent)
        else:
            layer = build(slices=latent, **MODES[mode])
        program, cache = decoding_step(layer, places)
        assert sent(program, places) == wanted, mode
        _declared_bytes(layer, program, cache, places)


def _declared_bytes(layer, program, cache, places) -> None:
    """Each device holds of the cache what the formula says; read off the compiled program's own shardings."""
    (_, _, given), _ = program.input_shardings
    held = 0
    for name, entry in cache.entries.items():
        shard = given.entries[name].shard_shape(entry.shape)
        assert shard == entry.sharding.shard_shape(entry.shape)
        held += math.prod(shard) * entry.dtype.itemsize
    assert held == ROWS * layer.cache_bytes(CAPACITY, 4, places.parts())


def test_cache_bytes_of_deepseek_v3():
    """Per token and layer in bfloat16: 1,152 bytes on every device for MLA, 640 or 384 for TPLA."""
    shape = dict(heads=128, kv_lora_rank=512, qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=128)

    def per_token(layer, devices, latent, **options):
        made = nnx.eval_shape(lambda: layers.attention.build(layer, width=64, rngs=nnx.Rngs(0), **shape | options))
        return made.cache_bytes(1024, 2, layout(devices, latent).parts()) / 1024

    assert per_token("mla", 8, 2) == 1152
    assert per_token("tpla", 8, 2) == per_token("tpla", 2, 2) == 640
    assert per_token("tpla", 8, 4, slices=4) == 384
    assert per_token("mla", 8, 2, latents=2, kv_lora_rank=256) == 640
    assert per_token("mla_sequence", 8, 2) == 576


def test_gradients_on_a_mesh():
    """Training: the gradients of a sharded layer are those of one device, parameter by parameter."""
    for layer in (build(slices=2), build(slices=2, **MODES["tpla_pd"])):
        definition, parameters, rest = nnx.split(layer, nnx.Param, ...)
        x = inputs()

        def loss(parameters, places, definition=definition, rest=rest, x=x):
            with contextlib.nullcontext() if places is None else places.activate():
                return jnp.sum(jnp.sin(nnx.merge(definition, parameters, rest)(x, sequence(LENGTH)).out))

        alone = jax.jit(jax.grad(lambda p, loss=loss: loss(p, None)))(parameters)
        places = layout(4, 2)
        placed = jax.device_put(parameters, places.param_shardings(parameters))
        together = jax.jit(jax.grad(lambda p, loss=loss, places=places: loss(p, places)))(placed)
        for one, many in zip(jax.tree.leaves(alone), jax.tree.leaves(together), strict=True):
            assert apart(np.asarray(many), np.asarray(one)) < 2e-5


def test_what_does_not_fit():
    with pytest.raises(ValueError, match="3 slices do not divide a latent of 16 channels"):
        build(slices=3)
    with pytest.raises(ValueError, match="3 latents do not divide 8 heads"):
        build("mla", latents=3)
    with pytest.raises(ValueError, match="out_mode must be allreduce or scatter_heads, not 'sum'"):
        build(out_mode="sum")
    with pytest.raises(ShardingError, match=r"'slices' of parameter .* has size 2, which mesh axis 'latent' of size 4"):
        state = nnx.split(build(slices=2))[1]
        layout(4, 4).param_shardings(state)
    config = base.sharding()
    config.preset, config.latent = "tpla", 3
    with pytest.raises(ShardingError, match=r"config.sharding.latent is 3, which does not divide the 4 devices"):
        sharding.build(config, jax.devices()[:4])
    config.preset = "tp"
    with pytest.raises(ShardingError, match="preset 'tp' has no mesh axis 'latent'"):
        sharding.build(config, jax.devices()[:4])
    odd = build(slices=4, **MODES["tpla_pd"], heads=6)
    with pytest.raises(ShardingError, match="6 heads do not divide"), layout(8, 4).activate():
        odd(inputs(), sequence(LENGTH))
