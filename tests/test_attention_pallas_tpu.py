"""The attention kernels of TPU, interpreted: against the float64 oracle, or the reference where functions on scores,
windows by head or dropout are concerned; their lists and sizes; and all of it lowered for a TPU."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import test_attention_scores as score_tests
from attention_oracle import CAUSAL, Setting, arrays, oracle, tokens
from jax._src.pallas.mosaic.interpret import interpret_pallas_call  # The only way to ask for races.
from jax.experimental.pallas import tpu as pltpu
from test_attention_op import assert_close

from kernels.attention import attention, masks
from kernels.attention import pallas_tpu as kernel
from kernels.attention import pallas_tpu_backward as backward
from kernels.attention import pallas_tpu_blocks as blocks
from kernels.attention import pallas_tpu_forward as forward
from kernels.attention import pallas_tpu_sizes as sizes
from kernels.attention.fused import Sizes
from kernels.platform import compiling_for, interpreted
from kernels.tokens import packed

SETTINGS = {
    "window_grouped": Setting((37, 37, 4, 2, 8, 8), CAUSAL & masks.sliding_window(9)),
    "everything": Setting((32, 64, 2, 2, 8, 8), masks.everything()),
    "fewer_keys": Setting((56, 21, 2, 2, 8, 20)),  # The first block of queries has no live block.
    "all_at_once": Setting(
        (42, 42, 2, 1, 8, 12), CAUSAL & masks.segments() & masks.valid(), packed=True, soft_cap=2.0, sinks=True
    ),
    "decode": Setting((1, 41, 4, 2, 8, 8), scale=-0.7),
    "nothing": Setting((17, 17, 2, 2, 8, 8), ~masks.everything()),
}


PARAMETERS = pltpu.InterpretParams(detect_races=True, uninitialized_memory="nan")


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Blocks far below the least that a TPU takes; and XLA compiles the interpreted kernels in half the time."""
    monkeypatch.setattr(kernel, "chosen", lambda q, k, v, dtype: Sizes((16, 32), (32, 16)))
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture
def in_halves(monkeypatch):
    """Every block is worked on in two parts."""
    for module in (forward, backward):
        monkeypatch.setattr(module, "part_of", lambda keys: keys // 2)


@functools.cache
def compiled(setting):
    q_tokens, k_tokens = tokens(setting)
    more = dict(mask=setting.mask, q_tokens=q_tokens, k_tokens=k_tokens, soft_cap=setting.soft_cap, scale=setting.scale)

    @jax.jit
    def forward_and_gradients(primal, d_out, d_lse):
        (out, lse), pull = jax.vjp(lambda primal: attention(**primal, **more, implementation="pallas_tpu"), primal)
        return {"out": out, "lse": lse, **pull((d_out.astype(out.dtype), d_lse))[0]}

    return forward_and_gradients


def run(setting, x, dtype="float32"):
    primal = {name: jnp.asarray(a, dtype) for name, a in x.items() if name[:2] != "d_"}
    with interpreted():
        found = compiled(setting)(primal, *(jnp.asarray(x[name], jnp.float32) for name in ("d_out", "d_lse")))
    return {name: np.asarray(a, np.float64) for name, a in found.items()}


@pytest.mark.parametrize("name", SETTINGS)
def test_it_agrees_with_the_oracle(name):
    """And twice with the same bits."""
    x = arrays(SETTINGS[name])
    found = run(SETTINGS[name], x)
    assert_close(found, oracle(SETTINGS[name], x))
    jax.tree.map(np.testing.assert_array_equal, run(SETTINGS[name], x), found)


def test_bfloat16(in_halves):
    setting = SETTINGS["window_grouped"]
    x = {name: np.asarray(jnp.asarray(a, jnp.bfloat16), np.float64) for name, a in arrays(setting).items()}
    assert_close(run(setting, x, "bfloat16"), oracle(setting, x), "bfloat16")


def test_what_a_row_may_not_see_never_reaches_it():
    """One key has NaN and infinities; rows 20 to 28 see it, and what they receive is not finite either."""
    setting, spoilt = SETTINGS["window_grouped"], 20
    x, sees = arrays(setting), np.zeros(37, bool)
    sees[spoilt : spoilt + 9] = True
    x["d_out"][:, sees] = 0
    x["d_lse"][:, sees] = 0
    clean = run(setting, x)
    x["k"][:, spoilt, 1, 3], x["v"][:, spoilt, 1, 2], x["v"][:, spoilt, 0, 2] = np.nan, np.inf, -np.inf
    x["d_out"][:, sees] = np.nan
    found = run(setting, x)
    for name in ("out", "lse", "q"):
        np.testing.assert_array_equal(found[name][:, ~sees], clean[name][:, ~sees])
    assert not np.isfinite(found["out"][:, sees]).any()
    free = np.r_[0 : spoilt - 8, spoilt + 9 : 37]
    for name in ("k", "v"):
        np.testing.assert_array_equal(found[name][:, free], clean[name][:, free])


def by_distance(scores, at, slope, table, gain, least=0):
    """Uses heads, batch rows, distances and columns of tokens; every array has a gradient, by rows or by columns.

    The root's derivative is infinite where a causal mask forbids; the reference, differentiated by JAX, needs least=1.
    """
    near = table[at.batch, at.head, jnp.clip(at.query, 0, 7)]
    late = jnp.where(at.k.position[:, None, None, :] > 3, gain[at.key], 0.0) * at.q.frame[:, None, :, None]
    far = slope[at.head] * (at.query - at.key)
    root = jnp.sqrt(slope[at.head] ** 2 * jnp.maximum(at.query + 7 - at.key, least))
    return scores * (1 + 0.1 * jnp.tanh(slope[at.head] * scores)) + near + late + 0.1 * far + root


def same_as_reference(mask, primal, function=None, reference=None, **more):
    primal = {name: x.astype(jnp.float32) for name, x in primal.items()}
    with interpreted():
        found = score_tests.gradients("pallas_tpu", mask, primal, function=function, **more)
    right = score_tests.gradients("reference", mask, primal, function=reference, **more)
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(found), jax.tree.leaves(right), strict=True):
        np.testing.assert_allclose(
            a, b, rtol=0, atol=2e-5 * max(float(jnp.abs(b).max()), 1), err_msg=jax.tree_util.keystr(path)
        )


