"""Lightning attention as its definition: the dense sum over pairs, and the recurrence, differentiated by JAX."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from kernels.lightning.timeline import Timeline


def dense(
    q: Float[Array, "B T H D"],
    k: Float[Array, "B T H D"],
    v: Float[Array, "B T H E"],
    decay: Float[Array, "H"],
    moments: Timeline,
    initial_state: Float[Array, "B H D E"],
    chunk: int,
) -> tuple[Float[Array, "B T H E"], Float[Array, "B H D E"]]:
    """o_t = sum_{u <= t} exp(-s (clock_t - clock_u)) (q_t . k_u) v_u over t's document: O(T^2) time and memory."""
    dtype, wide = q.dtype, initial_state.dtype
    q, k, v, rate = _widened(q, k, v, decay, moments, wide)
    document, clock = (jnp.pad(jnp.cumsum(jnp.broadcast_to(x, q.shape[:2]), axis=1), ((0, 0), (1, 0))) for x in moments)
    order = jnp.arange(q.shape[1])
    live = (document[:, 1:, None] == document[:, None, 1:]) & (order[:, None] >= order)
    weight = jnp.where(live[:, None], jnp.exp(-rate * jnp.maximum(_ages(clock[:, 1:], clock[:, 1:]), 0)), 0)
    out = jnp.einsum("bhtu,bthd,buhd,buhe->bthe", weight, q, k, v)
    since = jnp.where((document[:, 1:] == 0)[:, None], jnp.exp(-rate[..., 0] * clock[:, None, 1:]), 0)
    out = out + jnp.einsum("bht,bthd,bhde->bthe", since, q, initial_state)
    until = jnp.exp(-rate * _ages(clock[:, -1:], clock)) * (document[:, -1:, None] == document[:, None])[:, None]
    state = until[..., :1] * initial_state + jnp.einsum("bhtu,buhd,buhe->bhde", until[..., 1:], k, v)
    return jnp.where(moments.valid[..., None, None], out, 0).astype(dtype), state


def recurrent(
    q: Float[Array, "B T H D"],
    k: Float[Array, "B T H D"],
    v: Float[Array, "B T H E"],
    decay: Float[Array, "H"],
    moments: Timeline,
    initial_state: Float[Array, "B H D E"],
    chunk: int,
) -> tuple[Float[Array, "B T H E"], Float[Array, "B H D E"]]:
    """KV_t = exp(-s) KV_{t-1} + k_t v_t^T, o_t = q_t KV_t, one token at a time; a new document forgets everything."""
    dtype, wide = q.dtype, initial_state.dtype
    q, k, v, rate = _widened(q, k, v, decay, moments, wide)

    def step(state, token):
        q, k, v, begins, valid = token
        kept = jnp.where(begins[:, None, None, None], 0, jnp.exp(-rate * valid[:, None, None, None]) * state)
        state = kept + k[..., None] * v[..., None, :]
        return state, jnp.einsum("bhd,bhde->bhe", q, state)

    begins, valid = (jnp.broadcast_to(x, q.shape[:2]) for x in moments)
    tokens = jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0), (q, k, v, begins, valid))
    state, out = jax.lax.scan(step, initial_state, tokens)
    return jnp.moveaxis(out, 0, 1).astype(dtype), state


def _widened(q, k, v, decay, moments, wide):
    """Everything in the state's type, padding zeroed; the decay is a constant and takes no gradient."""
    valid = jnp.broadcast_to(moments.valid, q.shape[:2])[..., None, None]
    q, k, v = (jnp.where(valid, x.astype(wide), 0) for x in (q, k, v))
    rate = jax.lax.stop_gradient(decay).astype(wide)[None, :, None, None]
    return q, k, v, rate


def _ages(later, earlier):
    return later[:, None, :, None] - earlier[:, None, None, :]
