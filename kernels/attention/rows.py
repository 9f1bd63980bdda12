"""Attention of the rows that are wanted: each head's queries that are not are left out, and cost nothing."""

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from kernels.attention import attention, masks
from kernels.tokens import Tokens


def of_active_rows(
    q: Float[Array, "B T H D"],
    k: Float[Array, "B S Hk D"],
    v: Float[Array, "B S Hk Dv"],
    active: Bool[Array, "B T H"],
    *,
    mask: masks.Mask,
    q_tokens: Tokens,
    k_tokens: Tokens,
    sinks: Float[Array, "H"] | None = None,
    **options: Any,
) -> Float[Array, "B T H Dv"]:
    """The output of `kernels.attention.attention` where `active`, 0 elsewhere.

    The queries of each key/value head, those of all its query heads in the order of tokens, are moved together, the
    active ones first, and the op skips the blocks of the others (MoH, arXiv 2410.11842, leaves them out so): work is
    that of the active rows, filled up to whole blocks. `mask` must go by tokens alone, not by head or batch row.
    Differentiable in q, k, v and sinks. `options` are further ones of the op.
    """
    (batch, length, heads, _), kv_heads = q.shape, k.shape[2]
    ratio = heads // kv_heads
    rows = batch * kv_heads

    def fold(x: Array) -> Array:
        """[B|1, T, H, ...] -> [B Hk, T ratio, ...]."""
        rest = x.shape[3:]
        x = jnp.broadcast_to(x, (batch, length, heads, *rest)).reshape(batch, length, kv_heads, ratio, *rest)
        return jnp.moveaxis(x, 2, 1).reshape(rows, length * ratio, *rest)

    chosen = fold(active)
    place = _places(chosen)
    order = jnp.zeros_like(place).at[jnp.arange(rows)[:, None], place].set(jnp.arange(length * ratio, dtype=jnp.int32))

    def gather(x: Array) -> Array:
        return jnp.take_along_axis(x, order.reshape(*order.shape, *(1,) * (x.ndim - 2)), axis=1)

    def column(x: Array) -> Array:
        return gather(fold(jnp.broadcast_to(x[:, :, None], (*x.shape, heads))))

    def keys(x: Array) -> Array:
        return jnp.repeat(x, kv_heads, axis=0) if len(x) > 1 else x

    end = jnp.where(gather(chosen), jnp.iinfo(jnp.int32).max, 0)
    k, v = (jnp.swapaxes(x, 1, 2).reshape(rows, x.shape[1], 1, x.shape[3]) for x in (k, v))
    out, _ = attention(
        gather(fold(q))[:, :, None],
        k,
        v,
        mask=mask & masks.spans_of_queries(jnp.zeros_like(end), end),
        q_tokens=q_tokens.map(column),
        k_tokens=k_tokens.map(keys),
        sinks=None if sinks is None else gather(fold(sinks[None, None]))[:, :, None],
        **options,
    )
    back = jnp.take_along_axis(out[:, :, 0], place[..., None], axis=1)
    if sinks is not None:  # A row of nothing but a sink gives 0 all the same.
        back = jnp.where(chosen[..., None], back, 0)
    back = back.reshape(batch, kv_heads, length, ratio, -1)
    return jnp.moveaxis(back, 1, 2).reshape(batch, length, heads, -1)


def _places(chosen: Bool[Array, "R N"]) -> Int[Array, "R N"]:
    """Where each goes so that the chosen come first, both kinds in their order."""
    count = jnp.cumsum(chosen, axis=1, dtype=jnp.int32)
    number = jnp.arange(chosen.shape[1], dtype=jnp.int32)
    return jnp.where(chosen, count - 1, count[:, -1:] + number - count)
