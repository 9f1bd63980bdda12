"""Quantised latent decode attention on TPU (Mosaic): a cache passes once through VMEM, in eight bits.

Scales are never multiplied into the cache: numbers of eight bits are exact in bfloat16, and a block of channels shares
its scale, so the part of the scores that comes from the block is multiplied by it, and so are the weights that the
block's values get. For fewer than 128 rows that is less than to multiply the cache out, and nothing is rounded twice.

Blocks are cut in the form in which XLA keeps the arrays: channels in the lanes where 128 divides them (latents), else
places (scales, and rotary keys of width 64). The grid is that of `kernels.decode.pallas_tpu`: pieces of work times as
many blocks as the longest has, those left over asking for the next piece's first block. A block of a cache in pages is
as many inputs as it has pages, each copied by Mosaic's pipeline from where the table says.
"""

import dataclasses
import math
from typing import Any

import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Float

from kernels.decode import schedule
from kernels.decode.call import Call
from kernels.decode.combine import combine
from kernels.latent_decode import limits
from kernels.latent_decode.call import Inputs
from kernels.platform import device_kind, interpreting
from kernels.varying import result

_LANES = 128
_VMEM = 64 << 20
_LOG2E, _LN2 = math.log2(math.e), math.log(2)


@dataclasses.dataclass(frozen=True)
class _Facts:
    """What is known of a call while it is traced; sizes of blocks are in places of the cache."""

    call: Call
    queries: int
    group: int  # Query heads of a slice.
    slices: int
    rows: int  # Query rows of a slice, padded.
    slots: int
    block: int
    splits: int
    page: int
    careful: bool  # The cache may hold what is no number.

    def at(self, piece: Any) -> tuple[Any, Any]:
        """Row of the batch and slice of a piece of work."""
        rest = lax.div(piece, self.splits)
        return lax.div(rest, self.slices), lax.rem(rest, self.slices)


