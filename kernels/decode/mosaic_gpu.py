"""Decode attention on Hopper GPUs (Pallas Mosaic GPU): TMA brings the cache, tensor cores do both products.

A block of the grid holds up to 64 rows (query heads of one key/value head times queries) and walks over its share of
the row's live blocks of keys: first those that every query sees whole, then the few at the borders, with a mask. One
warpgroup does nothing but copy, so that memory is always busy. Values wider than 256 are split between two computing
warpgroups, each of which makes all the scores for its half of the columns (half of a 64 x 512 output fills its
registers). Values that are columns of the keys are read from the tile that the keys are in. Tiles of more than 64 rows
lie side by side in the grid and read the cache through L2.

Pages of 8, 16 or 32 places are copied one by one into a block; a larger page holds whole blocks.
"""

import dataclasses
import functools
import math
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Float

from kernels import _compat
from kernels import _mosaic_gpu as hopper
from kernels._mosaic_gpu import COL, ROW, TILE, Products, Ring
from kernels.decode import limits, schedule
from kernels.decode.call import Call, Inputs
from kernels.decode.combine import combine
from kernels.platform import device_kind, interpreting
from kernels.varying import result

_ROWS = 64
_LOG2E, _LN2 = math.log2(math.e), math.log(2)


def decode(call: Call, inputs: Inputs) -> tuple[Float[Array, "B T H Dv"], Float[Array, "B T H"]]:
    """As `kernels.decode.decode_attention`."""
    q, k, v, table, lengths, starts, sinks = inputs
    (batch, queries, heads, width), kv_heads = q.shape, k.shape[2]
    page = 0 if table is None else k.shape[1]
    sizes = limits.hopper_sizes(width, call.value_width, v is None, page)
    assert sizes is not None  # `limits.mosaic_gpu`.
    if table is None and inputs.slots < sizes.block:
        k, v = (x if x is None else _padded(x, 1, sizes.block) for x in (k, v))
    count = queries * heads // kv_heads
    tiles = -(-count // _ROWS)
    splits = call.splits
    if splits is None:
        blocks = -(-inputs.slots // sizes.block)
        splits = schedule.choose_splits(batch * kv_heads * tiles, blocks, schedule.units(device_kind()))

    def packed(x: Array) -> Array:
        """[B, T, H, ...] to [B, Hk, rows, ...]."""
        x = x.reshape(*x.shape[:2], kv_heads, -1, *x.shape[3:]).swapaxes(1, 2)
        return _padded(x.reshape(x.shape[0], kv_heads, count, *x.shape[4:]), 2, tiles * _ROWS)

    sink = jnp.full((heads,), -jnp.inf, jnp.float32) if sinks is None else sinks.astype(jnp.float32) * _LOG2E
    sink = packed(jnp.broadcast_to(sink, (1, queries, heads)))[0]
    query = np.arange(tiles * _ROWS, dtype=np.int32) // (heads // kv_heads)
    arrays = (packed(q), k, v, table, lengths, starts, sink, jnp.minimum(jnp.asarray(query), queries - 1))
    call = dataclasses.replace(call, splits=splits)
    kernel = functools.partial(
        _kernel, call=call, sizes=sizes, queries=queries, slots=inputs.slots, page=page, interpret=interpreting()
    )
    columns = call.value_width // sizes.groups
    slot_tiles = [hopper.tile(sizes.stages, sizes.block, width, dtype=q.dtype)]
    if v is not None:
        slot_tiles.append(hopper.tile(sizes.stages, sizes.block, call.value_width, dtype=q.dtype))
    _, *barriers = Ring.scratch(sizes.stages, sizes.groups, *slot_tiles, pieces=sizes.pieces)
    out_dtype = q.dtype if splits == 1 else jnp.float32
    per_row = 128 // jnp.dtype(out_dtype).itemsize
    out_tile = plgpu.SMEM(
        (sizes.groups, _ROWS, columns),
        out_dtype,
        transforms=(plgpu.TilingTransform((8, per_row)), plgpu.SwizzleTransform(128)),
    )
    shape = (batch, kv_heads, splits, tiles * _ROWS)
    out, lse = hopper.launch(
        kernel,
        arrays,
        out_type=(result((*shape, call.value_width), out_dtype, q, k), result(shape, jnp.float32, q, k)),
        scratch=(
            plgpu.RefUnion(
                (hopper.tile(_ROWS, width, dtype=q.dtype), tuple(slot_tiles)),
                (out_tile, plgpu.SMEM((_ROWS,), jnp.float32)),
            ),
            tuple(barriers),
            plgpu.Barrier(),
            plgpu.Barrier(num_arrivals=sizes.groups),
            plgpu.SMEM((sizes.groups, sizes.block), jnp.float32),
            hopper.tile(sizes.groups, _ROWS, sizes.block, dtype=q.dtype) if interpreting() else None,
        ),
        grid={"batch": batch, "split": splits, "head": kv_heads, "tile": tiles},
        groups=sizes.groups,
        interpret=interpreting(),
        approximate=True,
    )
    out, lse = out[:, :, :, :count], lse[:, :, :, :count]
    out, lse = combine(out, lse, axis=2) if splits > 1 else (out[:, :, 0], lse[:, :, 0])
    out, lse = (x.reshape(batch, kv_heads, queries, -1, *x.shape[3:]).swapaxes(1, 2) for x in (out, lse))
    out, lse = (x.reshape(batch, queries, heads, *x.shape[4:]) for x in (out, lse))
    return out.astype(q.dtype), lse


def _kernel(
    q_ref: Any, k_ref: Any, v_ref: Any, table_ref: Any, lengths_ref: Any, starts_ref: Any, sink_ref: Any,
    query_ref: Any, out_ref: Any, lse_ref: Any, shared: Any, barriers: Any, loaded: Any, together: Any, spoilt: Any,
    spare: Any, *, call: Call, sizes: limits.HopperSizes, queries: int, slots: int, page: int, interpret: bool,
) -> None:  # fmt: skip
    """Output and lse of a tile of rows of one key/value head over one part of the cache's live blocks."""
    (q_tile, slot_refs), (out_tiles, lse_row) = shared
    ring, products, block = Ring(slot_refs, *barriers), Products(interpret), sizes.block
    group, row, split, head, tile = (lax.axis_index(name) for name in ("group", "batch", "split", "head", "tile"))
    columns, splits, window, soft_cap = out_tiles.shape[2], call.splits, call.window, call.soft_cap
    rows = pl.ds(tile * _ROWS, _ROWS)

    # What is live of this row of the batch, and what of that every query sees whole; see `schedule`.
    after = lengths_ref[row] - queries + 1  # Of query 0, which sees its own place.
    start = jnp.maximum(starts_ref[row], 0)
    begin = jnp.maximum(start, after - window) if window else start
    inner_begin = jnp.maximum(start, after + queries - 1 - window) if window else start
    end = jnp.clip(after + queries - 1, 0, slots)
    inner_end = jnp.clip(after, 0, slots)
    live = jnp.where(end > begin, _over(end, block) - lax.div(begin, block), 0)
    each = _over(live, splits)
    low = lax.div(begin, block) + split * each
    high = jnp.maximum(jnp.minimum(low + each, lax.div(begin, block) + live), low)
    inner_low = jnp.clip(_over(inner_begin, block), low, high)
    inner_high = jnp.clip(lax.div(inner_end, block), inner_low, high)
    inner, steps = inner_high - inner_low, high - low

    def first_place(step: Any) -> Any:
        """Of the block of a step: the inner ones first, then those before and behind them."""
        border = low + step - inner
        border = jnp.where(border < inner_low, border, border + inner)
        return jnp.where(step < inner, inner_low + step, border) * block

    def in_cache(first: Any) -> Any:
        """Where a block is read from: the last of a contiguous cache may begin in the block before."""
        return first if page else jnp.minimum(first, k_ref.shape[1] - block)

    @pl.when(group < sizes.groups)
    def _() -> None:
        hopper.more_registers(sizes.groups)
        own = pl.ds(pl.multiple_of(group * columns, 64) if sizes.groups > 1 else 0, columns)

        @pl.when(group == 0)
        def _() -> None:
            plgpu.copy_gmem_to_smem(q_ref.at[row, head, rows], q_tile, loaded)

        query = _compat.load(query_ref.at[rows], ROW)
        first = jnp.maximum(after + query - window, start) if window else query * 0 + start
        last = jnp.minimum(after + query, slots)
        # A sink is a key of value 0, seen by the first part.
        top = jnp.where(split == 0, _compat.load(sink_ref.at[head, rows], ROW), -jnp.inf)
        total = jnp.where(top == -jnp.inf, 0.0, 1.0)
        acc = plgpu.layout_cast(jnp.zeros((_ROWS, columns), jnp.float32), TILE)
        plgpu.barrier_wait(loaded)

        def wait_for_each_other() -> None:
            if sizes.groups > 1:
                plgpu.barrier_arrive(together)
                plgpu.barrier_wait(together)

        def clean(v_tile: Any) -> Array:
            """Makes what is no number 0, since 0 times it is not, and tells the keys [block] that had any."""
            for part in range(0, block, 64):
                bad = plgpu.layout_cast(jnp.zeros((64,), jnp.float32), ROW)
                for column in range(0, columns, 64):
                    piece = v_tile.at[pl.ds(part, 64), pl.ds(column, 64)]
                    x = _compat.load(piece, TILE).astype(jnp.float32)
                    sound = abs(x) < jnp.inf
                    bad = jnp.maximum(bad, jnp.where(sound, 0.0, 1.0).max(axis=1))
                    piece[...] = jnp.where(sound, x, 0.0).astype(q_tile.dtype)
                spoilt.at[group, pl.ds(part, 64)][...] = bad
            plgpu.commit_smem()
            return _compat.load(spoilt.at[group], COL)

        def visit(step: Any, carry: Any, border: bool) -> Any:
            acc, top, total = carry
            ring.wait(step)
            k_tile, *v_tile = ring.at(step)

            def scores(ref: Any) -> Array:
                products.start(ref, q_tile, k_tile.T)
                return ref[...]

            s = pl.run_scoped(scores, plgpu.ACC((_ROWS, block), jnp.float32))
            if soft_cap:  # tanh x = 1 - 2 / (exp(2 x) + 1).
                s = soft_cap * _LOG2E * (1 - 2 / (jnp.exp2(s * (2 * call.scale / soft_cap * _LOG2E)) + 1))
            else:
                s *= call.scale * _LOG2E
            values = (v_tile or [k_tile])[0].at[:, own]
            if border:
                here = first_place(step)
                place = plgpu.layout_cast(lax.broadcasted_iota(jnp.int32, s.shape, 1), TILE) + in_cache(here)
                allowed = (place >= _wide(jnp.maximum(first, here))) & (place < _wide(last))
                s = jnp.where(allowed, s, -jnp.inf)
                if not v_tile:
                    wait_for_each_other()  # Both have read the keys.
                bad = lax.broadcast_in_dim(clean(values), s.shape, [1])
            higher = jnp.maximum(top, s.max(axis=1))
            level = jnp.where(higher == -jnp.inf, 0.0, higher)
            p = jnp.exp2(s - _wide(level))
            fade = jnp.exp2(top - level)
            total = fade * total + p.sum(axis=1)
            if border:
                p = jnp.where(allowed & (bad > 0), jnp.nan, p)
            weights = p.astype(q_tile.dtype)
            mine = spare.at[group] if interpret else None
            acc *= lax.broadcast_in_dim(fade, acc.shape, [0])
            (acc,) = products.add([acc], [(lambda: weights, values)], mine)
            ring.release(step)
            return acc, higher, total

        def _wide(x: Array) -> Array:
            return lax.broadcast_in_dim(x, (_ROWS, block), [0])

        carry = (acc, top, total)
        for border in (False, True):
            first_step, end_step = (inner, steps) if border else (jnp.int32(0), inner)
            carry = lax.fori_loop(first_step, end_step, functools.partial(visit, border=border), carry)
        acc, top, total = carry
        wait_for_each_other()  # Nobody needs queries and keys, whose memory this is.
        out_tile = out_tiles.at[group]
        safe = jnp.where(total == 0, 0.0, 1 / total)
        out_tile[...] = (acc * lax.broadcast_in_dim(safe, acc.shape, [0])).astype(out_tile.dtype)
        at = (row, head, split, rows)

        @pl.when(group == 0)
        def _() -> None:
            lse_row[...] = top * _LN2 + jnp.log(total)

        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(out_tile, out_ref.at[(*at, own)])
        pl.when(group == 0)(lambda: plgpu.copy_smem_to_gmem(lse_row, lse_ref.at[at]))
        plgpu.wait_smem_to_gmem(0)

    @pl.when(group == sizes.groups)
    def _() -> None:
        hopper.fewer_registers(sizes.groups)
        caches = [k_ref] if v_ref is None else [k_ref, v_ref]

        def places(step: Any) -> list[tuple[Any, Any]]:
            """Row of the cache and first place there of each piece of a block."""
            first = in_cache(first_place(step))
            if not page:
                return [(row, first)]
            size = block // sizes.pieces
            found = []
            for piece in range(sizes.pieces):
                at = jnp.clip(first + piece * size, 0, slots - 1)
                number = jnp.clip(table_ref[row, lax.div(at, page)], 0, k_ref.shape[0] - 1)
                found.append((number, pl.multiple_of(lax.rem(first, page), size) if page > block else 0))
            return found

        def fill(step: Any, at: Any, carry: None) -> None:
            size = block // sizes.pieces
            ring.fill(step, *([x.at[number, pl.ds(first, size), head] for number, first in at] for x in caches))

        hopper.each(0, steps, fill, None, places)
        ring.drain(steps)


def _over(x: Any, size: int) -> Any:
    """x / size, rounded up; x is not negative."""
    return lax.div(x + (size - 1), size)


def _padded(x: Array, axis: int, length: int) -> Array:
    return jnp.pad(x, [(0, length - n if i == axis else 0) for i, n in enumerate(x.shape)])
