"""Decode attention on TPU (Mosaic): the live blocks of a cache pass once through VMEM, in the form in which they lie.

XLA keeps an array's last axis in the 128 lanes only where 128 divides it, and lets the heads of a token lie together
only where they fill tiles: then places and heads are one axis ("merged": [S Hk, D]; "tiled": [S, Hk, D], where they
cannot be one), else heads lie one behind the other ("heads": [Hk, S, D]). Other widths have the sequence in the lanes
("columns": [Hk, D, S]). Blocks are cut in just these forms: to turn a cache over costs more than to attend to it. Where
heads lie together a block holds all of them; one product multiplies their keys with all query heads, and scores between
strangers are masked away, which hides behind the block's copy up to about 128 query rows.

Grid: pieces of work (row of the batch, block of heads, split) times as many blocks as the longest piece has. The steps
that a shorter piece leaves over already ask for the next piece's first block, so nothing is fetched twice and nobody
waits. Pages (16 to 64 tokens) are too small for grid steps of their own; they are copied by hand, a whole block's at a
time, while the block before is computed, across the borders of pieces.
"""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Float

from kernels.decode import limits, schedule
from kernels.decode.call import Call, Inputs
from kernels.decode.combine import combine
from kernels.platform import device_kind, interpreting
from kernels.varying import result

_LANES = 128
_VMEM = 48 << 20
_LOG2E = math.log2(math.e)


@dataclasses.dataclass(frozen=True)
class _Facts:
    """What is known of a call while it is traced; sizes of blocks are in places of the cache."""

    layout: str
    queries: int
    group: int
    heads: int  # Key/value heads in a block.
    head_blocks: int
    rows: int  # Query rows of a block, padded.
    value_width: int
    shared: bool
    slots: int
    block: int
    splits: int
    window: int
    soft_cap: float
    scale: float
    page: int = 0


