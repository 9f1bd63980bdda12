"""The dense layer as one line of jnp, differentiated by JAX: the specification."""

import jax.numpy as jnp
from jaxtyping import Array, Float


def linear(
    x: Float[Array, "... I"], w: Float[Array, "I O"], bias: Float[Array, "O"] | None = None
) -> Float[Array, "... O"]:
    """x @ w (+ bias), accumulated in at least float32 and rounded once to x's type."""
    wide = jnp.promote_types(x.dtype, jnp.float32)
    out = jnp.dot(x, w.astype(x.dtype), preferred_element_type=wide)
    return (out if bias is None else out + bias.astype(wide)).astype(x.dtype)
