"""Quantised latent decode attention in plain XLA: the live blocks of a cache are read once, sound on every platform.

A block is cut out of the cache (or gathered from its pages) in eight bits when its turn comes and multiplied out there,
so that no more than a block of it is ever held in a wider type. On CPU the rows of the batch are looped over, each over
its own live blocks, in float32; elsewhere rows advance together, in the type of the queries.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Float

from kernels.bits import bits, floats
from kernels.decode import schedule
from kernels.decode.call import Call
from kernels.decode.combine import combine
from kernels.latent_decode import limits
from kernels.latent_decode.call import Inputs
from kernels.platform import default_platform
from kernels.varying import alike


def decode(call: Call, inputs: Inputs) -> tuple[Float[Array, "B T H C"], Float[Array, "B T H"]]:
    """As `kernels.latent_decode.latent_decode`."""
    q, q_rope, *_, lengths, starts = inputs
    batch, queries, heads, width = q.shape
    slices, splits, slots = inputs.values.shape[2], call.splits or 1, inputs.slots
    wide = jnp.promote_types(q.dtype, jnp.float32)
    on_cpu = default_platform() == "cpu"
    take, size = _blocks(inputs, min(limits.XLA_BLOCK, slots), wide if on_cpu else q.dtype)
    first, last = schedule.visible(lengths, starts, queries, call.window, slots)
    begin, count = schedule.parts(first, last, size, splits)

    def packed(x: Array) -> Array:
        """[B, T, H, ...] to [B, g, rows, ...]."""
        x = x.reshape(batch, queries, slices, heads // slices, -1).swapaxes(1, 2)
        return x.reshape(batch, slices, queries * (heads // slices), -1)

    rows, rope_rows = packed(q), packed(q_rope)

    def product(form: str, a: Array, b: Array) -> Array:
        return jnp.einsum(form, a.astype(b.dtype), b, preferred_element_type=wide, precision="highest")

    def attend(work: tuple[Array, Array, Array]) -> tuple[Array, Array]:
        """Output and lse of one row of the batch over one part of its blocks."""
        row, begin, count = work
        low, high = (jnp.repeat(x[row], heads // slices)[:, None] for x in (first, last))

        def add(i: Array, state: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
            top, total, out = state
            latent, rope, place = take(row, i)
            s = product("grc,gsc->grs", rows[row], latent) + product("grc,sc->grs", rope_rows[row], rope)
            # 0 times what may not be seen must be 0. Where it may be seen it is in the scores already.
            latent = lax.cond(jnp.isfinite(s).all(), lambda: latent, lambda: jnp.where(jnp.isfinite(latent), latent, 0))
            s *= call.scale
            if call.soft_cap:
                s = call.soft_cap * jnp.tanh(s / call.soft_cap)
            allowed = (place >= low) & (place < high) & (place >= i * size)
            s = jnp.where(allowed, s, -jnp.inf)
            higher = jnp.maximum(top, s.max(-1))
            level = jnp.where(higher == -jnp.inf, 0, higher)
            p, fade = jnp.exp(s - level[..., None]), jnp.exp(top - level)
            return higher, fade * total + p.sum(-1), fade[..., None] * out + product("grs,gsc->grc", p, latent)

        nothing = jnp.zeros(rows.shape[1:3], wide)
        state = (nothing - jnp.inf, nothing, jnp.zeros((*nothing.shape, width), wide))
        state = alike(state, *inputs)
        top, total, out = lax.fori_loop(begin, begin + count, add, state)
        safe = jnp.where(total == 0, 1, total)
        return out / safe[..., None], jnp.where(total == 0, -jnp.inf, top + jnp.log(safe))

    work = (jnp.arange(batch * splits, dtype=jnp.int32) // splits, begin.reshape(-1), count.reshape(-1))
    out, lse = lax.map(attend, work) if on_cpu else jax.vmap(attend)(work)
    out, lse = (x.reshape(batch, splits, slices, queries, -1, *x.shape[3:]) for x in (out, lse))
    out, lse = combine(out, lse, axis=1) if splits > 1 else (out[:, 0], lse[:, 0])
    out, lse = (x.swapaxes(1, 2).reshape(batch, queries, heads, *x.shape[4:]) for x in (out, lse))
    return out.astype(q.dtype), lse


def _blocks(inputs: Inputs, block: int, dtype: Any) -> tuple[Any, int]:
    """A function (row, number of block) -> latents [g, size, C], rotary keys [size, R], places [size]; and the size."""
    values, scales, rope, table = inputs[2:6]
    stored = [values, scales, bits(rope)]

    def unpacked(values: Array, scales: Array, keys: Array) -> tuple[Array, Array]:
        wide = jnp.promote_types(dtype, jnp.float32)
        latent = values.astype(wide).reshape(*scales.shape, -1) * scales[..., None].astype(wide)
        latent = latent.astype(dtype).reshape(values.shape).swapaxes(0, 1)
        return latent, floats(keys, rope.dtype).astype(dtype)

    if table is None:

        def cut(row: Array, i: Array) -> tuple[Array, Array, Array]:
            at = jnp.minimum(i * block, values.shape[1] - block)  # The last block may overlap the one before.
            none = [jnp.zeros_like(row)] * 2
            blocks = [lax.dynamic_slice(x, (row, at, *none[: x.ndim - 2]), (1, block, *x.shape[2:]))[0] for x in stored]
            return *unpacked(*blocks), at + jnp.arange(block, dtype=jnp.int32)

        return cut, block
    page = values.shape[1]
    pages = max(1, block // page)
    table = jnp.pad(jnp.clip(table, 0, values.shape[0] - 1), ((0, 0), (0, -table.shape[1] % pages)))

    def gather(row: Array, i: Array) -> tuple[Array, Array, Array]:
        at = lax.dynamic_slice(table, (row, i * pages), (1, pages))[0]
        blocks = [x[at].reshape(pages * page, *x.shape[2:]) for x in stored]
        return *unpacked(*blocks), i * pages * page + jnp.arange(pages * page, dtype=jnp.int32)

    return gather, pages * page
