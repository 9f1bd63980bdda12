"""What decode attention costs: floating point operations and bytes as functions of shapes and lengths alone.

With P live (query, key) pairs per head: 2 P (D + Dv). What decides is memory: every key that a row sees is read once,
with its value, or without where the values are columns of the keys. Exponentials are not counted.
"""

from collections.abc import Sequence

import numpy as np


def pairs(lengths: Sequence[int], queries: int = 1, *, window: int = 0, starts: Sequence[int] | int = 0) -> int:
    """Live (query, key) pairs per query head, summed over the rows of the batch; window 0 is none."""
    first, last = _visible(lengths, queries, window, starts)
    return int(np.maximum(last - first, 0).sum())


def keys(lengths: Sequence[int], queries: int = 1, *, window: int = 0, starts: Sequence[int] | int = 0) -> int:
    """Keys that at least one query of their row sees, summed over the rows of the batch."""
    first, last = _visible(lengths, queries, window, starts)
    return int(np.maximum(last.max(1, initial=0) - first.min(1, initial=2**62), 0).sum())


def flops(q: Sequence[int], value_width: int, live: int) -> int:
    """Operations (a multiply-add is two) of queries [B, T, H, D] with `live` pairs, from `pairs`."""
    return 2 * q[2] * live * (q[3] + value_width)


def bytes(
    q: Sequence[int], kv_heads: int, value_width: int, seen: int, *, itemsize: int = 2, shared: bool = False
) -> int:
    """Bytes that must cross memory once: the queries, the `seen` keys (from `keys`) with their values, output and lse.

    `shared`: the values are the first columns of the keys (latent attention), and are not read a second time.
    """
    batch, queries, heads, width = q
    cache = seen * kv_heads * (width + (0 if shared else value_width))
    return itemsize * (cache + batch * queries * heads * (width + value_width)) + 4 * batch * queries * heads


def _visible(
    lengths: Sequence[int], queries: int, window: int, starts: Sequence[int] | int
) -> tuple[np.ndarray, np.ndarray]:
    """First and last (exclusive) place that each query [B, T] sees."""
    last = np.asarray(lengths, np.int64)[:, None] - queries + 1 + np.arange(queries)
    first = np.broadcast_to(np.asarray(starts, np.int64), len(lengths))[:, None]
    first = np.maximum(first, last - window if window else 0)
    return np.maximum(first, 0), np.maximum(last, 0)
