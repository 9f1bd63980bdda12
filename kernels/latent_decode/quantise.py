"""A cache in eight bits: symmetric, one scale per token and block of channels."""

from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Shaped

#: The greatest number of each type a cache can be kept in.
MOST = {jnp.dtype(jnp.int8): 127.0, jnp.dtype(jnp.float8_e4m3fn): 448.0}


class Quantised(NamedTuple):
    """Numbers of eight bits, and what the channels of each block of a token are to be multiplied by."""

    values: Shaped[Array, "*N C"]  # int8 or float8_e4m3fn.
    scales: Float[Array, "*N blocks"]  # float32.


def quantise(x: Float[Array, "*N C"], *, dtype: Any = jnp.int8, block: int | None = None) -> Quantised:
    """Each `block` of channels divided by its scale, its greatest magnitude over the greatest number of the type.

    `block` is 128 by default, as in FlashMLA's cache, or the whole width where 128 does not divide it. Int8 is off by
    at most half a scale; float8_e4m3fn by 2^-4 of the number, or by 2^-10 of a scale where that is more. A block of
    zeros has scale 1. A block that holds what is no finite number has a scale that is none either: it becomes NaN.

    Raises: `ValueError` for another type, and where `block` does not divide the width.
    """
    width, dtype = x.shape[-1], jnp.dtype(dtype)
    block = block or (128 if width % 128 == 0 else width)
    if dtype not in MOST:
        raise ValueError(f"quantise: it knows {' and '.join(str(known) for known in MOST)}, not {dtype}")
    if block < 1 or width % block:
        raise ValueError(f"quantise: blocks of {block} channels do not divide {width}")
    blocks = x.astype(jnp.float32).reshape(*x.shape[:-1], width // block, block)
    scale = jnp.abs(blocks).max(-1, keepdims=True) / MOST[dtype]
    scale = jnp.where(scale < jnp.finfo(jnp.float32).tiny, 1, scale)
    scaled = jnp.clip(jnp.nan_to_num(blocks / scale), -MOST[dtype], MOST[dtype])
    scaled = jnp.round(scaled) if dtype == jnp.int8 else scaled
    return Quantised(scaled.astype(dtype).reshape(x.shape), scale[..., 0])


def dequantise(x: Quantised, dtype: Any = jnp.float32) -> Float[Array, "*N C"]:
    """The numbers that a quantised array stands for, multiplied out in float32."""
    width = x.values.shape[-1] // x.scales.shape[-1]
    blocks = x.values.astype(jnp.float32).reshape(*x.scales.shape, width)
    return (blocks * x.scales[..., None]).astype(dtype).reshape(x.values.shape)