def decode(call: Call, inputs: Inputs) -> tuple[Float[Array, "B T H Dv"], Float[Array, "B T H"]]:
    """As `kernels.decode.decode_attention`."""
    q, k, v, table, lengths, starts, sinks = inputs
    (batch, queries, heads, width), kv_heads = q.shape, k.shape[2]
    if table is not None and table.size > limits.TPU_TABLE and batch > 1:  # Tables lie in scalar memory: 1 MiB.
        half = batch // 2
        halves = [
            decode(call, Inputs(q[part], k, v, table[part], lengths[part], starts[part], sinks))
            for part in (slice(None, half), slice(half, None))
        ]
        return tuple(map(jnp.concatenate, zip(*halves, strict=True)))  # type: ignore[return-value]
    layout = limits.tpu_layout(kv_heads, width, width if v is None else call.value_width)
    together = kv_heads if layout in ("merged", "tiled") else 1
    head_blocks, count = kv_heads // together, queries * heads * together // kv_heads
    tile = 32 // q.dtype.itemsize
    rows = -(-count // tile) * tile
    page = 0 if table is None else k.shape[1]
    slots = inputs.slots
    block = limits.tpu_block(layout, together, rows, width, 0 if v is None else call.value_width, q.dtype.itemsize)
    block = max(1, block // page) * page if page else min(block, slots)
    kind = device_kind()
    cores = schedule.units(kind) if "TPU" in kind else 1
    splits = call.splits
    if splits is None:
        splits = schedule.choose_splits(batch * head_blocks, -(-slots // block), cores)
    facts = _Facts(
        layout, queries, heads // kv_heads, together, head_blocks, rows, call.value_width, v is None, slots, block,
        splits, call.window, call.soft_cap, call.scale, page,
    )  # fmt: skip

    def packed(x: Array) -> Array:
        """[B, T, H, ...] to [B, blocks of heads, rows, ...]."""
        x = x.reshape(x.shape[0], x.shape[1], head_blocks, -1, *x.shape[3:]).swapaxes(1, 2)
        x = x.reshape(x.shape[0], head_blocks, count, *x.shape[4:])
        return jnp.pad(x, ((0, 0), (0, 0), (0, rows - count)) + ((0, 0),) * (x.ndim - 3))

    sink = jnp.full((heads,), -jnp.inf, jnp.float32) if sinks is None else sinks.astype(jnp.float32)
    sink = packed(jnp.broadcast_to(sink, (1, queries, heads)))[0, :, :, None]
    run = _contiguous if table is None else functools.partial(_paged, table=table, cores=cores)
    out, lse = run(facts, packed(q), jnp.broadcast_to(sink, (head_blocks, rows, _LANES)), k, v, lengths, starts)
    out, lse = (x.reshape(batch, head_blocks, splits, *x.shape[1:])[:, :, :, :count] for x in (out, lse[..., 0]))
    out, lse = combine(out, lse, axis=2) if splits > 1 else (out[:, :, 0], lse[:, :, 0])
    out, lse = (x.reshape(batch, head_blocks, queries, -1, *x.shape[3:]).swapaxes(1, 2) for x in (out, lse))
    out, lse = (x.reshape(batch, queries, heads, *x.shape[4:]) for x in (out, lse))
    return out.astype(q.dtype), lse


def _pieces(facts: _Facts, lengths: Array, starts: Array, cores: int = 1) -> tuple[Array, Array, Array, Array]:
    """Per piece of work: first block, number of blocks, next piece that has any; and the most blocks that one has."""
    first, last = schedule.visible(lengths, starts, facts.queries, facts.window, facts.slots)
    begin, count = schedule.parts(first, last, facts.block, facts.splits)
    begin, count = (jnp.repeat(x[:, None], facts.head_blocks, axis=1).reshape(-1) for x in (begin, count))
    return begin, count, schedule.next_live(count, cores), jnp.maximum(count.max(), 1)


def _contiguous(
    facts: _Facts, q: Array, sink: Array, k: Array, v: Array | None, lengths: Array, starts: Array
) -> tuple[Array, Array]:
    """Results [pieces, rows, Dv] and [pieces, rows, 128] for a cache [B, S, Hk, D]; Mosaic's pipeline copies blocks."""
    pieces, blocks = q.shape[0] * facts.head_blocks * facts.splits, -(-facts.slots // facts.block)
    begin, count, after, steps = _pieces(facts, lengths, starts)

    def at(piece: Any) -> tuple[Any, Any, Any]:
        """Row of the batch, block of heads, split."""
        rest = lax.div(piece, facts.splits)
        return lax.div(rest, facts.head_blocks), lax.rem(rest, facts.head_blocks), lax.rem(piece, facts.splits)

    def block_at(piece: Any, step: Any, begin: Any, count: Any, after: Any, *_: Any) -> tuple[Any, ...]:
        live, then = step < count[piece], after[piece]
        idle = jnp.where(then == piece, begin[piece] + jnp.maximum(count[piece] - 1, 0), begin[then])
        block = jnp.minimum(jnp.where(live, begin[piece] + step, idle), blocks - 1)
        row, head, _ = at(jnp.where(live, piece, then))
        return {
            "merged": (row, block, 0),
            "tiled": (row, block, 0, 0),
            "heads": (row, head, block, 0),
            "columns": (row, head, 0, block),
        }[facts.layout]

    def kernel(begin, count, after, lengths, starts, q, sink, *refs):
        inputs, (out, lse, top, total, sums) = refs[:-5], refs[-5:]
        piece, step = pl.program_id(0), pl.program_id(1)
        row, _, split = at(piece)
        state = (top, total, sums)

        @pl.when(step == 0)
        def _():
            _begin(sink, split, state)

        @pl.when(step < count[piece])
        def _():
            tiles = [ref[...] for ref in inputs]
            _attend(facts, q[...], tiles, (begin[piece] + step) * facts.block, lengths[row], starts[row], state)

        @pl.when(step == pl.num_programs(1) - 1)
        def _():
            _finish(state, out, lse)

    def spec(x: Array) -> pl.BlockSpec:
        block, width = facts.block, x.shape[-1]
        shape = {
            "merged": (None, block * facts.heads, width),
            "tiled": (None, block, facts.heads, width),
            "heads": (None, None, block, width),
            "columns": (None, None, x.shape[-2], block),
        }[facts.layout]
        return pl.BlockSpec(shape, block_at)

    cache = [_as_it_lies(facts, x) for x in (k, v) if x is not None]
    query = pl.BlockSpec((None, None, *q.shape[2:]), lambda piece, step, *_: (*at(piece)[:2], 0, 0))
    return pl.pallas_call(
        kernel,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=5,
            grid=(pieces, steps),
            in_specs=[query, _sink_spec(sink, lambda piece, step, *_: (at(piece)[1], 0, 0)), *map(spec, cache)],
            out_specs=_out_specs(facts, lambda piece, step, *_: (piece, 0, 0)),
            scratch_shapes=_state(facts),
        ),
        out_shape=_out_shape(facts, pieces, q, sink, begin, *cache),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=_VMEM),
        interpret=interpreting(),
        name="decode_attention",
    )(begin, count, after, lengths, starts, q, sink, *cache)


def _paged(
    facts: _Facts, q: Array, sink: Array, k: Array, v: Array | None, lengths: Array, starts: Array, *, table: Array,
    cores: int,
) -> tuple[Array, Array]:  # fmt: skip
    """As `_contiguous` for pages [P, page, Hk, D], which the kernel copies by itself."""
    pieces, splits, page = q.shape[0] * facts.splits, facts.splits, facts.page
    pages, entries, per_block = k.shape[0], table.shape[1], facts.block // facts.page
    cores = cores if pieces % cores == 0 else 1
    begin, count, after, steps = _pieces(facts, lengths, starts, cores)  # Each core fetches for itself alone.
    mine = pieces // cores
    first, last = schedule.visible(lengths, starts, facts.queries, facts.window, facts.slots)
    bounds = (first[:, 0] // page, (last[:, -1] + page - 1) // page)

    def kernel(begin, count, after, lengths, starts, low, high, table, q, sink, *refs):
        both = len(cache)
        stores, (out, lse, top, total, sums, turn, arrived), buffers = refs[:both], refs[both:-both], refs[-both:]
        piece, step = pl.program_id(0) * mine + pl.program_id(1), pl.program_id(2)
        state = (top, total, sums)

        def copies(piece: Any, step: Any, slot: Any, act: Any) -> None:
            """Starts or awaits the copies of those pages of a block that hold keys that are seen."""
            row, block = lax.div(piece, splits), begin[piece] + step

            def one(number: Any, _: Any) -> None:
                source = jnp.clip(table[row * entries + number], 0, pages - 1)
                for index, (store, buffer) in enumerate(zip(stores, buffers, strict=True)):
                    size = store.shape[1]
                    place = pl.multiple_of((number - block * per_block) * size, size)
                    target = buffer.at[slot, pl.ds(place, size)]
                    act(pltpu.make_async_copy(store.at[source], target, arrived.at[slot, index]))

            lax.fori_loop(
                jnp.maximum(low[row], block * per_block),
                jnp.minimum(high[row], (block + 1) * per_block),
                one,
                None,
            )

        @pl.when(step == 0)
        def _():
            _begin(sink, lax.rem(piece, splits), state)

        @pl.when((step == 0) & (pl.program_id(1) == 0))
        def _():
            turn[0] = 0

        @pl.when(step < count[piece])
        def _():
            slot, row, then = lax.rem(turn[0], 2), lax.div(piece, splits), after[piece]

            @pl.when(turn[0] == 0)
            def _():
                copies(piece, step, slot, lambda copy: copy.start())

            @pl.when(step + 1 < count[piece])
            def _():
                copies(piece, step + 1, 1 - slot, lambda copy: copy.start())

            @pl.when((step + 1 == count[piece]) & (then != piece))
            def _():
                copies(then, 0, 1 - slot, lambda copy: copy.start())

            copies(piece, step, slot, lambda copy: copy.wait())
            tiles = [buffer[slot] for buffer in buffers]
            _attend(facts, q[...], tiles, (begin[piece] + step) * facts.block, lengths[row], starts[row], state)
            turn[0] += 1

        @pl.when(step == pl.num_programs(2) - 1)
        def _():
            _finish(state, out, lse)

    cache = [_as_it_lies(facts, x) for x in (k, v) if x is not None]
    query = pl.BlockSpec(
        (None, None, *q.shape[2:]), lambda core, i, step, *_: (lax.div(core * mine + i, splits), 0, 0, 0)
    )
    return pl.pallas_call(
        kernel,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=8,
            grid=(cores, mine, steps),
            in_specs=[
                query,
                _sink_spec(sink, lambda core, i, step, *_: (0, 0, 0)),
                *(pl.BlockSpec(memory_space=pl.ANY) for _ in cache),
            ],
            out_specs=_out_specs(facts, lambda core, i, step, *_: (core * mine + i, 0, 0)),
            scratch_shapes=[
                *_state(facts),
                pltpu.SMEM((1,), jnp.int32),
                pltpu.SemaphoreType.DMA((2, len(cache))),
                *(pltpu.VMEM((2, per_block * x.shape[1], *x.shape[2:]), x.dtype) for x in cache),
            ],
        ),
        out_shape=_out_shape(facts, pieces, q, sink, begin, *cache),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary", "arbitrary"), vmem_limit_bytes=_VMEM
        ),
        interpret=interpreting(),
        name="paged_decode_attention",
    )(begin, count, after, lengths, starts, *bounds, table.reshape(-1), q, sink, *cache)


def _as_it_lies(facts: _Facts, x: Array) -> Array:
    """A cache [B, S, Hk, D] seen as XLA stores it, so that no copy is made."""
    if facts.layout == "merged":
        return x.reshape(x.shape[0], -1, x.shape[3])
    return x.transpose({"tiled": (0, 1, 2, 3), "heads": (0, 2, 1, 3), "columns": (0, 2, 3, 1)}[facts.layout])


def _state(facts: _Facts) -> list[Any]:
    """Running maximum (base 2) and sum of each row, in every lane, and the weighed values."""
    lanes = pltpu.VMEM((facts.rows, _LANES), jnp.float32)
    return [lanes, lanes, pltpu.VMEM((facts.rows, facts.value_width), jnp.float32)]


def _sink_spec(sink: Array, index: Any) -> pl.BlockSpec:
    return pl.BlockSpec((None, *sink.shape[1:]), index)


def _out_specs(facts: _Facts, index: Any) -> list[pl.BlockSpec]:
    return [pl.BlockSpec((None, facts.rows, width), index) for width in (facts.value_width, _LANES)]


def _out_shape(facts: _Facts, pieces: int, q: Array, *sources: Array) -> list[jax.ShapeDtypeStruct]:
    dtype = q.dtype if facts.splits == 1 else jnp.float32
    kinds = ((facts.value_width, dtype), (_LANES, jnp.float32))
    return [result((pieces, facts.rows, width), dtype, q, *sources) for width, dtype in kinds]


def _begin(sink: Any, split: Any, state: tuple[Any, ...]) -> None:
    """A sink is a key of value 0, seen by the first part."""
    top, total, sums = state
    top[...] = jnp.where(split == 0, sink[...] * _LOG2E, -jnp.inf)
    total[...] = jnp.where(top[...] == -jnp.inf, 0.0, 1.0)
    sums[...] = jnp.zeros_like(sums)


def _attend(
    facts: _Facts, q: Array, tiles: list[Array], place: Any, length: Any, start: Any, state: tuple[Any, ...]
) -> None:
    """Takes one block of the cache, which begins at `place`, into the state."""
    top, total, sums = state
    flat = [x.reshape(-1, x.shape[-1]) for x in tiles]
    keys = flat[0]
    across = int(facts.layout != "columns")  # The axis of the keys' width.
    values = flat[-1]
    if facts.shared:
        values = keys[:, : facts.value_width] if across else keys[: facts.value_width]
    s = _dot(q, keys, across)
    if facts.soft_cap:
        s = facts.soft_cap * _LOG2E * jnp.tanh(s * (facts.scale / facts.soft_cap))
    else:
        s *= facts.scale * _LOG2E
    allowed = _allowed(facts, s.shape, place, length, start)
    s = jnp.where(allowed, s, -jnp.inf)
    before = top[:, :1]
    higher = jnp.maximum(before, s.max(1, keepdims=True))
    level = jnp.where(higher == -jnp.inf, 0.0, higher)
    p, fade = jnp.exp2(s - level), jnp.exp2(before - level)
    top[...] = jnp.broadcast_to(higher, top.shape)
    total[...] = jnp.broadcast_to(fade * total[:, :1] + p.sum(1, keepdims=True), total.shape)
    plain = _dot(p.astype(values.dtype), values, 1 - across)
    sound = jnp.sum(plain * 0.0) == 0.0

    @pl.when(sound)
    def _():
        sums[...] = fade * sums[...] + plain

    @pl.when(jnp.logical_not(sound))  # 0 times what may not be seen must be 0: only then look at each value.
    def _():
        finite = jnp.abs(values.astype(jnp.float32)) < jnp.inf
        spoilt = _dot(allowed.astype(values.dtype), jnp.where(finite, 0.0, 1.0).astype(values.dtype), 1 - across)
        weighed = _dot(p.astype(values.dtype), jnp.where(finite, values, jnp.zeros_like(values)), 1 - across)
        sums[...] = fade * sums[...] + jnp.where(spoilt > 0, jnp.nan, weighed)


def _allowed(facts: _Facts, shape: tuple[int, ...], place: Any, length: Any, start: Any) -> Array:
    """Which of a block's columns (places, and heads within a place) each query row may see."""
    row = lax.broadcasted_iota(jnp.int32, (shape[0], 1), 0)
    column = lax.broadcasted_iota(jnp.int32, (1, shape[1]), 1)
    per_query = facts.heads * facts.group
    query = lax.div(row, per_query)
    after = length - facts.queries + 1 + query
    last = jnp.where(query < facts.queries, jnp.minimum(after, facts.slots), 0)  # Rows of padding see nothing.
    first = jnp.maximum(after - facts.window, start) if facts.window else start
    allowed = (column >= (first - place) * facts.heads) & (column < (last - place) * facts.heads)
    if facts.heads > 1:
        head = lax.div(lax.rem(row, per_query), facts.group)
        allowed &= lax.rem(column, facts.heads) == head
    return allowed


def _finish(state: tuple[Any, ...], out: Any, lse: Any) -> None:
    top, total, sums = state
    safe = jnp.where(total[...] == 0, 1.0, total[...])
    out[...] = (sums[...] / safe[:, :1]).astype(out.dtype)
    lse[...] = jnp.where(total[...] == 0, -jnp.inf, top[...] / _LOG2E + jnp.log(safe))


def _dot(a: Array, b: Array, axis: int) -> Array:
    """Rows of `a` with an axis of `b`; float32 at full precision, which Mosaic only knows as HIGHEST."""
    precision = lax.Precision.HIGHEST if a.dtype == jnp.float32 else lax.Precision.DEFAULT
    return lax.dot_general(a, b, (((1,), (axis,)), ((), ())), precision=precision, preferred_element_type=jnp.float32)