def test_functions_on_scores_biases_and_their_gradients(in_halves):
    """The short windows of some heads leave blocks of the bias unvisited, whose gradient is zero."""
    primal = score_tests.inputs() | {"bias": jnp.asarray(np.random.default_rng(5).normal(size=(1, 4, 21, 27)))}
    safe = functools.partial(by_distance, least=1)
    same_as_reference(score_tests.MASKS["window"], primal, by_distance, safe, soft_cap=2.0)


@pytest.mark.parametrize("way", ["chunks", "parts"])
def test_windows_by_head_and_lists_too_long_at_once(monkeypatch, way):
    """Query heads that share a key head have lists of their own: queries in chunks, or rows and heads one by one."""
    monkeypatch.setattr(kernel, "chosen", lambda q, k, v, dtype: Sizes((8, 16), (8, 16)))
    primal, mask = score_tests.inputs(), CAUSAL & masks.head_windows([2, 30, 3, 9], 1)
    bias = (1, 4, 1, 27) if way == "chunks" else (1, 4, 21, 27)
    primal["bias"] = jnp.asarray(np.random.default_rng(1).normal(size=bias))
    if way == "chunks":
        monkeypatch.setattr(backward, "folding", lambda group, count, width, block_q: (group, 2))
    else:  # The lists are traced, each row its own.
        monkeypatch.setattr(backward, "folding", lambda group, count, width, block_q: (1, count))
        monkeypatch.setattr(blocks, "SCALARS", 8)
        both = packed(jnp.asarray(np.repeat([[1, 1, 2], [1, 2, 2]], 9, axis=1)))
        monkeypatch.setattr(score_tests, "both_tokens", lambda: (both.map(lambda column: column[:, 6:]), both))
        mask = mask & masks.segments()
    same_as_reference(mask, primal)


def test_dropout():
    rng = np.random.default_rng(0)
    q, k, v = (jnp.asarray(rng.normal(size=(2, 37, n, 8)), jnp.float32) for n in (4, 2, 2))

    def gradients(name):
        def loss(q, k, v):
            out, lse = attention(q, k, v, dropout=0.3, dropout_seed=7, implementation=name)
            return jnp.sum(jnp.sin(out)) + jnp.sum(lse), (out, lse)

        return jax.jit(jax.grad(loss, (0, 1, 2), has_aux=True))(q, k, v)

    with interpreted():
        found = gradients("pallas_tpu")
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(gradients("reference")), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-6, rtol=2e-5)


