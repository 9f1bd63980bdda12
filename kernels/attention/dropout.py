"""Dropout of attention probabilities as a function of seed, batch row, head, query and key: the same in every kernel.

A counter-based generator: each pair's number is a hash of its row's and its column's, so any block of the map can be
made anywhere, forwards and backwards, without storing it.
"""

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Int


def columns(
    seed: Int[Array, ""], batch: int, heads: int, length: int, keys: int
) -> tuple[Int[Array, "B H T"], Int[Array, "1 1 S"]]:
    """Hashes of rows and of keys, int32."""
    seed = _mixed(jnp.asarray(seed).astype(jnp.int32) ^ np.int32(0x5BD1E995))
    rows = jnp.arange(batch * heads, dtype=jnp.int32).reshape(batch, heads, 1)
    rows = _mixed(_mixed(rows ^ seed) + jnp.arange(length, dtype=jnp.int32))
    cols = _mixed(jnp.arange(keys, dtype=jnp.int32) ^ np.int32(0x2545F491))
    return rows, cols[None, None]


def kept(rows: Int[Array, "..."], cols: Int[Array, "..."], rate: float) -> Bool[Array, "..."]:
    """True with probability 1 - rate, pair by pair."""
    # The top 24 bits of the hash as a whole number below 2^24.
    number = lax.shift_right_logical(_mixed(rows ^ cols), np.int32(8))
    return number >= np.int32(round(rate * (1 << 24)))


def _mixed(x: Array) -> Array:
    """The finaliser of MurmurHash3: every bit of the input moves every bit of the output."""
    x = x ^ lax.shift_right_logical(x, np.int32(16))
    x = x * np.int32(0x85EBCA6B - (1 << 32))
    x = x ^ lax.shift_right_logical(x, np.int32(13))
    x = x * np.int32(0xC2B2AE35 - (1 << 32))
    return x ^ lax.shift_right_logical(x, np.int32(16))
