"""The Triton kernels of attention, interpreted: against the float64 oracle, or the reference where functions on scores
or dropout are concerned; the printer of elementwise functions against jnp; and all of it compiled for a GPU."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import test_attention_scores as score_tests
import triton
import triton.language as tl
from attention_oracle import CAUSAL, Setting, arrays, oracle, tokens
from jax import lax
from test_attention_op import assert_close

from kernels import _triton
from kernels.attention import attention, masks, program, triton_source
from kernels.attention import triton as kernel
from kernels.attention.fused import Sizes
from kernels.platform import compiling_for, interpreted
from kernels.tokens import sequence

SETTINGS = {
    "window_grouped": Setting((37, 37, 4, 2, 8, 8), CAUSAL & masks.sliding_window(9)),
    "everything": Setting((32, 48, 2, 2, 8, 8), masks.everything()),
    "fewer_keys": Setting((40, 21, 2, 2, 8, 20)),
    "decode": Setting((1, 41, 4, 2, 8, 8)),
    "all_at_once": Setting(
        (56, 56, 2, 1, 8, 12), CAUSAL & masks.segments() & masks.valid(), packed=True, soft_cap=2.0, sinks=True
    ),
    "negative_scale": Setting((17, 17, 1, 1, 8, 8), scale=-0.7),
    "nothing": Setting((17, 17, 2, 2, 8, 8), ~masks.everything()),
}


@pytest.fixture
def small_blocks(monkeypatch):
    monkeypatch.setattr(kernel, "chosen", lambda q, k, v, dtype: Sizes((16, 16), (16, 16)))


@functools.cache
def compiled(setting):
    q_tokens, k_tokens = tokens(setting)
    more = dict(mask=setting.mask, q_tokens=q_tokens, k_tokens=k_tokens, soft_cap=setting.soft_cap, scale=setting.scale)

    @jax.jit
    def forward_and_gradients(primal, d_out, d_lse):
        (out, lse), pull = jax.vjp(lambda primal: attention(**primal, **more, implementation="triton"), primal)
        return {"out": out, "lse": lse, **pull((d_out.astype(out.dtype), d_lse))[0]}

    return forward_and_gradients


def run(setting, x, dtype="float32"):
    primal = {name: jnp.asarray(a, dtype) for name, a in x.items() if name[:2] != "d_"}
    with interpreted():
        found = compiled(setting)(primal, *(jnp.asarray(x[name], jnp.float32) for name in ("d_out", "d_lse")))
    return {name: np.asarray(a, np.float64) for name, a in found.items()}


@pytest.mark.parametrize("name", SETTINGS)
def test_it_agrees_with_the_oracle(small_blocks, name):
    x = arrays(SETTINGS[name])
    assert_close(run(SETTINGS[name], x), oracle(SETTINGS[name], x))


def test_bfloat16(small_blocks):
    setting = SETTINGS["window_grouped"]
    x = {name: np.asarray(jnp.asarray(a, jnp.bfloat16), np.float64) for name, a in arrays(setting).items()}
    assert_close(run(setting, x, "bfloat16"), oracle(setting, x), "bfloat16")


def test_what_a_row_may_not_see_never_reaches_it(small_blocks):
    """One key has NaN and infinities; rows 20 to 28 see it."""
    setting, spoilt = SETTINGS["window_grouped"], 20
    x, sees = arrays(setting), np.zeros(37, bool)
    sees[spoilt : spoilt + 9] = True
    x["d_out"][:, sees] = 0
    x["d_lse"][:, sees] = 0
    clean = run(setting, x)
    x["k"][:, spoilt, 1, 3], x["v"][:, spoilt, 1, 2], x["v"][:, spoilt, 0, 2] = np.nan, np.inf, -np.inf
    found = run(setting, x)
    for name in ("out", "lse", "q"):
        np.testing.assert_array_equal(found[name][:, ~sees], clean[name][:, ~sees])
    assert not np.isfinite(found["out"][:, sees]).any()
    free = np.r_[0 : spoilt - 8, spoilt + 9 : 37]
    for name in ("k", "v"):
        np.testing.assert_array_equal(found[name][:, free], clean[name][:, free])


def by_distance(scores, at, slope, table, gain):
    """Uses heads, batch rows, distances and columns of tokens; every array has a gradient, by rows or by columns."""
    near = table[at.batch, at.head, jnp.clip(at.query, 0, 7)]
    late = jnp.where(at.k.position[:, None, None, :] > 3, gain[at.key], 0.0) * at.q.frame[:, None, :, None]
    far = slope[at.head] * (at.query - at.key)
    return scores * (1 + 0.1 * jnp.tanh(slope[at.head] * scores)) + near + late + 0.1 * far


def test_functions_on_scores_biases_and_their_gradients(small_blocks):
    """The short windows of some heads leave blocks of the bias unvisited, whose gradient is zero."""
    primal = {name: x.astype(jnp.float32) for name, x in score_tests.inputs().items()}
    primal["bias"] = jnp.asarray(np.random.default_rng(5).normal(size=(1, 4, 21, 27)), jnp.float32)
    mask = masks.causal() & masks.head_windows([2, 5, 9, 30])
    more = dict(mask=mask, primal=primal, soft_cap=2.0, function=by_distance)
    with interpreted():
        found = score_tests.gradients("triton", **more)
    right = score_tests.gradients("reference", **more)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(right), strict=True):
        assert float(jnp.abs(a - b).max()) < 2e-5 * max(float(jnp.abs(b).max()), 1)


def test_dropout(small_blocks):
    rng = np.random.default_rng(0)
    q, k, v = (jnp.asarray(rng.normal(size=(2, 37, n, 8)), jnp.float32) for n in (4, 2, 2))

    def gradients(name):
        def loss(q, k, v):
            out, lse = attention(q, k, v, dropout=0.3, dropout_seed=7, implementation=name)
            return jnp.sum(jnp.sin(out)) + jnp.sum(lse), (out, lse)

        return jax.jit(jax.grad(loss, (0, 1, 2), has_aux=True))(q, k, v)

    with interpreted():
        found = gradients("triton")
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(gradients("reference")), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-6, rtol=2e-5)


# Functions of scores and of numbers of queries and keys; together they use every primitive that a program may hold.
FORMS = {
    "arithmetic": lambda s, i, j: -(s + 2.5) * s / 3 - s / (2 + s * s) + abs(s) + lax.square(s) + (s + 4) ** -3 + s**5,
    "exponentials": lambda s, i, j: jnp.exp(s) + jnp.exp2(s) + jnp.expm1(s) + jnp.log1p(s * s) + jnp.log(s * s + 1),
    "logarithms": lambda s, i, j: jnp.log2(s * s + 1) + jnp.log(s * s + 2),
    "roots": lambda s, i, j: jnp.sqrt(s * s + 1) + lax.rsqrt(s * s + 1) + lax.pow(s * s + 0.5, (i - j) * 0.1),
    "circles": lambda s, i, j: jnp.sin(s) + jnp.cos(s) + jnp.tan(s / 3) + jnp.arctan2(s, 1 + s * s),
    "sigmoids": lambda s, i, j: jnp.tanh(s) + jax.nn.sigmoid(s) + lax.erf(s) + jax.nn.softplus(s) + jax.nn.gelu(s),
    "bounds": lambda s, i, j: lax.max(s, 0.3 + 0 * s) + lax.min(s, (i - j) * 0.1) + lax.clamp(-0.5, s, 0.5),
    "steps": lambda s, i, j: jnp.floor(s) + jnp.ceil(s * 3) + jnp.sign(s) * s + lax.round(s * 2) + jnp.rint(s * 4),
    "remainders": lambda s, i, j: lax.rem(3 * s, 2 + 0 * s)
    + lax.rem(i - j, 4 + 0 * (i - j)) + lax.div(i - j, 3 + 0 * (i - j)),
    "half": lambda s, i, j: jnp.tanh(s.astype(jnp.bfloat16) * 3).astype(jnp.float32) * s + jnp.copy(s),
    "choices": lambda s, i, j: jnp.where((i > j) & (s < 1) | ~((i <= j) ^ (s >= 0.2)) & (i != j), s, 2 * s)
    + jnp.where(i == j + 2, s, 3) + jnp.where(jnp.isfinite(s / s), s, lax.stop_gradient(s)),
    "bits": lambda s, i, j: s * ((i - j & 6) + (i - j | 1) + (~(i - j) ^ i)).astype(jnp.float32),
    "shifts": lambda s, i, j: s
    + ((i - j) << 3) + (((i - j) << ((i ^ j) + 20)) >> 20) + ((i - j) >> 1) + ((i - j) >> ((i ^ j) + 20))
    + lax.shift_right_logical(i - j, 28 + 0 * i) + lax.shift_right_logical(i - j, (i ^ j) + 24) + ((i - j) << 40),
    "constant": lambda s, i, j: jnp.full_like(s, 2.0),
}  # fmt: skip


@triton.jit
def _apply(s_ptr, ds_ptr, words, x_ptr, d_ptr, F: tl.constexpr):
    i, j = tl.arange(0, 16)[:, None], tl.arange(0, 16)[None, :]
    s, ds = tl.load(s_ptr + i * 16 + j), tl.load(ds_ptr + i * 16 + j)
    rows, cols = F.rows(words, 0, 0, i), F.cols(words, 0, 0, j)
    tl.store(x_ptr + i * 16 + j, F.scores(s, rows, cols, None))
    tl.store(d_ptr + i * 16 + j, F.pull(s, ds, rows, cols, None, i != 3)[0])


@functools.cache
def built(name):
    shape, both = (1, 16, 1, 16), sequence(16)
    return program.build(
        shape, shape, mask=masks.everything(), q_tokens=both, k_tokens=both, scale=1.0, soft_cap=0.0, bias=None,
        score_mod=lambda s, at: FORMS[name](s, at.query, at.key), score_arrays=(),
    )  # fmt: skip


@pytest.mark.parametrize("name", FORMS)
def test_printed_functions_do_what_jnp_does(name):
    """The interpreter says whether the values are right, the compiler whether it takes the source."""
    made, streams = built(name)
    rng = np.random.default_rng(1)
    s, ds = (jnp.asarray(rng.normal(size=(16, 16)), jnp.float32) for _ in range(2))

    def printed(s, ds):
        out = 2 * (jax.ShapeDtypeStruct((16, 16), jnp.float32),)
        functions = triton_source.functions(made, streams)
        return _triton.call(_apply, s, ds, triton_source.words(streams), out_shape=out, grid=1, F=functions)

    @jax.jit
    def evaluated(s, ds):
        rows, cols = [x[0, 0][:, None] for x in streams.rows], [x[0, 0] for x in streams.cols]
        out, pull = made.scores_and_pull(s, rows, cols)
        return out, jnp.where(np.arange(16)[:, None] == 3, 0, pull(ds)[0])

    with interpreted():
        found = printed(s, ds)
    for a, b, limit in zip(found, evaluated(s, ds), (2e-6, 1e-5), strict=True):
        limit = 2e-2 if name == "half" else limit
        np.testing.assert_allclose(a, b, rtol=limit, atol=limit)
    with compiling_for("gpu", "NVIDIA H200"):
        assert _triton.ptx(jax.jit(lambda *x: printed(*x)).trace(s, ds).lower(lowering_platforms=("cuda",)))


def test_all_primitives_of_programs_are_printed():
    used = {eqn.primitive.name for name in FORMS for eqn in built(name)[0].change.equations}
    of_later_versions = {name for name in ("log2",) if not hasattr(lax, f"{name}_p")}
    assert used | of_later_versions >= program.ELEMENTWISE, program.ELEMENTWISE - used


def test_primitives_without_a_form_are_named(monkeypatch):
    monkeypatch.delitem(triton_source._FORMATS, "sin")
    made, streams = built("circles")
    with pytest.raises(NotImplementedError, match="'sin' has no form in Triton"):
        triton_source.functions(made, streams)


@pytest.mark.parametrize(
    "kind, mma, kernels",
    [("NVIDIA H200", "wgmma", ["_forward", "_backward_q", "_backward_kv"]), ("NVIDIA A100", "mma.sync", ["_forward"])],
)
def test_compiled_without_a_gpu(kind, mma, kernels):
    """Tensor cores in every kernel, asynchronous copies into stages, nothing atomic, PTX that CUDA 12 can assemble."""
    q, k = (jax.ShapeDtypeStruct((2, 1000, heads, 128), jnp.bfloat16) for heads in (4, 2))
    slope = np.float32([0.1, 0.2, 0.4, 0.8])

    def loss(q, k, v):
        function = None if kernels == ["_forward"] else lambda s, at: s - jnp.asarray(slope)[at.head] * at.key
        out, lse = attention(q, k, v, score_mod=function, implementation="triton")
        return out.astype(jnp.float32).sum() + lse.sum()

    with compiling_for("gpu", kind):
        function = loss if kernels == ["_forward"] else jax.grad(loss, (0, 1, 2))
        texts = _triton.ptx(jax.jit(function).trace(q, k, k).lower(lowering_platforms=("cuda",)))
    assert [re.search(r"\.entry (\w+)", text)[1] for text in texts] == kernels
    for text in texts:
        assert mma in text and "cp.async" in text and not re.search(r"\b(atom|red)\.", text)
        assert float(re.search(r"\.version (\S+)", text)[1]) < 9


@pytest.mark.parametrize("batch, length", [(0, 16), (1, 1)])
def test_empty_and_single(batch, length):
    q = jnp.ones((batch, length, 2, 8))
    with interpreted():
        gradient = jax.grad(lambda q: sum(map(jnp.sum, attention(q, q, q, implementation="triton"))))(q)
    assert gradient.shape == q.shape and bool(jnp.isfinite(gradient).all())
