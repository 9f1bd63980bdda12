"""The lightning kernels for TPU and GPU: interpreted, against the definition in float64; lowered for their chips."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.pallas.mosaic.interpret import interpret_pallas_call  # The only way to ask for races.
from jax.experimental.pallas import tpu as pltpu

from kernels import _triton
from kernels.lightning import IMPLEMENTATIONS, Case, cost, lightning_attention, limits, pallas_tpu
from kernels.lightning import triton as triton_gpu
from kernels.lightning.timeline import Timeline
from kernels.platform import compiling_for, interpreted
from kernels.tokens import packed

NAMES = ("output", "final state", "dq", "dk", "dv", "initial state's gradient")
# Relative RMS against float64. The state too is added up from operands of the inputs' type.
TOLERANCE = {"float32": 2e-6, "bfloat16": 6e-3}
BATCH, HEADS = 2, 3
RATES = np.array([0.0, 0.3, 20.0])  # exp(20 * 7) overflows float32: what lies above the diagonal must not be formed.

INTERPRETER = pltpu.InterpretParams(detect_races=True, uninitialized_memory="nan")
ROUTES = {
    "tpu": pallas_tpu.Sweeps(chunk=8, group=1, interpret=True),
    "tpu, races": pallas_tpu.Sweeps(chunk=8, group=3, interpret=INTERPRETER),
    "gpu": triton_gpu.Sweeps(chunk=16, block=16),
    "gpu, in parts": triton_gpu.Sweeps(chunk=16, block=16, parts=2),
}
SHAPES = {"whole": (32, 4, 4), "rest": (37, 3, 20), "documents": (43, 20, 5)}


def documents() -> tuple[np.ndarray, np.ndarray]:
    """Where documents begin and what is valid, [2, 43].

    First row: a document goes on from the initial state, others begin on an edge of chunks (16, 32) and off it (5, 21).
    Second: padding left, in the middle (a whole chunk of 8 in it, and across an edge of 16) and right, and a document
    that begins in the last chunk.
    """
    begins, valid = np.zeros((2, 43), bool), np.ones((2, 43), bool)
    begins[0, [5, 16, 21, 32]] = True
    valid[1, [*range(3), *range(14, 25), 30, *range(39, 43)]] = False
    begins[1, 36] = True
    return begins, valid


def moments(case: str) -> tuple[np.ndarray, np.ndarray]:
    length = SHAPES[case][0]
    return documents() if case == "documents" else (np.zeros((2, length), bool), np.ones((2, length), bool))


@functools.cache
def draw(case: str, dtype: str):
    """q, k, v, initial state, and cotangents of output and final state, without what padding will hold."""
    length, width, value = SHAPES[case]
    rng = np.random.default_rng(length)
    token, state = [(BATCH, length, HEADS, n) for n in (width, width, value, value)], (BATCH, HEADS, width, value)
    q, k, v, do = (np.asarray(jnp.asarray(rng.normal(size=shape), dtype), np.float64) for shape in token)
    q, k, v, do = (np.where(moments(case)[1][..., None, None], x, 0) for x in (q, k, v, do))
    start, dend = (np.float64(np.float32(rng.normal(size=state))) for _ in range(2))
    return q, k, v, start, do, dend


def definition(case, q, k, v, state, do, dstate):
    """Dense sums over pairs in float64: output and final state, and the derivatives of <out, do> + <final, dstate>."""
    begins, valid = moments(case)
    length = q.shape[1]
    results = out, final, dq, dk, dv, dstart = [np.zeros(x.shape) for x in (v, state, q, k, v, state)]
    for b, h in np.ndindex(BATCH, HEADS):
        pairs, since = np.zeros((length, length)), np.zeros(length)
        for t in range(length):
            for u in range(t + 1):
                if not begins[b, u + 1 : t + 1].any():
                    pairs[t, u] = np.exp(-RATES[h] * valid[b, u + 1 : t + 1].sum())
            if not begins[b, : t + 1].any():
                since[t] = np.exp(-RATES[h] * valid[b, : t + 1].sum())
        until, through = pairs[-1][:, None], since[-1]
        since = since[:, None]
        (qh, kh, vh, doh), s, ds = (x[b, :, h] for x in (q, k, v, do)), state[b, h], dstate[b, h]
        scores, dscores = pairs * (qh @ kh.T), pairs * (doh @ vh.T)
        out[b, :, h] = scores @ vh + since * (qh @ s)
        final[b, h] = through * s + kh.T @ (until * vh)
        dq[b, :, h] = dscores @ kh + since * (doh @ s.T)
        dk[b, :, h] = dscores.T @ qh + until * (vh @ ds.T)
        dv[b, :, h] = scores.T @ doh + until * (kh @ ds)
        dstart[b, h] = through * ds + (since * qh).T @ doh
    return results


@functools.cache
def expected(case: str, dtype: str):
    return definition(case, *draw(case, dtype))


@functools.cache
def program(route: str, timed: bool):
    """Compiled: output, final state and gradients."""
    sweeps = ROUTES[route]
    attend = pallas_tpu.lightning_attention if isinstance(sweeps, pallas_tpu.Sweeps) else triton_gpu.lightning_attention

    @jax.jit
    def run(q, k, v, state, do, dstate, moments):
        rates = jnp.asarray(RATES, jnp.float32)

        def function(q, k, v, state):
            return attend(q, k, v, rates, Timeline(*moments) if timed else None, state, 64, sweeps)

        results, pull = jax.vjp(function, q, k, v, state)
        return *results, *pull((do, dstate))

    return run


def outcome(route: str, case: str, dtype: str):
    """Output, final state and gradients by a kernel, with NaN and inf in padding."""
    q, k, v, state, do, dstate = draw(case, dtype)
    columns = moments(case) if case == "documents" else None
    if columns:
        padding = ~columns[1][..., None, None]
        q, k, v, do = (
            np.where(padding, x, y) for x, y in zip((np.nan, np.inf, np.nan, np.nan), (q, k, v, do), strict=True)
        )
    q, k, v, do = (jnp.asarray(x, dtype) for x in (q, k, v, do))
    with interpreted():
        found = program(route, columns is not None)(q, k, v, jnp.float32(state), do, jnp.float32(dstate), columns)
        return [np.asarray(x) for x in found]


def relative(found, wanted):
    found = np.asarray(found, np.float64)
    return np.sqrt(np.mean((found - wanted) ** 2) / np.mean(wanted**2))


@pytest.mark.parametrize(
    ("route", "case", "dtype"),
    [
        ("tpu", "whole", "float32"),
        ("tpu", "rest", "float32"),
        ("tpu, races", "documents", "float32"),
        ("tpu", "documents", "bfloat16"),
        ("gpu", "whole", "float32"),
        ("gpu", "rest", "float32"),
        ("gpu", "documents", "float32"),
        ("gpu", "documents", "bfloat16"),
        ("gpu, in parts", "rest", "float32"),
        ("gpu, in parts", "documents", "float32"),
    ],
)
def test_matches_the_definition(route, case, dtype):
    """Every result of every head (by its own scale: rates differ), twice to the bit."""
    found = outcome(route, case, dtype)
    if ROUTES[route] is ROUTES["tpu, races"]:
        assert not interpret_pallas_call.races.races_found
    again = outcome(route, case, dtype)
    for name, x, y, wanted in zip(NAMES, found, again, expected(case, dtype), strict=True):
        assert x.dtype == (jnp.float32 if "state" in name else dtype)
        np.testing.assert_array_equal(x, y, err_msg=name)
        heads = 1 if "state" in name else 2
        for h in range(HEADS):
            error = relative(np.take(x, h, heads), np.take(wanted, h, heads))
            assert error < TOLERANCE[dtype], f"{name} of head {h}: {error}"
        if "state" not in name:
            assert not np.any(np.asarray(x, np.float32)[~moments(case)[1]]), f"{name} of padding"


def test_the_oracle_is_right():
    """The definition against the recurrence, and its gradients against the loss, which is linear in each input."""
    arrays = draw("documents", "float32")
    begins, valid = moments("documents")
    out, final, *gradients = definition("documents", *arrays)
    q, k, v, state, do, dstate = arrays
    state = state.copy()
    for b, t, h in np.ndindex(*out.shape[:3]):
        if valid[b, t]:
            state[b, h] *= 0 if begins[b, t] else np.exp(-RATES[h])
            state[b, h] += np.outer(k[b, t, h], v[b, t, h])
            np.testing.assert_allclose(out[b, t, h], q[b, t, h] @ state[b, h], rtol=0, atol=1e-12)
    np.testing.assert_allclose(final, state, rtol=0, atol=1e-12)
    for i, gradient in enumerate(gradients):
        moved = [*arrays]
        step = moved[i] * np.random.default_rng(i).normal(size=moved[i].shape)  # Padding stays 0.
        moved[i] = moved[i] + step
        there, end, *_ = definition("documents", *moved)
        change = np.sum((there - out) * do) + np.sum((end - final) * dstate)
        np.testing.assert_allclose(np.sum(gradient * step), change, rtol=1e-9)


def small(rows=2, length=40):
    rng = np.random.default_rng(0)
    return [jnp.asarray(rng.normal(size=(rows, length, 2, 8)), jnp.float32) for _ in range(3)]


@pytest.mark.parametrize("name", ["pallas_tpu", "triton"])
def test_called_by_name(name):
    """Through the op, in the sizes chosen for the chip, with documents that all rows share, under vmap."""
    q, k, v = small()
    tokens = packed(jnp.asarray([[1] * 17 + [2] * 20 + [0] * 3]))
    rates = jnp.asarray([0.1, 1.0])

    def loss(q, implementation):
        out, state = lightning_attention(q, k, v, rates, tokens=tokens, implementation=implementation)
        return jnp.sum(out**2) + jnp.sum(state**2)

    both = jax.jit(jax.vmap(jax.value_and_grad(loss), (0, None)), static_argnums=1)
    many = jnp.stack([q, q[::-1]])
    with interpreted():
        found = both(many, name)
        for x, y in zip(found, both(many, "xla"), strict=True):
            assert relative(x, np.asarray(y, np.float64)) < 3e-6


@pytest.mark.parametrize(
    ("name", "case", "reason"),
    [
        ("pallas_tpu", Case((1, 1, 2, 8), (1, 1, 2, 8), jnp.float32, 64), "one token"),
        ("triton", Case((1, 1, 2, 8), (1, 1, 2, 8), jnp.bfloat16, 64), "one token"),
        ("pallas_tpu", Case((0, 9, 2, 8), (0, 9, 2, 8), jnp.float32, 64), "nothing to compute"),
        ("triton", Case((1, 0, 2, 8), (1, 0, 2, 8), jnp.float32, 64), "nothing to compute"),
        ("pallas_tpu", Case((1, 9, 2, 8), (1, 9, 2, 8), jnp.float64, 64), "not in float64"),
        ("triton", Case((1, 9, 2, 8), (1, 9, 2, 8), jnp.float16, 64), "not in float16"),
        ("pallas_tpu", Case((1, 9, 1, 1280), (1, 9, 1, 1280), jnp.float32, 64), "VMEM"),
        ("triton", Case((1, 9, 2, 264), (1, 9, 2, 8), jnp.bfloat16, 64), "256"),
    ],
)
def test_refuses_with_the_reason(name, case, reason):
    assert reason in IMPLEMENTATIONS[name].supports(case)
    arrays = [jax.ShapeDtypeStruct(shape, case.dtype) for shape in (case.q, case.q, case.v)]
    with jax.enable_x64(True), interpreted(), pytest.raises(NotImplementedError, match=reason):
        jax.eval_shape(lambda q, k, v: lightning_attention(q, k, v, jnp.ones(q.shape[2]), implementation=name), *arrays)


def lowered(platform, kind, dtype, length, width, heads=8):
    """The gradient of the op for another chip, whatever implementation is chosen there."""
    x = jax.ShapeDtypeStruct((1, length, heads, width), dtype)

    def loss(q, k, v):
        return jnp.sum(lightning_attention(q, k, v, jnp.ones(heads))[0].astype(jnp.float32) ** 2)

    with compiling_for(platform, kind):
        program = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).trace(x, x, x)
        return program.lower(lowering_platforms=("cuda" if platform == "gpu" else platform,))


@pytest.mark.parametrize(("dtype", "width"), [(jnp.bfloat16, 128), (jnp.bfloat16, 64), (jnp.float32, 80)])
def test_lowers_for_tpu(dtype, width):
    """Three kernels, and no transposed copy of a sequence beside them."""
    text = lowered("tpu", "TPU v5e", dtype, 300, width).as_text()
    assert text.count("@tpu_custom_call") == 3
    transposed = [line for line in text.splitlines() if "stablehlo.transpose" in line]
    assert len(transposed) == 1 and "x300x" not in transposed[0]


def test_compiles_for_hopper():
    """To PTX with tensor core instructions: one kernel forwards, one backwards; in parts where heads are few."""
    whole = _triton.ptx(lowered("gpu", "NVIDIA H200", jnp.bfloat16, 300, 64, heads=70))
    assert len(whole) == 2 and all("wgmma" in text and "sm_90" in text for text in whole)


def test_decoding_steps_stay_with_xla():
    text = lowered("tpu", "TPU v5e", jnp.bfloat16, 1, 128).as_text()
    assert "custom_call" not in text


def test_sizes():
    """Whole tiles of lanes; parts only where programs are few and the sequence is long."""
    assert limits.tpu_sizes((1, 4096, 8, 128), 128, jnp.bfloat16) == (256, 4)
    assert limits.tpu_sizes((1, 4096, 6, 64), 64, jnp.bfloat16) == (256, 2)
    assert limits.tpu_sizes((1, 100, 3, 80), 48, jnp.bfloat16) == (128, 3)
    assert limits.gpu_sizes((8, 4096, 16, 128), 128, jnp.bfloat16)[:3] == (64, 64, 1)
    assert limits.gpu_sizes((3, 4096, 16, 128), 128, jnp.bfloat16)[:3] == (64, 32, 1)
    assert limits.gpu_sizes((1, 131072, 16, 128), 128, jnp.bfloat16)[:3] == (64, 64, 9)
    assert limits.gpu_sizes((1, 1000, 2, 64), 64, jnp.bfloat16)[:3] == (64, 32, 1)


def test_keeps_only_its_inputs():
    """For the backward pass: q, k, v, the initial state and a few numbers, no state per chunk."""
    q, k, v = small(1, 2048)

    def pullback(implementation):
        return jax.vjp(lambda *x: lightning_attention(*x, jnp.ones(2), implementation=implementation), q, k, v)[1]

    for name in ("pallas_tpu", "triton"):
        with interpreted():
            kept = sum(x.size for x in jax.tree.leaves(jax.eval_shape(lambda name=name: pullback(name))))
        assert kept <= 3 * q.size + 2 * 8 * 8 + 8


def test_executed_operations():
    """By hand, one head of D 4, E 8, 5 tokens in chunks of 4: 8 tokens, as multiply-adds doubled."""
    shape = (5, 1, 4, 8)
    assert cost.executed(*shape, chunk=4) == 2 * 8 * (4 * (4 + 8) + 2 * 32)
    assert cost.executed(*shape, chunk=4, backward=True) == 2 * 8 * (3 * 4 * (4 + 8) + 5 * 32)
    assert cost.executed(*shape, chunk=4, block=4, parts=2) == 2 * 8 * (4 * (2 * 4 + 8) + 3 * 32)
    # dq and dk contract over E 8 once for their 4 columns; dv over D 4 for both blocks.
    wanted = 2 * 8 * (4 * (2 * 4 + 8 + 2 * (8 + 4)) + 6 * 32)
    assert cost.executed(*shape, chunk=4, block=4, backward=True) == wanted