def test_memory_of_a_tpu_is_read_only_once_written(monkeypatch):
    """The interpreter that simulates a TPU's memory, full of NaN at first, and looks for races.

    The first keys are seen by no one, and there the bias has a gradient too, of zero.
    """
    monkeypatch.setattr(kernel, "chosen", lambda q, k, v, dtype: Sizes((8, 8), (16, 8)))
    rng = np.random.default_rng(4)
    shapes = (1, 16, 2, 4), (1, 32, 1, 4), (1, 32, 1, 4), (1, 1, 16, 32)
    primal = [jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in shapes]

    def gradients(name):
        def loss(q, k, v, bias):
            mask = CAUSAL & masks.sliding_window(2)
            out, lse = attention(q, k, v, bias=bias, mask=mask, implementation=name)
            return jnp.sum(jnp.sin(out)) + jnp.sum(lse)

        return jax.jit(jax.grad(loss, (0, 1, 2, 3)))(*primal)

    with interpreted(), pltpu.force_tpu_interpret_mode(PARAMETERS):
        found = gradients("pallas_tpu")
    assert not interpret_pallas_call.races.races_found
    for a, b in zip(found, gradients("reference"), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-6, rtol=2e-5)


def test_steps():
    """Two lists: (blocks 1, 0 full), none, (2); and (0), (3), none."""
    order = np.array([[[[1, 0], [0, 0], [2, 2]], [[0, 0], [3, 3], [0, 0]]]], np.int32)
    live, full = np.array([[[2, 0, 1], [1, 1, 0]]]), np.array([[[2, 0, 0], [0, 1, 0]]])
    place = np.arange(2)
    inputs = order, place < live[..., None], place < full[..., None]
    known = blocks.steps(*inputs)
    traced = jax.jit(lambda *x: [y := blocks.steps(*x), y.entries, y.count][1:])(*inputs)
    assert known.count == traced[1] == 4 and known.kinds == {True, False}
    np.testing.assert_array_equal(traced[0][..., :4], known.entries)
    first, last, live, full = blocks.FIRST, blocks.LAST, blocks.LIVE, blocks.FULL
    expected = [
        [(0, 1, first + live + full), (0, 0, last + live + full), (1, 0, first + last), (2, 2, first + last + live)],
        [(0, 0, first + last + live), (1, 3, first + last + live + full), (2, 0, first + last), (2, 0, 0)],
    ]
    found = [[(int(blocks.outer(e)), int(blocks.inner(e)), int(e) & 15) for e in row] for row in known.entries[0]]
    assert found == expected


@pytest.mark.parametrize("kind", ["TPU v4", "TPU v5 lite", "TPU v5", "TPU v6 lite"])
def test_blocks_fit_in_vmem(kind):
    """Blocks are whole tiles, cover the sequence with less than a tile to spare each, and fit, fold included."""
    with compiling_for("tpu", kind):
        for length in (1, 100, 129, 1025, 4096, 32769):
            for width, value in ((64, 64), (128, 128), (192, 128), (256, 256), (576, 512)):
                for dtype in (jnp.bfloat16, jnp.float32):
                    shapes = (1, length, 8, width), (1, length, 2, width), (1, length, 2, value)
                    both = sizes.chosen(*shapes, dtype)
                    for block_q, block_k in both:
                        assert block_k % 128 == 0 and (block_q % 128 == 0 or block_q % 16 == 0 and block_q >= length)
                        assert all(-(-length // n) * n < length + 128 * -(-length // n) for n in (block_q, block_k))
                    itemsize = jnp.dtype(dtype).itemsize
                    assert sizes.forward_bytes(*both.forward, width, value, itemsize) <= sizes.vmem_limit()
                    count = -(-length // both.backward[0])
                    fold, chunk = sizes.folding(4, count, width, both.backward[0])
                    used = sizes.backward_bytes(*both.backward, width, value, itemsize, fold * chunk)
                    assert used <= sizes.vmem_limit() and 4 % fold == 0 and 1 <= chunk <= count


@pytest.mark.parametrize(
    "width, value, dtype", [(64, 64, "bfloat16"), (80, 80, "float32"), (192, 128, "bfloat16"), (256, 256, "bfloat16")]
)
def test_it_lowers_for_a_tpu(monkeypatch, width, value, dtype):
    monkeypatch.undo()

    def loss(q, k, v, bias):
        out, lse = attention(q, k, v, bias=bias if value == width else None, dropout=0.1, implementation="pallas_tpu")
        return jnp.sum(out.astype(jnp.float32)) + jnp.sum(lse)

    shapes = [(1, 1300, 4, width), (1, 1300, 2, width), (1, 1300, 2, value)]
    primal = [jax.ShapeDtypeStruct(shape, dtype) for shape in shapes]
    bias = jax.ShapeDtypeStruct((1, 4, 1, 1300), jnp.float32)
    with compiling_for("tpu", "TPU v5e"):
        gradients = jax.jit(jax.grad(loss, (0, 1, 2, 3)))
        text = gradients.trace(*primal, bias).lower(lowering_platforms=("tpu",)).as_text()
    assert text.count("tpu_custom_call") >= 2
