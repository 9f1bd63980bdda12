"""What quantised latent decode attention costs: floating point operations and bytes, from shapes and lengths alone.

With P live (query, key) pairs per head (`kernels.decode.cost.pairs`): 2 P (2 C + R) operations, those of a cache that
is not quantised. A token that is seen is read once: C bytes and its scales in every slice, and one rotary key.
"""

from collections.abc import Sequence

from kernels.decode.cost import keys, pairs

__all__ = ["bytes", "flops", "keys", "pairs", "token_bytes"]


def flops(q: Sequence[int], rope_width: int, live: int) -> int:
    """Operations (a multiply-add is two) of queries [B, T, H, C] with `live` pairs, from `pairs`."""
    return 2 * q[2] * live * (2 * q[3] + rope_width)


def token_bytes(width: int, rope_width: int, *, slices: int = 1, blocks: int = 1, itemsize: int = 2) -> int:
    """Bytes of a token's cache: `slices` of `width` channels with `blocks` scales each, and the rotary key."""
    return slices * (width + 4 * blocks) + itemsize * rope_width


def bytes(q: Sequence[int], rope_width: int, seen: int, *, slices: int = 1, blocks: int = 1, itemsize: int = 2) -> int:
    """Bytes that must cross memory once: the queries, the `seen` tokens (from `keys`), output and lse."""
    batch, queries, heads, width = q
    rows = batch * queries * heads
    cache = seen * token_bytes(width, rope_width, slices=slices, blocks=blocks, itemsize=itemsize)
    return cache + rows * (itemsize * (2 * width + rope_width) + 4)
