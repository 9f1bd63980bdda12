"""Quantised latent decode attention on Hopper GPUs (Pallas Mosaic GPU): whoever copies also multiplies out.

The scheme is that of `kernels.decode.mosaic_gpu`, but the warpgroup that copies also turns a block of eight-bit
latents, which TMA brought a few steps ahead, into the tile [64, C] of two-byte floats that the tensor cores read,
beside that of the rotary keys, which TMA fills itself. What it reads of shared memory is its own, so it needs nobody's
leave to copy again; the next block's scales are on their way to registers meanwhile.

Up to 256 channels there is room for two such tiles, and a block is multiplied out while the one before is attended to;
more than 64 rows are shared by two computing warpgroups, so that both take what was multiplied out once. Wider latents
have one tile, and two warpgroups with half of the value columns each: there the cache is smaller, but a step takes as
long as both its halves.
"""

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
from kernels._mosaic_gpu import ROW, TILE, Products, Ring
from kernels.decode import schedule
from kernels.decode.call import Call
from kernels.decode.combine import combine
from kernels.latent_decode import limits
from kernels.latent_decode.call import Inputs
from kernels.platform import device_kind, interpreting
from kernels.varying import result

_ROWS = _BLOCK = limits.HOPPER_BLOCK
_EIGHT = plgpu.Layout.WGMMA_UPCAST_2X  # Of bytes: four neighbours in a lane.
_LOG2E, _LN2 = math.log2(math.e), math.log(2)


