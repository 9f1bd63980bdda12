"""Quantised latent decode attention in Triton: the cache split over programs, any page size, by pointers.

The scheme is that of `kernels.decode.triton`: a program holds the rows of one slice (its query heads times the queries)
and walks over its share of the row's live blocks, first those that every query sees whole, then the few at the borders.
What is copied ahead into shared memory is the cache in eight bits; a block is multiplied out once, in registers, and
serves both products from there.
"""

import math

import jax.numpy as jnp
import triton
import triton.language as tl
from jax import lax
from jaxtyping import Array, Float

from kernels import _triton
from kernels.decode import schedule
from kernels.decode.call import Call
from kernels.decode.triton import combine_parts, load
from kernels.latent_decode import limits
from kernels.latent_decode.call import Inputs
from kernels.platform import device_kind
from kernels.varying import result

_LN2 = tl.constexpr(math.log(2))
_LOG2E = tl.constexpr(math.log2(math.e))


def decode(call: Call, inputs: Inputs) -> tuple[Float[Array, "B T H C"], Float[Array, "B T H"]]:
    """As `kernels.latent_decode.latent_decode`."""
    q, q_rope, values, scales, rope, table, lengths, starts = inputs
    (batch, queries, heads, width), slices = q.shape, values.shape[2]
    rows, kind = queries * heads // slices, device_kind()
    sizes = limits.triton_sizes(rows, width, rope.shape[2], q.dtype.itemsize, kind)
    assert sizes is not None  # `limits.triton`.
    tiles = -(-rows // sizes.rows)
    splits = call.splits
    if splits is None:
        blocks = -(-inputs.slots // sizes.block)
        splits = schedule.choose_splits(batch * slices * tiles, blocks, schedule.units(kind))
    fp8 = values.dtype == jnp.float8_e4m3fn
    values = lax.bitcast_convert_type(values, jnp.int8)  # The interpreter has no arrays of eight-bit floats.
    arrays = (q, q_rope, values, scales, rope, lengths if table is None else table, lengths, starts)
    shape = (batch, queries, heads, splits)
    out, lse = _triton.call(
        _attend,
        *arrays,
        out_shape=(
            result((*shape, width), q.dtype if splits == 1 else jnp.float32, *arrays),
            result(shape, jnp.float32, *arrays),
        ),
        grid=(slices * tiles, splits, batch),
        num_warps=sizes.warps,
        num_stages=sizes.stages if table is None else 2 * sizes.stages - 1,  # Half of them look up pages.
        QUERIES=queries,
        SLICES=slices,
        GROUP=heads // slices,
        WIDTH=width,
        ROPE_WIDTH=rope.shape[2],
        SCALES=scales.shape[3],
        SLOTS=inputs.slots,
        PAGE=0 if table is None else values.shape[1],
        PAGES=values.shape[0],
        SPLITS=splits,
        WINDOW=call.window,
        SOFT_CAP=call.soft_cap,
        FP8=fp8,
        SCALE=call.scale,
        ROWS=sizes.rows,
        BLOCK=sizes.block,
        MAIN=sizes.main,
        REST=sizes.rest,
        PRECISION="ieee" if q.dtype == jnp.float32 else "tf32",
    )
    if splits == 1:
        return out[:, :, :, 0], lse[:, :, :, 0]
    return _triton.call(
        combine_parts,
        out,
        lse,
        out_shape=(result((*shape[:3], width), q.dtype, out), result(shape[:3], jnp.float32, out)),
        grid=batch * queries * heads,
        num_warps=1,
        SPLITS=splits,
        SPLITS_PADDED=triton.next_power_of_2(splits),
        VALUE_WIDTH=width,
        VALUES=sizes.main,
    )


@triton.jit
def _attend(
    q_ptr, q_rope_ptr, values_ptr, scales_ptr, rope_ptr, table_ptr, lengths_ptr, starts_ptr, out_ptr, lse_ptr,
    QUERIES: tl.constexpr, SLICES: tl.constexpr, GROUP: tl.constexpr, WIDTH: tl.constexpr, ROPE_WIDTH: tl.constexpr,
    SCALES: tl.constexpr, SLOTS: tl.constexpr, PAGE: tl.constexpr, PAGES: tl.constexpr, SPLITS: tl.constexpr,
    WINDOW: tl.constexpr, SOFT_CAP: tl.constexpr, SCALE: tl.constexpr, FP8: tl.constexpr, ROWS: tl.constexpr,
    BLOCK: tl.constexpr, MAIN: tl.constexpr, REST: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Output and lse of a tile of rows of one slice over one part of the cache's live blocks."""
    TILES: tl.constexpr = (QUERIES * GROUP + ROWS - 1) // ROWS
    # Blocks of channels, padded like the channels, of which each is padded only where it is the one.
    BLOCKS: tl.constexpr = 1 if SCALES == 1 else MAIN // (WIDTH // SCALES)
    own = tl.program_id(0) // TILES
    split = tl.program_id(1)
    batch = tl.program_id(2).to(tl.int64)
    row = tl.program_id(0) % TILES * ROWS + tl.arange(0, ROWS)
    real = row < QUERIES * GROUP
    query = row // GROUP
    at = (batch * QUERIES + query) * (SLICES * GROUP) + own * GROUP + row % GROUP

    length = tl.load(lengths_ptr + batch)
    start = tl.maximum(tl.load(starts_ptr + batch), 0)
    after = length - QUERIES + 1 + query  # A query sees its own place.
    last = tl.where(real, tl.minimum(after, SLOTS), 0)
    first = tl.zeros([ROWS], tl.int32) + start
    begin = start  # Of all queries, as `end`; between `inner_begin` and `inner_end` every query sees every key.
    inner_begin = start
    if WINDOW > 0:
        first = tl.maximum(first, after - WINDOW)
        begin = tl.maximum(start, length - QUERIES + 1 - WINDOW)
        inner_begin = tl.maximum(start, length - WINDOW)
    end = tl.minimum(length, SLOTS)
    inner_end = tl.maximum(tl.minimum(length - QUERIES + 1, SLOTS), 0)

    live = tl.where(end > begin, tl.cdiv(end, BLOCK) - begin // BLOCK, 0)
    each = tl.cdiv(live, SPLITS)
    low = begin // BLOCK + split * each
    high = tl.maximum(tl.minimum(low + each, begin // BLOCK + live), low)
    inner_low = tl.minimum(tl.maximum(tl.cdiv(inner_begin, BLOCK), low), high)
    inner_high = tl.minimum(tl.maximum(inner_end // BLOCK, inner_low), high)

    column = tl.arange(0, MAIN)
    rest = tl.arange(0, REST)
    part = tl.arange(0, BLOCKS)
    q = tl.load(q_ptr + at[:, None] * WIDTH + column, mask=real[:, None] & (column < WIDTH), other=0)
    q_rope = tl.load(q_rope_ptr + at[:, None] * ROPE_WIDTH + rest, mask=real[:, None] & (rest < ROPE_WIDTH), other=0)

    top = tl.zeros([ROWS], tl.float32) - float("inf")
    total = tl.zeros([ROWS], tl.float32)
    sums = tl.zeros([ROWS, MAIN], tl.float32)
    for BORDER in tl.static_range(2):  # First the blocks that every query sees whole, then those at the borders.
        if BORDER:
            steps = inner_low - low + high - inner_high
        else:
            steps = inner_high - inner_low
        for step in range(steps):
            if BORDER:
                block = tl.where(step < inner_low - low, low + step, inner_high + step - (inner_low - low))
            else:
                block = inner_low + step
            place = block * BLOCK + tl.arange(0, BLOCK)
            seen = (place >= begin) & (place < end)
            if PAGE > 0:
                page = tl.load(table_ptr + batch * (SLOTS // PAGE) + place // PAGE, mask=seen, other=0)
                page = tl.minimum(tl.maximum(page, 0), PAGES - 1)  # A wrong table must not lead out of the cache.
                token = page.to(tl.int64) * PAGE + place % PAGE
            else:
                token = batch * SLOTS + place
            token = token[:, None]
            mine = token * SLICES + own

            eight = load(values_ptr + mine * WIDTH + column, seen, column < WIDTH, BORDER, WIDTH < MAIN)
            scale = load(scales_ptr + mine * SCALES + part, seen, part < SCALES, BORDER, SCALES < BLOCKS)
            if FP8:
                eight = eight.to(tl.float8e4nv, bitcast=True)
            latent = tl.reshape(eight.to(tl.float32), (BLOCK, BLOCKS, MAIN // BLOCKS)) * scale[:, :, None]
            latent = tl.reshape(latent, (BLOCK, MAIN)).to(q.dtype)
            key = load(rope_ptr + token * ROPE_WIDTH + rest, seen, rest < ROPE_WIDTH, BORDER, ROPE_WIDTH < REST)
            s = tl.dot(q, tl.trans(latent), input_precision=PRECISION)
            s += tl.dot(q_rope, tl.trans(key), input_precision=PRECISION)
            if SOFT_CAP > 0:  # tanh x = 1 - 2 / (exp(2 x) + 1).
                s = SOFT_CAP * _LOG2E * (1 - 2 / (tl.exp2(s * (2 * SCALE / SOFT_CAP * _LOG2E)) + 1))
            else:
                s *= SCALE * _LOG2E
            if BORDER:
                allowed = (place >= first[:, None]) & (place < last[:, None])
                s = tl.where(allowed, s, -float("inf"))

            higher = tl.maximum(top, tl.max(s, 1))
            level = tl.where(higher == -float("inf"), 0.0, higher)
            p = tl.exp2(s - level[:, None])
            fade = tl.exp2(top - level)
            top = higher
            total = fade * total + tl.sum(p, 1)
            if BORDER and QUERIES > 1:  # What only some queries see may be no number, which is in their scores already.
                latent = tl.where(tl.abs(latent.to(tl.float32)) < float("inf"), latent, tl.zeros_like(latent))
            sums = tl.dot(p.to(latent.dtype), latent, sums * fade[:, None], input_precision=PRECISION)

    safe = tl.where(total == 0, 1.0, total)
    out = (sums / safe[:, None]).to(out_ptr.dtype.element_ty)
    at = at * SPLITS + split
    tl.store(out_ptr + at[:, None] * WIDTH + column, out, mask=real[:, None] & (column < WIDTH))
    tl.store(lse_ptr + at, tl.where(total == 0, -float("inf"), (top + tl.log2(safe)) * _LN2), mask=real)
