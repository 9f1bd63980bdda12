"""The ragged layer as a loop over tiles of rows, each of one group: for CPU, where XLA computes every row times every
matrix of a `ragged_dot`.

The loop runs as often as there are tiles, which only the sizes of the groups tell: a group costs what its own rows do,
however uneven groups are. Each turn is a dense layer (`kernels.linear`) with that layer's own backward pass.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from kernels.linear.xla import linear_cpu
from kernels.varying import alike

SMALLEST, LARGEST = 16, 256  # Rows of a tile; between them about half to all of an average group.


@jax.custom_vjp
def ragged(x: Float[Array, "R I"], w: Float[Array, "N I O"], sizes: Int[Array, " N"]) -> Float[Array, "R O"]:
    """Row r times the matrix of its group; 0 where no group holds r."""
    wide = jnp.promote_types(x.dtype, jnp.float32)
    narrow = w.astype(x.dtype)

    def tile(out: Array, own: Bool[Array, "t 1"], start: Array, group: Array) -> Array:
        before = _rows(out, start, own)
        y = linear_cpu(_rows(x, start, own), narrow[group]).astype(out.dtype)
        return lax.dynamic_update_slice_in_dim(out, jnp.where(own, y, before), start, 0)

    # Wide, because in bfloat16 the compiler copies all of what is written to, tile by tile.
    return _over_tiles(tile, jnp.zeros((x.shape[0], w.shape[2]), wide), x, w, sizes).astype(x.dtype)


def _forward(x, w, sizes):
    return ragged(x, w, sizes), (x, w, sizes)


def _backward(saved, dy):
    x, w, sizes = saved
    return ragged(dy, jnp.swapaxes(w, 1, 2), sizes), outer(x, dy, sizes, w.dtype), None


ragged.defvjp(_forward, _backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def outer(
    x: Float[Array, "R I"], y: Float[Array, "R O"], sizes: Int[Array, " N"], dtype: jax.typing.DTypeLike
) -> Float[Array, "N I O"]:
    """For each group the sum over its rows of x^T y."""
    wide = jnp.promote_types(x.dtype, jnp.float32)

    def tile(sums: Array, own: Bool[Array, "t 1"], start: Array, group: Array) -> Array:
        rows, cotangents = (jnp.where(own, _rows(a, start, own), 0) for a in (x, y))
        _, pull = jax.vjp(lambda w: linear_cpu(rows, w), jnp.zeros(sums.shape[1:], wide))
        return sums.at[group].add(*pull(cotangents))

    sums = jnp.zeros((sizes.shape[0], x.shape[1], y.shape[1]), wide)
    return _over_tiles(tile, sums, x, y, sizes).astype(dtype)


def _outer_forward(x, y, sizes, dtype):
    return outer(x, y, sizes, dtype), (x, y, sizes)


def _outer_backward(dtype, saved, dw):
    x, y, sizes = saved
    return ragged(y, jnp.swapaxes(dw, 1, 2), sizes), ragged(x, dw, sizes), None


outer.defvjp(_outer_forward, _outer_backward)


def _over_tiles(tile: Callable, carry: Array, a: Array, b: Array, sizes: Int[Array, " N"]) -> Array:
    """`tile(carry, which rows count, first row, group)` for every tile of every group, in order.

    The last tile of the array is moved up to end with it; rows that its predecessor has done do not count again.
    """
    rows = a.shape[0]
    if not rows:
        return carry
    size = tile_rows(rows, sizes.shape[0])
    ends = jnp.cumsum(sizes)
    tiles = -(-sizes // size)
    last = jnp.cumsum(tiles)

    def turn(i: Array, carry: Array) -> Array:
        group = jnp.searchsorted(last, i, side="right", method="compare_all")
        first = ends[group] - sizes[group] + (i - (last - tiles)[group]) * size
        start = jnp.minimum(first, rows - size)
        places = start + jnp.arange(size)
        own = (places >= first) & (places < ends[group])
        return tile(carry, own[:, None], start, group)

    return lax.fori_loop(0, last[-1], turn, alike(carry, a, b, sizes))


def tile_rows(rows: int, groups: int) -> int:
    """Rows of a tile: a power of two up to those of an average group."""
    return min(rows, LARGEST, max(SMALLEST, 1 << (rows // groups).bit_length() - 1 if rows >= groups else 0))


def _rows(a: Array, start: Array, own: Bool[Array, "t 1"]) -> Array:
    return lax.dynamic_slice_in_dim(a, start, own.shape[0])
