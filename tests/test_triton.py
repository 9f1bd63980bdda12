"""Triton's door: the same kernels interpreted on NumPy and compiled for a GPU that is not there."""

import re
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import triton
import triton.language as tl
from jax.sharding import AxisType, PartitionSpec
from triton.language.extra.cuda import libdevice

from kernels import _triton
from kernels.platform import compiling_for, interpreted

BLOCK = 16


@triton.jit
def _bend(x, SHIFT: tl.constexpr):
    return libdevice.tanh(x) + SHIFT


@triton.jit
def _product(
    a_ptr,
    b_ptr,
    live_ptr,
    scale,
    o_ptr,
    m_ptr,
    K: tl.constexpr,
    N: tl.constexpr,
    BLOCK: tl.constexpr,
    BEND: tl.constexpr,
):
    """bend(scale * a @ b) over the first live blocks of a's columns, and the sum of maximum and sum of every row."""
    rows = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inner, cols = tl.arange(0, BLOCK), tl.arange(0, N)
    acc = tl.zeros((BLOCK, N), tl.float32)
    for j in range(tl.load(live_ptr + tl.program_id(0))):
        a = tl.load(a_ptr + rows[:, None] * K + (j * BLOCK + inner)[None, :])
        b = tl.load(b_ptr + (j * BLOCK + inner)[:, None] * N + cols[None, :])
        acc = tl.dot(a, b, acc, input_precision="ieee")
    acc = BEND(acc * scale, 1.0)
    tl.store(o_ptr + rows[:, None] * N + cols[None, :], acc.to(o_ptr.dtype.element_ty))
    tl.store(m_ptr + rows, tl.max(acc, 1) + tl.sum(acc, 1))


@triton.jit
def _copy(x_ptr, o_ptr, LOADED: tl.constexpr, WRITTEN: tl.constexpr):
    at = tl.arange(0, 16)
    x = tl.load(x_ptr + at, mask=at < LOADED)
    tl.store(o_ptr + at, x.to(o_ptr.dtype.element_ty), mask=at < WRITTEN)


def product(a: jax.Array, b: jax.Array, live: jax.Array) -> tuple[jax.Array, jax.Array]:
    rows, inner = a.shape
    shapes = jax.ShapeDtypeStruct((rows, b.shape[1]), a.dtype), jax.ShapeDtypeStruct((rows,), jnp.float32)
    grid, sizes = (rows // BLOCK,), {"K": inner, "N": b.shape[1], "BLOCK": BLOCK}
    return _triton.call(_product, a, b, live, 0.5, out_shape=shapes, grid=grid, **sizes, BEND=_bend)


def copy(x: jax.Array, dtype: str, loaded: int = 16, written: int = 16, size: int = 16) -> np.ndarray:
    shape = jax.ShapeDtypeStruct((size,), dtype)
    with interpreted():
        return np.asarray(_triton.call(_copy, x, out_shape=shape, grid=1, LOADED=loaded, WRITTEN=written))


def operands(dtype: str) -> tuple[jax.Array, jax.Array, jax.Array]:
    rng = np.random.default_rng(0)
    a, b = rng.standard_normal((2 * BLOCK, 2 * BLOCK)), rng.standard_normal((2 * BLOCK, 32))
    return jnp.asarray(a * 0.3, dtype), jnp.asarray(b, dtype), jnp.array([2, 1], jnp.int32)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_interpreted_kernel_against_numpy(dtype):
    a, b, live = operands(dtype)
    with interpreted():
        out, reduced = jax.jit(lambda *x: product(*x))(a, b, live)
    wide = np.asarray(a, np.float64)
    wide[BLOCK:, BLOCK:] = 0  # The second row of blocks has one live block.
    expected = np.tanh(0.5 * wide @ np.asarray(b, np.float64)) + 1
    assert out.dtype == a.dtype and reduced.dtype == jnp.float32
    np.testing.assert_allclose(np.asarray(out, np.float64), expected, atol=jnp.finfo(dtype).eps * 2)
    np.testing.assert_allclose(reduced, expected.max(1) + expected.sum(1), rtol=1e-5)


@pytest.mark.parametrize(
    ("kind", "target"), [("NVIDIA H200", "sm_90"), ("NVIDIA A100-SXM4-80GB", "sm_80"), ("", "sm_90")]
)
def test_compiled_without_a_gpu(kind, target):
    with interpreted():  # What the interpreter puts in Triton's place must be gone again.
        product(*operands("bfloat16"))
    with compiling_for("gpu", kind):
        lowered = jax.jit(lambda *x: product(*x)).trace(*operands("bfloat16")).lower(lowering_platforms=("cuda",))
    (text,) = _triton.ptx(lowered)
    assert float(re.search(r"\.version (\S+)", text)[1]) < 9  # Later ones are not for CUDA 12.
    assert f".target {target}" in text and ".entry _product(" in text and "mma" in text and text.endswith("}\n")


def test_bfloat16_is_rounded_to_nearest():
    x = np.float32([1, 1 + 2**-8, 1 + 3 * 2**-8, -1 - 5 * 2**-9, 3e38, np.inf, np.nan, 0] * 2)
    rounded = jnp.asarray(x).astype(jnp.bfloat16)
    expected = np.asarray(rounded, np.float32)
    np.testing.assert_array_equal(copy(jnp.asarray(x), "bfloat16").astype(np.float32), expected)
    np.testing.assert_array_equal(copy(rounded, "float32"), expected)


def test_memory_that_nobody_wrote_is_seen():
    x = jnp.arange(16.0)
    np.testing.assert_array_equal(np.isnan(copy(x, "float32", written=9)), np.arange(16) >= 9)
    np.testing.assert_array_equal(np.isnan(copy(x, "float32", loaded=5)), np.arange(16) >= 5)
    assert (copy(x.astype(jnp.int32), "int32", written=9)[9:] == np.iinfo(np.int32).min).all()


@pytest.mark.parametrize(("given", "size"), [(12, 16), (16, 12)])
def test_access_outside_of_a_buffer_is_refused(given, size):
    with pytest.raises(Exception, match="outside of the kernel's buffers"):
        copy(jnp.zeros(given), "float32", size=size)


def test_over_devices():
    a, b, live = operands("float32")
    mesh = jax.make_mesh((2,), ("rows",), axis_types=(AxisType.Auto,))
    rows = PartitionSpec("rows")
    sharded = jax.shard_map(product, mesh=mesh, in_specs=(rows, PartitionSpec(), rows), out_specs=(rows, rows))
    with interpreted():
        found, whole = jax.jit(sharded)(a, b, live), product(a, b, live)
    for x, y in zip(found, whole, strict=True):
        np.testing.assert_array_equal(x, y)


def test_empty_grid_launches_nothing():
    with interpreted():
        out, reduced = product(jnp.zeros((0, BLOCK)), jnp.zeros((BLOCK, 32)), jnp.zeros(0, jnp.int32))
    assert out.shape == (0, 32) and reduced.shape == (0,)


def test_missing_packages_are_named(monkeypatch):
    assert _triton.available() is None
    monkeypatch.setitem(sys.modules, "jax_triton", None)
    assert "tessera[gpu]" in _triton.available.__wrapped__()
