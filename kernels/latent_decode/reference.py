"""Quantised latent decode attention by the book: the cache dequantised whole, then `kernels.decode.reference`."""

import jax.numpy as jnp
from jaxtyping import Array, Float

from kernels.decode import reference
from kernels.decode.call import Call
from kernels.decode.call import Inputs as Joined
from kernels.latent_decode.call import Inputs
from kernels.latent_decode.quantise import Quantised, dequantise


def decode(call: Call, inputs: Inputs) -> tuple[Float[Array, "B T H C"], Float[Array, "B T H"]]:
    """As `kernels.latent_decode.latent_decode`."""
    q, q_rope, values, scales, rope, table, lengths, starts = inputs
    wide = jnp.promote_types(q.dtype, jnp.float32)
    query, rows = joined(q.astype(wide), q_rope, dequantise(Quantised(values, scales), wide), rope)
    out, lse = reference.decode(call, Joined(query, rows, None, table, lengths, starts, None))
    return out.astype(q.dtype), lse


def joined(
    q: Float[Array, "B T H C"], q_rope: Float[Array, "B T H R"], latent: Float[Array, "N S g C"],
    rope: Float[Array, "N S R"],
) -> tuple[Float[Array, "B T H CR"], Float[Array, "N S g CR"]]:  # fmt: skip
    """Queries and cache with the rotary part behind the latent one, in every slice: what `kernels.decode` takes."""
    rope = jnp.broadcast_to(rope[:, :, None].astype(latent.dtype), (*latent.shape[:3], rope.shape[2]))
    return jnp.concatenate([q, q_rope.astype(q.dtype)], -1), jnp.concatenate([latent, rope], -1)
