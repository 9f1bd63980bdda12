"""Decode attention by the book: the specification every other implementation is held to. Forms the whole map."""

import jax.numpy as jnp
from jaxtyping import Array, Float

from kernels.decode import schedule
from kernels.decode.call import Call, Inputs


def decode(call: Call, inputs: Inputs) -> tuple[Float[Array, "B T H Dv"], Float[Array, "B T H"]]:
    """As `kernels.decode.decode_attention`."""
    q, k, v, table, lengths, starts, sinks = inputs
    dtype = jnp.promote_types(q.dtype, jnp.float32)
    v = k[..., : call.value_width] if v is None else v
    if table is not None:
        k, v = (x[jnp.clip(table, 0, len(x) - 1)].reshape(len(table), -1, *x.shape[2:]) for x in (k, v))
    k, v = (jnp.repeat(x, q.shape[2] // k.shape[2], axis=2) for x in (k, v))
    first, last = schedule.visible(lengths, starts, q.shape[1], call.window, k.shape[1])
    place = jnp.arange(k.shape[1])
    allowed = ((place >= first[..., None]) & (place < last[..., None]))[:, None]
    s = call.scale * jnp.einsum("bthd,bshd->bhts", q, k, preferred_element_type=dtype, precision="highest")
    if call.soft_cap:
        s = call.soft_cap * jnp.tanh(s / call.soft_cap)
    s = jnp.where(allowed, s, -jnp.inf)
    sink = jnp.full((1, 1, 1), -jnp.inf, dtype) if sinks is None else sinks.astype(dtype)[:, None, None]
    top = jnp.maximum(s.max(-1, keepdims=True, initial=-jnp.inf), sink)
    top = jnp.where(top == -jnp.inf, 0, top)  # A query without keys: every exp is 0.
    e = jnp.where(allowed, jnp.exp(s - top), 0)
    total = e.sum(-1, keepdims=True) + jnp.exp(sink - top)
    p = e / jnp.where(total == 0, 1, total)
    lse = jnp.where(total == 0, -jnp.inf, top + jnp.log(jnp.where(total == 0, 1, total)))[..., 0]
    sound = jnp.isfinite(v)  # 0 times what may not be seen must be 0.
    out = jnp.einsum("bhts,bshe->bthe", p, jnp.where(sound, v, 0).astype(dtype), precision="highest")
    spoilt = jnp.einsum("bhts,bshe->bthe", jnp.broadcast_to(allowed, p.shape).astype(dtype), (~sound).astype(dtype))
    return jnp.where(spoilt > 0, jnp.nan, out).astype(q.dtype), lse.transpose(0, 2, 1)
