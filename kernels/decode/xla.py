"""Decode attention in plain XLA: reads the live blocks of a cache once, sound on every platform.

The query heads of a key/value head and the queries ride together as the rows of one product per block. A block of keys
is cut out of the cache (or gathered from its pages) when its turn comes, so nothing of the cache's size is ever formed,
and turned over, heads first, which makes XLA's products on CPU three times as fast. There the rows of the batch are
looped over, each over its own live blocks, and two-byte floats are widened; elsewhere rows advance together.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from kernels.bits import bits, floats
from kernels.decode import limits, schedule
from kernels.decode.call import Call, Inputs
from kernels.decode.combine import combine
from kernels.platform import default_platform
from kernels.varying import alike


def decode(call: Call, inputs: Inputs) -> tuple[Float[Array, "B T H Dv"], Float[Array, "B T H"]]:
    """As `kernels.decode.decode_attention`."""
    q, k, v, table, lengths, starts, sinks = inputs
    batch, queries, heads, width = q.shape
    kv_heads, dtype = k.shape[2], q.dtype
    group, splits = heads // kv_heads, call.splits or 1
    wide = jnp.promote_types(dtype, jnp.float32)
    on_cpu = default_platform() == "cpu"
    slots = inputs.slots
    take, size = _blocks(k, v, table, min(limits.XLA_BLOCK, slots), wide if on_cpu else dtype)
    first, last = schedule.visible(lengths, starts, queries, call.window, slots)
    begin, count = schedule.parts(first, last, size, splits)
    rows = q.reshape(batch, queries, kv_heads, group, width).transpose(0, 2, 1, 3, 4)
    rows = rows.reshape(batch, kv_heads, queries * group, width)
    sink = jnp.full((heads,), -jnp.inf, wide) if sinks is None else sinks.astype(wide)
    sink = jnp.tile(sink.reshape(kv_heads, group), (1, queries))

    def attend(work: tuple[Array, Array, Array, Array]) -> tuple[Array, Array]:
        """Output and lse of one row of the batch over one part of its blocks."""
        row, part, begin, count = work
        low, high = (jnp.repeat(x[row], group)[:, None] for x in (first, last))

        def add(i: Array, state: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
            top, total, out = state
            keys, values, place = take(row, i)
            query = rows[row].astype(keys.dtype)
            s = call.scale * jnp.einsum("hrd,hsd->hrs", query, keys, preferred_element_type=wide, precision="highest")
            if call.soft_cap:
                s = call.soft_cap * jnp.tanh(s / call.soft_cap)
            allowed = (place >= low) & (place < high) & (place >= i * size)
            s = jnp.where(allowed, s, -jnp.inf)
            higher = jnp.maximum(top, s.max(-1))
            level = jnp.where(higher == -jnp.inf, 0, higher)
            p, fade = jnp.exp(s - level[..., None]), jnp.exp(top - level)
            # The whole row, of which the values are a part, is faster than cutting them out first.
            added = _weigh(p, keys if values is None else values, allowed, wide)[..., : call.value_width]
            return higher, fade * total + p.sum(-1), fade[..., None] * out + added

        top = jnp.where(part == 0, sink, -jnp.inf)  # A sink is a key of value 0, seen by the first part.
        state = (
            top,
            jnp.where(top == -jnp.inf, 0.0, 1.0).astype(wide),
            jnp.zeros((*top.shape, call.value_width), wide),
        )
        top, total, out = lax.fori_loop(begin, begin + count, add, alike(state, *(x for x in (q, k, v, table, begin))))
        safe = jnp.where(total == 0, 1, total)
        return out / safe[..., None], jnp.where(total == 0, -jnp.inf, top + jnp.log(safe))

    part = jnp.arange(batch * splits, dtype=jnp.int32)
    work = (part // splits, part % splits, begin.reshape(-1), count.reshape(-1))
    out, lse = lax.map(attend, work) if on_cpu else jax.vmap(attend)(work)
    out, lse = (x.reshape(batch, splits, kv_heads, queries, group, *x.shape[3:]) for x in (out, lse))
    out, lse = combine(out, lse, axis=1) if splits > 1 else (out[:, 0], lse[:, 0])
    out, lse = (x.swapaxes(1, 2).reshape(batch, queries, heads, *x.shape[4:]) for x in (out, lse))
    return out.astype(dtype), lse


def _weigh(p: Array, values: Array, allowed: Array, wide: Any) -> Array:
    """p times the values, where what may not be seen counts nothing even if it is no number.

    The plain product tells whether there is such a thing; only then are values looked at one by one.
    """
    product = lambda p, x: jnp.einsum(  # noqa: E731
        "hrs,hse->hre", p.astype(x.dtype), x, preferred_element_type=wide, precision="highest"
    )
    plain = product(p, values)

    def careful() -> Array:
        sound = jnp.isfinite(values)
        spoilt = product(jnp.broadcast_to(allowed, p.shape), (~sound).astype(values.dtype))
        return jnp.where(spoilt > 0, jnp.nan, product(p, jnp.where(sound, values, 0)))

    return lax.cond(jnp.isfinite(plain).all(), lambda: plain, careful)


def _blocks(k: Array, v: Array | None, table: Array | None, block: int, dtype: Any) -> tuple[Any, int]:
    """A function (row, number of block) -> keys [Hk, size, D], values or None, places [size]; and the size."""
    stored = [bits(x) for x in (k, v) if x is not None]

    def unpacked(blocks: list[Array]) -> tuple[Array, Array | None]:
        keys, *values = [floats(x, k.dtype).swapaxes(0, 1).astype(dtype) for x in blocks]
        if k.shape[2] > 1:
            keys, *values = lax.optimization_barrier([keys, *values])
        return keys, values[0] if values else None

    if table is None:

        def cut(row: Array, i: Array) -> tuple[Array, Array | None, Array]:
            at = jnp.minimum(i * block, k.shape[1] - block)  # The last block may overlap the one before.
            none = jnp.zeros_like(row)
            blocks = [lax.dynamic_slice(x, (row, at, none, none), (1, block, *x.shape[2:]))[0] for x in stored]
            return *unpacked(blocks), at + jnp.arange(block, dtype=jnp.int32)

        return cut, block
    page = k.shape[1]
    pages = max(1, block // page)
    table = jnp.pad(jnp.clip(table, 0, k.shape[0] - 1), ((0, 0), (0, -table.shape[1] % pages)))

    def gather(row: Array, i: Array) -> tuple[Array, Array | None, Array]:
        at = lax.dynamic_slice(table, (row, i * pages), (1, pages))[0]
        blocks = [x[at].reshape(pages * page, *x.shape[2:]) for x in stored]
        return *unpacked(blocks), i * pages * page + jnp.arange(pages * page, dtype=jnp.int32)

    return gather, pages * page
