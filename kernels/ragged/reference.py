"""The ragged layer as one dense product per expert of all rows, differentiated by JAX: the specification."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def ragged(x: Float[Array, "R I"], w: Float[Array, "N I O"], sizes: Int[Array, " N"]) -> Float[Array, "R O"]:
    """Row r times the matrix of its group, accumulated in at least float32; 0 where no group holds r."""
    wide = jnp.promote_types(x.dtype, jnp.float32)
    ends = jnp.cumsum(sizes)
    rows = jnp.arange(x.shape[0])
    own = (rows >= (ends - sizes)[:, None]) & (rows < ends[:, None])
    products = jnp.einsum("ri,nio->nro", x, w.astype(x.dtype), preferred_element_type=wide)
    return jnp.sum(jnp.where(own[..., None], products, 0), axis=0).astype(x.dtype)
