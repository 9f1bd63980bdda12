"""What attention costs: floating point operations and bytes as functions of shapes and mask, and of nothing measured.

With P live (query, key) pairs of a head: forward 2 P (D + Dv); the useful backward 2 P (3 D + 2 Dv): scores, dP, dQ,
dK, dV. Exponentials and other elementwise work are not counted.
"""

from collections.abc import Sequence

import numpy as np

from kernels.attention.masks import EMPTY, And, Causal, Everything, Mask, SlidingWindow
from kernels.tokens import Tokens


def pairs(mask: Mask, length: int, keys: int | None = None, tokens: tuple[Tokens, Tokens] | None = None) -> float:
    """Live (query, key) pairs per head and batch row; queries stand at the end of the keys, or where `tokens` say.

    Closed forms for causal masks and windows. Of any other mask the full blocks are counted whole and the partial ones
    looked at; the count is averaged over the batch rows of `tokens` and over heads.
    """
    keys = length if keys is None else keys
    if tokens is None:
        terms = mask.terms if isinstance(mask, And) else (mask,)
        if all(isinstance(term, Everything) for term in terms):
            return float(length * keys)
        if all(isinstance(term, (Causal, SlidingWindow)) for term in terms) and Causal() in terms:
            windows = [term.size for term in terms if isinstance(term, SlidingWindow)]
            return float(_banded(length, keys, min([*windows, keys])))
        tokens = _aligned(length, keys)
    sides = mask.prepare(*tokens)
    q, k = ({name: np.asarray(column) for name, column in side.items()} for side in sides)  # Known while tracing.
    size, counted = 256, 0.0
    status = np.asarray(mask.classify_columns(q, k, size, size, length, keys)).max((0, 1))
    for i, j in np.argwhere(status != EMPTY):
        rows, columns = slice(i * size, min((i + 1) * size, length)), slice(j * size, min((j + 1) * size, keys))
        allowed = np.asarray(
            mask.pairs(
                {name: column[..., rows, None] for name, column in q.items()},
                {name: column[..., None, columns] for name, column in k.items()},
            )
        )
        shape = (*allowed.shape[:-2], rows.stop - rows.start, columns.stop - columns.start)
        counted += np.broadcast_to(allowed, shape).sum() / max(np.prod(shape[:-2]), 1)
    return float(counted)


def executed(mask: Mask, q: Tokens, k: Tokens, block_q: int, block_k: int) -> float:
    """Pairs that a blockwise implementation computes (live blocks times their size), per head and batch row."""
    status = np.asarray(mask.classify(q, k, block_q, block_k))
    return float((status != EMPTY).sum()) * block_q * block_k / (status.shape[0] * status.shape[1])


def flops(q: Sequence[int], v: Sequence[int], live: float, *, backward: bool = False) -> float:
    """Useful operations of the forward (a multiply-add is two), or with `backward` of the gradients alone.

    `q` is [B, T, H, D], `v` [B, S, Hk, Dv], `live` the pairs per head and batch row, from `pairs` or `executed`.
    """
    batch, _, heads, width = q
    return float(batch * heads * live * 2 * (3 * width + 2 * v[3] if backward else width + v[3]))


def bytes(q: Sequence[int], v: Sequence[int], *, itemsize: int = 4, backward: bool = False) -> int:
    """Bytes that must cross memory once: forward reads q, k, v and writes the output and the float32 lse.

    `backward` reads those five and the output's gradient, and writes the gradients of q, k and v.
    """
    batch, length, heads, width = q
    _, keys, kv_heads, value_width = v
    inputs = itemsize * batch * (length * heads * width + keys * kv_heads * (width + value_width))
    out, lse = itemsize * batch * length * heads * value_width, 4 * batch * length * heads
    return inputs + out + lse if not backward else 2 * inputs + 2 * out + lse


def _aligned(length: int, keys: int) -> tuple[Tokens, Tokens]:
    index = np.arange(max(length, keys), dtype=np.int32)[None]
    return Tokens(index=index[:, :length] + (keys - length)), Tokens(index=index[:, :keys])


def _banded(length: int, keys: int, window: int) -> int:
    """Row t sees min(window, t + 1 + keys - length) keys where that is positive."""
    first, last = max(keys - length + 1, 1), keys  # Keys before the window cuts, for the first and the last such row.
    rising = min(last, window)
    rows = max(rising - first + 1, 0)
    return rows * (first + rising) // 2 + window * max(last - max(rising, first - 1), 0)