def decode(call: Call, inputs: Inputs) -> tuple[Float[Array, "B T H C"], Float[Array, "B T H"]]:
    """As `kernels.latent_decode.latent_decode`."""
    q, q_rope, values, scales, rope, table, lengths, starts = inputs
    (batch, queries, heads, width), slices, rope_width = q.shape, values.shape[2], rope.shape[2]
    count = queries * heads // slices
    sizes = limits.hopper_sizes(count, width, rope_width)
    assert sizes is not None  # `limits.mosaic_gpu`.
    tall = _ROWS * sizes.row_groups
    tiles = -(-count // tall)
    splits = call.splits
    if splits is None:
        blocks = -(-inputs.slots // _BLOCK)
        splits = schedule.choose_splits(batch * slices * tiles, blocks, schedule.units(device_kind()))

    def packed(x: Array) -> Array:
        """[B, T, H, W] to [B, g, rows, W]."""
        x = x.reshape(batch, queries, slices, -1, x.shape[3]).swapaxes(1, 2).reshape(batch, slices, count, -1)
        return jnp.pad(x, ((0, 0), (0, 0), (0, tiles * tall - count), (0, 0)))

    number = np.minimum(np.arange(tiles * tall, dtype=np.int32) // (heads // slices), queries - 1)
    arrays = (packed(q), packed(q_rope), values, scales, rope, table, lengths, starts, jnp.asarray(number))
    kernel = functools.partial(
        _kernel, call=call, sizes=sizes, splits=splits, queries=queries, slots=inputs.slots, interpret=interpreting()
    )
    eight = plgpu.SMEM(
        (sizes.stages, _BLOCK, width),
        values.dtype,
        transforms=(plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(64)),
    )
    tile = functools.partial(hopper.tile, dtype=q.dtype)
    slots = [tile(sizes.tiles, _BLOCK, columns) for columns in (width, rope_width)]
    _, *barriers = Ring.scratch(sizes.tiles, sizes.groups, *slots)
    out_dtype = q.dtype if splits == 1 else jnp.float32
    out_tile = plgpu.SMEM(
        (sizes.groups, _ROWS, width // sizes.column_groups),
        out_dtype,
        transforms=(
            plgpu.TilingTransform((8, 128 // jnp.dtype(out_dtype).itemsize)),
            plgpu.SwizzleTransform(128),
        ),
    )
    shape = (batch, slices, splits, tiles * tall)
    out, lse = hopper.launch(
        kernel,
        arrays,
        out_type=(result((*shape, width), out_dtype, q, values), result(shape, jnp.float32, q, values)),
        scratch=(
            plgpu.RefUnion(
                (tile(tall, width), tile(tall, rope_width), tuple(slots), eight),
                (out_tile, plgpu.SMEM((sizes.groups, _ROWS), jnp.float32)),
            ),
            tuple(barriers),
            plgpu.Barrier(num_barriers=sizes.stages),
            plgpu.Barrier(num_arrivals=2 * sizes.row_groups),
            plgpu.Barrier(num_arrivals=sizes.groups),
            tile(sizes.groups, _ROWS, _BLOCK) if interpreting() else None,
        ),
        grid={"batch": batch, "split": splits, "slice": slices, "tile": tiles},
        groups=sizes.groups,
        interpret=interpreting(),
        approximate=True,
    )
    out, lse = out[:, :, :, :count], lse[:, :, :, :count]
    out, lse = combine(out, lse, axis=2) if splits > 1 else (out[:, :, 0], lse[:, :, 0])
    out, lse = (x.reshape(batch, slices, queries, -1, *x.shape[3:]).swapaxes(1, 2) for x in (out, lse))
    out, lse = (x.reshape(batch, queries, heads, *x.shape[4:]) for x in (out, lse))
    return out.astype(q.dtype), lse


def _kernel(
    q_ref: Any, q_rope_ref: Any, values_ref: Any, scales_ref: Any, rope_ref: Any, table_ref: Any, lengths_ref: Any,
    starts_ref: Any, query_ref: Any, out_ref: Any, lse_ref: Any, shared: Any, barriers: Any, arrived: Any,
    loaded: Any, together: Any, spare: Any, *, call: Call, sizes: limits.HopperSizes, splits: int, queries: int,
    slots: int, interpret: bool,
) -> None:  # fmt: skip
    """Output and lse of a tile of rows of one slice over one part of the cache's live blocks."""
    (q_tile, q_rope_tile, slot_refs, eights), (out_tiles, lse_rows) = shared
    ring, products = Ring(slot_refs, *barriers), Products(interpret)
    group, row, split, own, tile = (lax.axis_index(name) for name in ("group", "batch", "split", "slice", "tile"))
    page, width, window, soft_cap = values_ref.shape[1], call.value_width, call.window, call.soft_cap

    # What is live of this row of the batch, and what of that every query sees whole; see `schedule`.
    after = lengths_ref[row] - queries + 1  # Of query 0, which sees its own place.
    start = jnp.maximum(starts_ref[row], 0)
    begin = jnp.maximum(start, after - window) if window else start
    inner_begin = jnp.maximum(start, after + queries - 1 - window) if window else start
    end = jnp.clip(after + queries - 1, 0, slots)
    inner_end = jnp.clip(after, 0, slots)
    live = jnp.where(end > begin, _over(end, _BLOCK) - lax.div(begin, _BLOCK), 0)
    each = _over(live, splits)
    low = lax.div(begin, _BLOCK) + split * each
    high = jnp.maximum(jnp.minimum(low + each, lax.div(begin, _BLOCK) + live), low)
    inner_low = jnp.clip(_over(inner_begin, _BLOCK), low, high)
    inner_high = jnp.clip(lax.div(inner_end, _BLOCK), inner_low, high)
    inner, steps = inner_high - inner_low, high - low

    def first_place(step: Any) -> Any:
        """Of the block of a step: the inner ones first, then those before and behind them."""
        border = low + step - inner
        border = jnp.where(border < inner_low, border, border + inner)
        return jnp.where(step < inner, inner_low + step, border) * _BLOCK

    def in_cache(first: Any) -> Any:
        """Where a block is read from: the last of a contiguous cache may begin in the block before."""
        return first if table_ref is not None else jnp.minimum(first, slots - _BLOCK)

    @pl.when(group < sizes.groups)
    def _() -> None:
        if sizes.groups == 2:
            plgpu.set_max_registers(208, action="increase")
        columns = width // sizes.column_groups
        mine = pl.ds(pl.multiple_of(group * columns, 64) if sizes.column_groups > 1 else 0, columns)
        above = pl.multiple_of(group * _ROWS, _ROWS) if sizes.row_groups > 1 else 0
        rows = pl.ds(tile * _ROWS * sizes.row_groups + above, _ROWS)
        query_tiles = [x.at[pl.ds(above, _ROWS)] for x in (q_tile, q_rope_tile)]

        @pl.when(group < sizes.row_groups)
        def _() -> None:
            for source, target in zip((q_ref, q_rope_ref), query_tiles, strict=True):
                plgpu.copy_gmem_to_smem(source.at[row, own, rows], target, loaded)

        query = _compat.load(query_ref.at[rows], ROW)
        first = jnp.maximum(after + query - window, start) if window else query * 0 + start
        last = jnp.minimum(after + query, slots)
        top = plgpu.layout_cast(jnp.full((_ROWS,), -jnp.inf, jnp.float32), ROW)
        total = plgpu.layout_cast(jnp.zeros((_ROWS,), jnp.float32), ROW)
        acc = plgpu.layout_cast(jnp.zeros((_ROWS, columns), jnp.float32), TILE)
        plgpu.barrier_wait(loaded)

        def wait_for_each_other() -> None:
            if sizes.groups > 1:
                plgpu.barrier_arrive(together)
                plgpu.barrier_wait(together)

        def clean(latent: Any) -> None:
            """Makes what is no number 0 in this group's share of a tile: 0 times it is not. Who may see it has it in
            the scores already."""

            def clean_columns(column: int) -> None:
                piece = latent.at[:, pl.ds(column, 64)]
                x = _compat.load(piece, TILE).astype(jnp.float32)
                piece[...] = jnp.where(abs(x) < jnp.inf, x, 0.0).astype(q_tile.dtype)

            for column in range(0, width, 64):
                pl.when(group == column // 64 % sizes.groups)(functools.partial(clean_columns, column))
            plgpu.commit_smem()

        def visit(step: Any, carry: Any, border: bool) -> Any:
            acc, top, total = carry
            ring.wait(step)
            latent, keys = ring.at(step)

            def scores(ref: Any) -> Array:
                for rows, columns in zip(query_tiles, (latent, keys), strict=True):
                    products.start(ref, rows, columns.T)
                return ref[...]

            s = pl.run_scoped(scores, plgpu.ACC((_ROWS, _BLOCK), jnp.float32))
            if soft_cap:  # tanh x = 1 - 2 / (exp(2 x) + 1).
                s = soft_cap * _LOG2E * (1 - 2 / (jnp.exp2(s * (2 * call.scale / soft_cap * _LOG2E)) + 1))
            else:
                s *= call.scale * _LOG2E
            if border:
                here = first_place(step)
                place = plgpu.layout_cast(lax.broadcasted_iota(jnp.int32, s.shape, 1), TILE) + in_cache(here)
                s = jnp.where((place >= _wide(jnp.maximum(first, here))) & (place < _wide(last)), s, -jnp.inf)
                wait_for_each_other()  # All have read the keys.
                clean(latent)
                wait_for_each_other()
            higher = jnp.maximum(top, s.max(axis=1))
            level = jnp.where(higher == -jnp.inf, 0.0, higher)
            p = jnp.exp2(s - _wide(level))
            fade = jnp.exp2(top - level)
            total = fade * total + p.sum(axis=1)
            weights = p.astype(q_tile.dtype)
            acc *= lax.broadcast_in_dim(fade, acc.shape, [0])
            own_spare = spare.at[group] if interpret else None
            (acc,) = products.add([acc], [(lambda: weights, latent.at[:, mine])], own_spare)
            ring.release(step)
            return acc, higher, total

        def _wide(x: Array) -> Array:
            return lax.broadcast_in_dim(x, (_ROWS, _BLOCK), [0])

        carry = (acc, top, total)
        for border in (False, True):
            first_step, end_step = (inner, steps) if border else (jnp.int32(0), inner)
            carry = lax.fori_loop(first_step, end_step, functools.partial(visit, border=border), carry)
        acc, top, total = carry
        wait_for_each_other()  # Nobody needs queries and tiles, whose memory this is.
        out_tile, lse_row = out_tiles.at[group], lse_rows.at[group]
        safe = jnp.where(total == 0, 0.0, 1 / total)
        out_tile[...] = (acc * lax.broadcast_in_dim(safe, acc.shape, [0])).astype(out_tile.dtype)
        lse_row[...] = top * _LN2 + jnp.log(total)
        plgpu.commit_smem()
        at = (row, own, split, rows)
        plgpu.copy_smem_to_gmem(out_tile, out_ref.at[(*at, mine)])
        pl.when(group < sizes.row_groups)(lambda: plgpu.copy_smem_to_gmem(lse_row, lse_ref.at[at]))
        plgpu.wait_smem_to_gmem(0)

    @pl.when(group == sizes.groups)
    def _() -> None:
        if sizes.groups == 2:
            plgpu.set_max_registers(88, action="decrease")
        ahead, blocks = sizes.stages - 1, scales_ref.shape[3]

        def place(step: Any) -> tuple[Any, Any]:
            """Row of the cache and first place there of the block of a step, or of the last one."""
            first = in_cache(first_place(jnp.clip(step, 0, jnp.maximum(steps - 1, 0))))
            if table_ref is None:
                return row, first
            first = jnp.clip(first, 0, slots - _BLOCK)
            number = jnp.clip(table_ref[row, lax.div(first, page)], 0, values_ref.shape[0] - 1)
            return number, pl.multiple_of(lax.rem(first, page), _BLOCK)

        def fetch(step: Any, at: tuple[Any, Any]) -> None:
            """Asks for the latents of a step, if there is one; what was in their place has been read."""
            stage = lax.rem(step, jnp.int32(sizes.stages))

            @pl.when(step < steps)
            def _() -> None:
                source = values_ref.at[at[0], pl.ds(at[1], _BLOCK), own]
                plgpu.copy_gmem_to_smem(source, eights.at[stage], arrived.at[stage])

        def scales(at: tuple[Any, Any]) -> list[Array]:
            places = pl.ds(at[1], _BLOCK)
            return [_compat.load(scales_ref.at[at[0], places, own, b], _EIGHT.reduce(1)) for b in range(blocks)]

        def multiply_out(step: Any, carry: Any) -> Any:
            places, factors = carry
            fetch(step + ahead, places[ahead])
            then = place(step + sizes.stages)
            factors_then = scales(places[1])
            stage, slot = lax.rem(step, jnp.int32(sizes.stages)), lax.rem(step, jnp.int32(sizes.tiles))

            @pl.when(step >= sizes.tiles)
            def _() -> None:
                plgpu.barrier_wait(ring.free.at[slot])

            number, first = places[0]
            latent, keys = ring.at(step)
            plgpu.copy_gmem_to_smem(rope_ref.at[number, pl.ds(first, _BLOCK)], keys, ring.ready.at[slot])
            plgpu.barrier_wait(arrived.at[stage])
            for column in range(0, width, 64):
                x = _compat.load(eights.at[stage, :, pl.ds(column, 64)], _EIGHT)
                if x.dtype == jnp.int8:
                    x = x.astype(jnp.bfloat16)  # Exact, and cheaper than to float32 at once.
                factor = lax.broadcast_in_dim(factors[column * blocks // width], x.shape, [0])
                factor = plgpu.layout_cast(factor, _EIGHT)  # At once: the broadcast looks for its layout here.
                latent.at[:, pl.ds(column, 64)][...] = (x.astype(jnp.float32) * factor).astype(latent.dtype)
            plgpu.commit_smem()
            plgpu.barrier_arrive(ring.ready.at[slot])
            return [*places[1:], then], factors_then

        @pl.when(steps > 0)
        def _() -> None:
            places = [place(jnp.int32(step)) for step in range(sizes.stages)]
            for step in range(ahead):
                fetch(jnp.int32(step), places[step])
            lax.fori_loop(0, steps, multiply_out, (places, scales(places[0])))
            ring.drain(steps)


def _over(x: Any, size: int) -> Any:
    """x / size, rounded up; x is not negative."""
    return lax.div(x + (size - 1), size)
