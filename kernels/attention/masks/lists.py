"""Masks that are lists: blocks, keys and spans chosen beforehand, known or traced."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int

from kernels.attention.masks.base import Mask, array, expression
from kernels.attention.masks.intervals import Truth


@expression
class Blocks(Mask):
    size_q: int
    size_k: int
    live: Array = array()
    name = "blocks"
    reads = ("q.index", "k.index")

    def extra(self, side: str, length: int) -> dict[str, Array]:
        batch, heads = self.live.shape[:2]
        if side == "k":
            return {}
        row: Any = np.broadcast_to(np.arange(batch)[:, None, None], (batch, 1, length))
        head: Any = np.broadcast_to(np.arange(heads)[None, :, None], (1, heads, length))
        return {"block_row": row, "block_head": head}

    def rule(self, q: Any, k: Any) -> Any:
        i, j = q.index // self.size_q, k.index // self.size_k
        inside = (i >= 0) & (i < self.live.shape[2]) & (j >= 0) & (j < self.live.shape[3])
        i, j = (n.clip(0, count - 1) for n, count in zip((i, j), self.live.shape[2:], strict=True))
        live = self.live if all(isinstance(x, np.ndarray) for x in (i, j, self.live)) else jnp.asarray(self.live)
        return inside & live[q.block_row, q.block_head, i, j]

    def block_rule(self, q: Any, k: Any) -> Truth:
        # How many live blocks lie in the rectangle that a block of pairs touches: four corners of a table of sums.
        xp = np if all(isinstance(x, np.ndarray) for x in (q.index.low, k.index.low, self.live)) else jnp
        sums = xp.pad(xp.cumsum(xp.cumsum(xp.asarray(self.live, np.int32), 2), 3), ((0, 0), (0, 0), (1, 0), (1, 0)))
        rows, columns = self.live.shape[2:]
        sides = ((q.index, self.size_q, rows), (k.index, self.size_k, columns))
        (top, bottom), (left, right) = (
            (xp.clip(n.low // size, 0, count), xp.clip(n.high // size + 1, 0, count)) for n, size, count in sides
        )
        place = (q.block_row.low, q.block_head.low)

        def corner(i: Array, j: Array) -> Array:
            return sums[(*place, i, j)]

        found = corner(bottom, right) - corner(top, right) - corner(bottom, left) + corner(top, left)
        touched = (q.index.high // self.size_q - q.index.low // self.size_q + 1) * (
            k.index.high // self.size_k - k.index.low // self.size_k + 1
        )
        one = (q.block_row.low == q.block_row.high) & (q.block_head.low == q.block_head.high)
        return Truth((found > 0) | ~one, (found == touched) & one)

    def __repr__(self) -> str:
        return f"blocks({self.size_q} x {self.size_k})"


@expression
class Keys(Mask):
    chosen: Array = array()
    name = "keys"

    def extra(self, side: str, length: int) -> dict[str, Array]:
        return {"chosen": self.chosen} if side == "k" else {}

    def rule(self, q: Any, k: Any) -> Any:
        return k.chosen

    def __repr__(self) -> str:
        return "keys(...)"


@expression
class Spans(Mask):
    of: str
    first: Array = array()
    end: Array = array()

    @property
    def reads(self) -> tuple[str, ...]:  # type: ignore[override]
        return ("q.index",) if self.of == "keys" else ("k.index",)

    def extra(self, side: str, length: int) -> dict[str, Array]:
        return {f"{self.of}_first": self.first, f"{self.of}_end": self.end} if side == self.of[0] else {}

    def rule(self, q: Any, k: Any) -> Any:
        if self.of == "keys":
            return (q.index >= k.keys_first) & (q.index < k.keys_end)
        return (k.index >= q.queries_first) & (k.index < q.queries_end)

    def __repr__(self) -> str:
        return f"spans_of_{self.of}(...)"


def blocks(live: Bool[Array, "B|1 H|1 nq nk"], size_q: int, size_k: int | None = None) -> Mask:
    """Whole blocks of `size_q` queries by `size_k` keys, counted by index: pair (q, k) is allowed where
    live[b, h, q.index // size_q, k.index // size_k]. A map [nq, nk] holds for all rows and heads."""
    live = live if isinstance(live, jax.Array) else np.asarray(live, bool)
    if live.ndim not in (2, 4) or live.dtype != bool:
        raise ValueError(f"blocks needs booleans [nq, nk] or [batch, heads, nq, nk], not {live.dtype} of {live.shape}")
    if size_q < 1 or (size_k or size_q) < 1:
        raise ValueError(f"blocks needs sizes of at least 1, not {size_q} x {size_k}")
    return Blocks(int(size_q), int(size_k or size_q), live.reshape((1,) * (4 - live.ndim) + live.shape))


def keys(chosen: Bool[Array, "B|1 H|1 S"]) -> Mask:
    """Chosen keys, one boolean each: [S], [batch, S], or [batch or 1, query heads or 1, S]."""
    chosen = chosen if isinstance(chosen, jax.Array) else np.asarray(chosen)
    if chosen.dtype != bool:
        raise ValueError(f"keys needs booleans, one per key, not {chosen.dtype}")
    return Keys(_column("keys", chosen))


def spans_of_keys(first: Int[Array, "B|1 H|1 S"], end: Int[Array, "B|1 H|1 S"]) -> Mask:
    """For each key the queries that may see it: first <= q.index < end. A key that is dropped at some time, as in
    dynamic mask attention (arXiv 2508.02124), is (its own index, the time). Shapes as for `keys`."""
    return _spans("keys", first, end)


def spans_of_queries(first: Int[Array, "B|1 H|1 T"], end: Int[Array, "B|1 H|1 T"]) -> Mask:
    """For each query the keys that it may see: first <= k.index < end. Shapes as for `keys`, per query."""
    return _spans("queries", first, end)


def _spans(of: str, first: Any, end: Any) -> Mask:
    sides = [x if isinstance(x, jax.Array) else np.asarray(x) for x in (first, end)]
    for x in sides:
        if not np.issubdtype(x.dtype, np.integer):
            raise ValueError(f"spans_of_{of} needs whole numbers, not {x.dtype}")
    return Spans(of, *(_column(f"spans_of_{of}", x) for x in sides))


def _column(name: str, x: Any) -> Any:
    if x.ndim not in (1, 2, 3):
        raise ValueError(f"{name} needs an array [length], [batch, length] or [batch, heads, length], not {x.shape}")
    return x[:, None] if x.ndim == 2 else x.reshape((1,) * (3 - x.ndim) + x.shape)
