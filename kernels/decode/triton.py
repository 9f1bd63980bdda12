"""Decode attention in Triton: the cache split over programs (Flash-Decoding), any page size, by pointers.

A program holds the rows of one key/value head (its query heads times the queries, at least 16 for the tensor cores) and
walks over its share of the row's live blocks: first those that every query sees whole, without a mask and pipelined,
then the few at the borders. A width is read as a power of two and a rest (576 as 512 + 64, 80 as 64 + 16). Where the
values are columns of the keys, the tile in shared memory serves both products. What the splits of a row gave is put
together by a second small kernel, one warp per query and head: XLA would take several launches, which at small batches
are a good part of the time.
"""

import math

import jax.numpy as jnp
import triton
import triton.language as tl
from jaxtyping import Array, Float

from kernels import _triton
from kernels.decode import limits, schedule
from kernels.decode.call import Call, Inputs
from kernels.platform import device_kind
from kernels.varying import result

_LN2 = tl.constexpr(math.log(2))
_LOG2E = tl.constexpr(math.log2(math.e))


def decode(call: Call, inputs: Inputs) -> tuple[Float[Array, "B T H Dv"], Float[Array, "B T H"]]:
    """As `kernels.decode.decode_attention`."""
    q, k, v, table, lengths, starts, sinks = inputs
    (batch, queries, heads, width), kv_heads = q.shape, k.shape[2]
    rows = queries * heads // kv_heads
    kind = device_kind()
    sizes = limits.triton_sizes(rows, width, call.value_width, v is None, q.dtype.itemsize, kind)
    tiles = -(-rows // sizes.rows)
    splits = call.splits
    if splits is None:
        blocks = -(-inputs.slots // sizes.block)
        splits = schedule.choose_splits(batch * kv_heads * tiles, blocks, schedule.units(kind))
    sink = jnp.full((heads,), -jnp.inf, jnp.float32) if sinks is None else sinks.astype(jnp.float32)
    arrays = (q, k, k if v is None else v, lengths if table is None else table, lengths, starts, sink)
    shape = (batch, queries, heads, splits)
    out, lse = _triton.call(
        _attend,
        *arrays,
        out_shape=(
            result((*shape, call.value_width), q.dtype if splits == 1 else jnp.float32, *arrays),
            result(shape, jnp.float32, *arrays),
        ),
        grid=(kv_heads * tiles, splits, batch),
        num_warps=sizes.warps,
        num_stages=sizes.stages if table is None else 2 * sizes.stages - 1,  # Half of them look up pages.
        QUERIES=queries,
        KV_HEADS=kv_heads,
        GROUP=heads // kv_heads,
        WIDTH=width,
        VALUE_WIDTH=call.value_width,
        VALUE_ROW=width if v is None else call.value_width,
        SLOTS=inputs.slots,
        PAGE=0 if table is None else k.shape[1],
        PAGES=k.shape[0],
        SPLITS=splits,
        WINDOW=call.window,
        SOFT_CAP=call.soft_cap,
        SCALE=call.scale,
        ROWS=sizes.rows,
        BLOCK=sizes.block,
        MAIN=sizes.main,
        REST=sizes.rest,
        VALUES=sizes.values,
        SHARED=v is None and call.value_width == sizes.main,
        PRECISION="ieee" if q.dtype == jnp.float32 else "tf32",
    )
    if splits == 1:
        return out[:, :, :, 0], lse[:, :, :, 0]
    return _triton.call(
        combine_parts,
        out,
        lse,
        out_shape=(result((*shape[:3], call.value_width), q.dtype, out), result(shape[:3], jnp.float32, out)),
        grid=batch * queries * heads,
        num_warps=1,
        SPLITS=splits,
        SPLITS_PADDED=triton.next_power_of_2(splits),
        VALUE_WIDTH=call.value_width,
        VALUES=sizes.values,
    )


@triton.jit
def _attend(
    q_ptr, k_ptr, v_ptr, table_ptr, lengths_ptr, starts_ptr, sinks_ptr, out_ptr, lse_ptr,
    QUERIES: tl.constexpr, KV_HEADS: tl.constexpr, GROUP: tl.constexpr, WIDTH: tl.constexpr, VALUE_WIDTH: tl.constexpr,
    VALUE_ROW: tl.constexpr, SLOTS: tl.constexpr, PAGE: tl.constexpr, PAGES: tl.constexpr, SPLITS: tl.constexpr,
    WINDOW: tl.constexpr, SOFT_CAP: tl.constexpr, SCALE: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
    MAIN: tl.constexpr, REST: tl.constexpr, VALUES: tl.constexpr, SHARED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Output and lse of a tile of rows of one key/value head over one part of the cache's live blocks."""
    TILES: tl.constexpr = (QUERIES * GROUP + ROWS - 1) // ROWS
    head = tl.program_id(0) // TILES
    split = tl.program_id(1)
    batch = tl.program_id(2).to(tl.int64)
    row = tl.program_id(0) % TILES * ROWS + tl.arange(0, ROWS)
    real = row < QUERIES * GROUP
    query = row // GROUP
    query_head = head * GROUP + row % GROUP
    at = (batch * QUERIES + query) * (KV_HEADS * GROUP) + query_head

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
    value = tl.arange(0, VALUES)
    q = tl.load(q_ptr + at[:, None] * WIDTH + column, mask=real[:, None] & (column < WIDTH), other=0)
    if REST > 0:
        rest = MAIN + tl.arange(0, REST)
        q_rest = tl.load(q_ptr + at[:, None] * WIDTH + rest, mask=real[:, None] & (rest < WIDTH), other=0)

    # A sink is a key of value 0, seen by the first part.
    sink = tl.load(sinks_ptr + query_head, mask=real, other=-float("inf"))
    top = tl.where(split == 0, sink * _LOG2E, -float("inf"))
    total = tl.where(top == -float("inf"), 0.0, 1.0)
    sums = tl.zeros([ROWS, VALUES], tl.float32)
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
            token = (token * KV_HEADS + head)[:, None]

            k = load(k_ptr + token * WIDTH + column, seen, column < WIDTH, BORDER, WIDTH < MAIN)
            s = tl.dot(q, tl.trans(k), input_precision=PRECISION)
            if REST > 0:
                k_rest = load(k_ptr + token * WIDTH + rest, seen, rest < WIDTH, BORDER, WIDTH < MAIN + REST)
                s += tl.dot(q_rest, tl.trans(k_rest), input_precision=PRECISION)
            if SOFT_CAP > 0:  # tanh x = 1 - 2 / (exp(2 x) + 1).
                s = SOFT_CAP * _LOG2E * (1 - 2 / (tl.exp2(s * (2 * SCALE / SOFT_CAP * _LOG2E)) + 1))
            else:
                s *= SCALE * _LOG2E
            if BORDER:
                allowed = (place >= first[:, None]) & (place < last[:, None])
                s = tl.where(allowed, s, -float("inf"))
            if SHARED:
                v = k
            else:
                v = load(v_ptr + token * VALUE_ROW + value, seen, value < VALUE_WIDTH, BORDER, VALUE_WIDTH < VALUES)

            higher = tl.maximum(top, tl.max(s, 1))
            level = tl.where(higher == -float("inf"), 0.0, higher)
            p = tl.exp2(s - level[:, None])
            fade = tl.exp2(top - level)
            top = higher
            total = fade * total + tl.sum(p, 1)
            if BORDER and QUERIES > 1:  # A value that only some queries see may be no number: 0 times it must be 0.
                sound = tl.abs(v.to(tl.float32)) < float("inf")
                spoilt = tl.dot(allowed.to(v.dtype), tl.where(sound, 0.0, 1.0).to(v.dtype), input_precision=PRECISION)
                weighed = tl.dot(p.to(v.dtype), tl.where(sound, v, tl.zeros_like(v)), input_precision=PRECISION)
                sums = sums * fade[:, None] + tl.where(spoilt > 0, float("nan"), weighed)
            else:
                sums = tl.dot(p.to(v.dtype), v, sums * fade[:, None], input_precision=PRECISION)

    safe = tl.where(total == 0, 1.0, total)
    out = (sums / safe[:, None]).to(out_ptr.dtype.element_ty)
    at = at * SPLITS + split
    tl.store(out_ptr + at[:, None] * VALUE_WIDTH + value, out, mask=real[:, None] & (value < VALUE_WIDTH))
    tl.store(lse_ptr + at, tl.where(total == 0, -float("inf"), (top + tl.log2(safe)) * _LN2), mask=real)


@triton.jit
def load(pointers, seen, inside, BORDER: tl.constexpr, PADDED: tl.constexpr):
    """A tile of a cache; zeros where it is not to be looked at, or beyond its width."""
    if BORDER:
        return tl.load(pointers, mask=seen[:, None] & inside[None, :], other=0)
    if PADDED:
        return tl.load(pointers, mask=inside[None, :], other=0)
    return tl.load(pointers)


@triton.jit
def combine_parts(
    parts_ptr, lses_ptr, out_ptr, lse_ptr,
    SPLITS: tl.constexpr, SPLITS_PADDED: tl.constexpr, VALUE_WIDTH: tl.constexpr, VALUES: tl.constexpr,
):  # fmt: skip
    """What the splits of one query and head gave, put together (`kernels.decode.combine`)."""
    at = tl.program_id(0).to(tl.int64)
    split = tl.arange(0, SPLITS_PADDED)
    value = tl.arange(0, VALUES)
    lses = tl.load(lses_ptr + at * SPLITS + split, mask=split < SPLITS, other=-float("inf"))
    top = tl.max(lses, 0)
    level = tl.where(top == -float("inf"), 0.0, top)
    total = tl.sum(tl.exp(lses - level), 0)
    out = tl.zeros([VALUES], tl.float32)
    for i in range(SPLITS):
        weight = tl.exp(tl.load(lses_ptr + at * SPLITS + i) - level)  # 0 for a split without keys, whose output is 0.
        part = tl.load(parts_ptr + (at * SPLITS + i) * VALUE_WIDTH + value, mask=value < VALUE_WIDTH, other=0)
        out += weight * part
    safe = tl.where(total == 0, 1.0, total)
    tl.store(out_ptr + at * VALUE_WIDTH + value, (out / safe).to(out_ptr.dtype.element_ty), mask=value < VALUE_WIDTH)
    tl.store(lse_ptr + at, tl.where(total == 0, -float("inf"), level + tl.log(safe)))
