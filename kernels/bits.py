"""Two-byte floats as integers, for cutting and overwriting arrays in loops.

XLA's CPU backend does slices and updates of bfloat16 in float32: inside a loop it would convert the whole array in
every step. Slices and updates of integers stay what they are.
"""

import jax.numpy as jnp
from jax import Array, lax


def bits(x: Array) -> Array:
    """A two-byte float array as uint16; any other array as it is."""
    return lax.bitcast_convert_type(x, jnp.uint16) if _two_byte_float(x.dtype) else x


def floats(x: Array, dtype: jnp.dtype) -> Array:
    """The inverse of `bits` for an array that was of type `dtype`."""
    return lax.bitcast_convert_type(x, dtype) if _two_byte_float(dtype) else x


def stored(dtype: jnp.dtype) -> jnp.dtype:
    """The type that `bits` makes of `dtype`."""
    return jnp.dtype(jnp.uint16) if _two_byte_float(dtype) else jnp.dtype(dtype)


def _two_byte_float(dtype: jnp.dtype) -> bool:
    return jnp.issubdtype(dtype, jnp.floating) and jnp.dtype(dtype).itemsize == 2
