"""Attention over parts of the keys, put together from what each part gave."""

import jax.numpy as jnp
from jaxtyping import Array, Float


def combine(
    outs: Float[Array, "*N Dv"], lses: Float[Array, "*N"], axis: int = 0
) -> tuple[Float[Array, "*M Dv"], Float[Array, "*M"]]:
    """Output and log-sum-exp (natural log) of attention over all keys, from those of disjoint sets of keys.

    `outs` and `lses` hold one set per index of `axis` (counted among the axes of `lses`); the softmax of each set is
    already divided by its own sum. A set without keys (lse -inf) has weight exactly 0, whatever its output holds; no
    keys at all give 0 and -inf. Float32 (float64 for float64 inputs). The sets may be splits of one cache or shards of
    a sequence: Dao et al. 2023, Flash-Decoding.
    """
    wide = jnp.promote_types(outs.dtype, jnp.float32)
    outs, lses, axis = outs.astype(wide), lses.astype(wide), axis % lses.ndim
    top = lses.max(axis, keepdims=True, initial=-jnp.inf)
    top = jnp.where(top == -jnp.inf, 0, top)
    empty = lses == -jnp.inf
    weight = jnp.where(empty, 0, jnp.exp(lses - top))
    total = weight.sum(axis)
    outs = jnp.where(empty[..., None], 0, outs)
    out = (outs * weight[..., None]).sum(axis) / jnp.where(total == 0, 1, total)[..., None]
    return out, jnp.where(total == 0, -jnp.inf, jnp.squeeze(top, axis) + jnp.log(jnp.where(total == 0, 1, total)))