def decode(call: Call, inputs: Inputs) -> tuple[Float[Array, "B T H C"], Float[Array, "B T H"]]:
    """As `kernels.latent_decode.latent_decode`."""
    q, q_rope, values, scales, rope, table, lengths, starts = inputs
    (batch, queries, heads, width), slices = q.shape, values.shape[2]
    if table is not None and table.size > limits.TPU_TABLE and batch > 1:  # Tables lie in scalar memory: 1 MiB.
        half = batch // 2
        halves = [
            decode(call, Inputs(q[part], q_rope[part], values, scales, rope, table[part], lengths[part], starts[part]))
            for part in (slice(None, half), slice(half, None))
        ]
        return tuple(map(jnp.concatenate, zip(*halves, strict=True)))  # type: ignore[return-value]
    count, tile = queries * heads // slices, 32 // q.dtype.itemsize
    rows = -(-count // tile) * tile
    page = 0 if table is None else values.shape[1]
    block = limits.tpu_block(rows, width, page, inputs.slots)
    kind = device_kind()
    splits = call.splits
    if splits is None:
        cores = schedule.units(kind) if "TPU" in kind else 1
        splits = schedule.choose_splits(batch * slices, -(-inputs.slots // block), cores)
    careful = values.dtype == jnp.float8_e4m3fn
    facts = _Facts(call, queries, heads // slices, slices, rows, inputs.slots, block, splits, page, careful)

    def packed(x: Array) -> Array:
        """[B, T, H, W] to [B, g, rows, W]."""
        x = x.reshape(batch, queries, slices, -1, x.shape[3]).swapaxes(1, 2).reshape(batch, slices, count, -1)
        return jnp.pad(x, ((0, 0), (0, 0), (0, rows - count), (0, 0)))

    out, lse = _run(facts, packed(q), packed(q_rope), inputs)
    out, lse = (x.reshape(batch, slices, splits, *x.shape[1:])[:, :, :, :count] for x in (out, lse[..., 0]))
    out, lse = combine(out, lse, axis=2) if splits > 1 else (out[:, :, 0], lse[:, :, 0])
    out, lse = (x.reshape(batch, slices, queries, -1, *x.shape[3:]).swapaxes(1, 2) for x in (out, lse))
    out, lse = (x.reshape(batch, queries, heads, *x.shape[4:]) for x in (out, lse))
    return out.astype(q.dtype), lse


def _run(facts: _Facts, q: Array, q_rope: Array, inputs: Inputs) -> tuple[Array, Array]:
    """Results [pieces, rows, C] and [pieces, rows, 128]."""
    table, lengths, starts = inputs.table, inputs.lengths, inputs.starts
    pieces, blocks = q.shape[0] * facts.slices * facts.splits, -(-facts.slots // facts.block)
    first, last = schedule.visible(lengths, starts, facts.queries, facts.call.window, facts.slots)
    begin, count = schedule.parts(first, last, facts.block, facts.splits)
    begin, count = (jnp.repeat(x[:, None], facts.slices, axis=1).reshape(-1) for x in (begin, count))
    scalars = [begin, count, schedule.next_live(count), lengths, starts]
    per_block, entries = 1, 0
    if table is not None:
        per_block, entries = facts.block // facts.page, table.shape[1]
        bounds = first[:, 0] // facts.page, (last[:, -1] - 1) // facts.page
        scalars += [jnp.clip(x, 0, entries - 1) for x in bounds]
        scalars.append(jnp.clip(table, 0, inputs.values.shape[0] - 1).reshape(-1))

    def block_at(piece: Any, step: Any, begin: Any, count: Any, after: Any) -> tuple[Any, Any, Any]:
        """Row of the batch, slice and block that a step needs, or the next one that does."""
        live, then = step < count[piece], after[piece]
        idle = jnp.where(then == piece, begin[piece] + jnp.maximum(count[piece] - 1, 0), begin[then])
        block = jnp.minimum(jnp.where(live, begin[piece] + step, idle), blocks - 1)
        return *facts.at(jnp.where(live, piece, then)), block

    def spec(x: Array, across: bool, number: int) -> pl.BlockSpec:
        """Of a view [N, g or 1, S, W], or [N, g or 1, W, S] if `across`; of page `number` of a block, in pages."""

        def index(piece: Any, step: Any, begin: Any, count: Any, after: Any, *more: Any) -> tuple[Any, ...]:
            row, own, block = block_at(piece, step, begin, count, after)
            if table is not None:
                low, high, pages = more[2:]
                entry = jnp.clip(block * per_block + number, low[row], high[row])
                row, block = pages[row * entries + entry], 0
            own = own if x.shape[1] > 1 else 0
            return (row, own, 0, block) if across else (row, own, block, 0)

        size = facts.page or facts.block
        return pl.BlockSpec((None, None, x.shape[2], size) if across else (None, None, size, x.shape[3]), index)

    operands, specs, across = [], [], []
    for x in (inputs.values, inputs.scales, inputs.rope[:, :, None]):
        across.append(x.shape[3] % _LANES > 0)
        x = x.transpose((0, 2, 3, 1) if across[-1] else (0, 2, 1, 3))
        operands += [x] * per_block
        specs += [spec(x, across[-1], number) for number in range(per_block)]

    def kernel(*refs):
        begin, count, _, lengths, starts, *_ = refs[: len(scalars)]
        q, q_rope, *cache = refs[len(scalars) : -5]
        out, lse, *state = refs[-5:]
        piece, step = pl.program_id(0), pl.program_id(1)
        row, _ = facts.at(piece)
        top, total, sums = state

        @pl.when(step == 0)
        def _():
            top[...] = jnp.full_like(top, -jnp.inf)
            total[...] = jnp.zeros_like(total)
            sums[...] = jnp.zeros_like(sums)

        @pl.when(step < count[piece])
        def _():
            values, scales, rope = (
                jnp.concatenate([ref[...] for ref in cache[n * per_block : (n + 1) * per_block]], int(lies_across))
                for n, lies_across in enumerate(across)
            )
            scores = _dot(q_rope[...], rope, 0 if across[2] else 1)
            place = (begin[piece] + step) * facts.block
            _attend(facts, scores, q[...], values, scales, place, lengths[row], starts[row], state)

        @pl.when(step == pl.num_programs(1) - 1)
        def _():
            safe = jnp.where(total[...] == 0, 1.0, total[...])
            out[...] = (sums[...] / safe[:, :1]).astype(out.dtype)
            lse[...] = jnp.where(total[...] == 0, -jnp.inf, top[...] * _LN2 + jnp.log(safe))

    def query(x: Array) -> pl.BlockSpec:
        return pl.BlockSpec((None, None, *x.shape[2:]), lambda piece, step, *_: (*facts.at(piece), 0, 0))

    width = q.shape[3]
    sources = (q, q_rope, begin, *operands)
    outputs = ((width, q.dtype if facts.splits == 1 else jnp.float32), (_LANES, jnp.float32))
    lanes = pltpu.VMEM((facts.rows, _LANES), jnp.float32)
    return pl.pallas_call(
        kernel,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(scalars),
            grid=(pieces, jnp.maximum(count.max(), 1)),
            in_specs=[query(q), query(q_rope), *specs],
            out_specs=[pl.BlockSpec((None, facts.rows, size), lambda piece, *_: (piece, 0, 0)) for size, _ in outputs],
            scratch_shapes=[lanes, lanes, pltpu.VMEM((facts.rows, width), jnp.float32)],
        ),
        out_shape=[result((pieces, facts.rows, size), dtype, *sources) for size, dtype in outputs],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=_VMEM),
        interpret=interpreting(),
        name="latent_decode" if table is None else "paged_latent_decode",
    )(*scalars, q, q_rope, *operands)


def _attend(
    facts: _Facts, s: Array, q: Array, values: Array, scales: Array, place: Any, length: Any, start: Any, state: Any
) -> None:
    """Takes one block of the cache, which begins at `place`, into the state; `s` is the rotary part of its scores."""
    top, total, sums = state
    values, width = values.astype(q.dtype), q.shape[1] // scales.shape[0]
    channels = [slice(at, at + width) for at in range(0, q.shape[1], width)]
    for b, own in enumerate(channels):
        s += _dot(q[:, own], values[:, own], 1) * scales[b : b + 1]
    soft_cap, scale = facts.call.soft_cap, facts.call.scale
    s = soft_cap * _LOG2E * jnp.tanh(s * (scale / soft_cap)) if soft_cap else s * (scale * _LOG2E)
    allowed = _allowed(facts, s.shape, place, length, start)
    s = jnp.where(allowed, s, -jnp.inf)
    before = top[:, :1]
    higher = jnp.maximum(before, s.max(1, keepdims=True))
    level = jnp.where(higher == -jnp.inf, 0.0, higher)
    p, fade = jnp.exp2(s - level), jnp.exp2(before - level)
    top[...] = jnp.broadcast_to(higher, top.shape)
    total[...] = jnp.broadcast_to(fade * total[:, :1] + p.sum(1, keepdims=True), total.shape)
    weights = [jnp.where(allowed, p * scales[b : b + 1], 0.0).astype(q.dtype) for b in range(len(channels))]

    def weighed(values: Array) -> list[Array]:
        return [_dot(weight, values[:, own], 0) for own, weight in zip(channels, weights, strict=True)]

    def add(parts: list[Array]) -> None:
        for own, part in zip(channels, parts, strict=True):
            sums[:, own] = fade * sums[:, own] + part

    plain = weighed(values)
    if not facts.careful:
        add(plain)
        return
    sound = sum(jnp.sum(part * 0.0) for part in plain) == 0.0
    pl.when(sound)(lambda: add(plain))

    @pl.when(jnp.logical_not(sound))  # 0 times what may not be seen must be 0. What may is in the scores already.
    def _() -> None:
        wide = values.astype(jnp.float32)
        add(weighed(jnp.where(wide == wide, wide, 0.0).astype(values.dtype)))


def _allowed(facts: _Facts, shape: tuple[int, ...], place: Any, length: Any, start: Any) -> Array:
    """Which of a block's places each query row may see."""
    query = lax.div(lax.broadcasted_iota(jnp.int32, (shape[0], 1), 0), facts.group)
    column = lax.broadcasted_iota(jnp.int32, (1, shape[1]), 1)
    after = length - facts.queries + 1 + query
    last = jnp.where(query < facts.queries, jnp.minimum(after, facts.slots), 0)  # Rows of padding see nothing.
    window = facts.call.window
    first = jnp.maximum(after - window, start) if window else start
    return (column >= first - place) & (column < last - place)


def _dot(a: Array, b: Array, axis: int) -> Array:
    """Rows of `a` with an axis of `b`; float32 at full precision, which Mosaic only knows as HIGHEST."""
    precision = lax.Precision.HIGHEST if a.dtype == jnp.float32 else lax.Precision.DEFAULT
    return lax.dot_general(a, b, (((1,), (axis,)), ((), ())), precision=precision, preferred_element_type=jnp.float32)
