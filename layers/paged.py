"""A cache in pages: what rows remember lies in one pool, and a table says whose page is which (PagedAttention, Kwon et
al. 2023, arXiv 2309.06180)."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from kernels.tokens import Tokens
from layers.cache import SlotCache, StateCache, View
from sharding import logical


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=("entries", "table", "length"), meta_fields=("fresh", "axes")
)
@dataclasses.dataclass(frozen=True)
class PagedCache:
    """Per-token entries in pages; every token keeps its own until its row's pages are given away.

    Place s of row b is place s % page of page table[b, s // page]. Who has which page is decided elsewhere
    (`models.serving.pages`); entries of the table out of range, and places beyond the table, take no writes. A token's
    place is its number in the row, so its index is taken to be that.

    Attributes:
        entries: named arrays [P, page, ...].
        table: pages of each row [B, n]. None, with `length`, in a pool that waits for its rows (`with_rows`).
        length: tokens so far, per row; 0 in a row that nobody uses.
        fresh: static; nothing was appended yet, so a prefill attends to its own tokens only.
        axes: static; the logical axes of one token's entries, by name, where a mesh may cut them.
    """

    entries: dict[str, Array]
    table: Int[Array, "B n"] | None
    length: Int[Array, "B"] | None
    fresh: bool = True
    axes: tuple[tuple[str, logical.Axes], ...] = ()

    @classmethod
    def create(cls, layer: Any, rows: int, length: int, *, pages: int, page: int, dtype: str) -> "PagedCache":
        """An empty cache of an attention layer for `rows` sequences up to `length`; no row has a page yet.

        Raises:
            NotImplementedError: the layer remembers something else than one entry per token.
        """
        kept = per_token(layer, length, dtype)
        entries = {name: jnp.zeros((pages, page, *x.shape[2:]), x.dtype) for name, x in kept.entries.items()}
        table = jnp.full((rows, -(-length // page)), pages, jnp.int32)
        cache = cls(entries, table, jnp.zeros((rows,), jnp.int32), axes=kept.axes)
        return dataclasses.replace(cache, entries=cache._placed(entries))

    def with_rows(self, table: Int[Array, "B n"] | None, length: Int[Array, "B"] | None) -> "PagedCache":
        """The same pages, read and written by these rows (None: by none)."""
        return dataclasses.replace(self, table=table, length=length, fresh=False)

    def append(self, entries: dict[str, Array], tokens: Tokens) -> tuple[View, "PagedCache"]:
        """Stores the entries [B, T, ...] of new tokens.

        Raises:
            ValueError: the tokens are packed documents, or the mesh cuts rows (`ShardingError`).
        """
        if tokens.segment is not None:
            raise ValueError("a cache holds one document per row: unpack the documents (no segment column) first")
        if logical.parts("batch") > 1:
            raise logical.ShardingError(
                "pages belong to all rows, so a mesh that cuts rows cannot hold them: set config.sharding.data to 1"
            )
        shape = (len(self.length), tokens.length)
        valid = jnp.ones(shape, bool) if tokens.valid is None else jnp.broadcast_to(tokens.valid, shape)
        count = jnp.cumsum(valid, axis=1, dtype=jnp.int32)
        cache = self._write(entries, self.length[:, None] + count - 1, valid, self.length + count[:, -1])
        if self.fresh:
            index = jnp.broadcast_to(tokens.index, shape)
            return View(entries, dataclasses.replace(tokens, index=index)), cache
        places = jnp.arange(self.places, dtype=jnp.int32)
        stored = Tokens(index=jnp.broadcast_to(places, (shape[0], self.places)), valid=places < cache.length[:, None])
        last = jnp.minimum(self.length + tokens.length, self.places)  # Padding sees what nobody asks for.
        return View(cache.entries, stored, jnp.where(count[:, -1] > 0, last, 0), self.table), cache

    def filled(self, entries: dict[str, Array], table: Int[Array, " n"]) -> "PagedCache":
        """With the entries [1, T, ...] of one row's first tokens in the pages of its table; what has no page, or one
        out of range, is dropped."""

        def put(pool: Array, late: Array) -> Array:
            late = jnp.pad(late[0], [(0, -late.shape[1] % pool.shape[1]), *[(0, 0)] * (late.ndim - 2)])
            blocks = late.reshape(-1, *pool.shape[1:]).astype(pool.dtype)
            return pool.at[table[: len(blocks)]].set(blocks[: len(table)], mode="drop")

        return dataclasses.replace(self, entries=self._placed(jax.tree.map(put, self.entries, entries)))

    @property
    def places(self) -> int:
        """The most tokens of a row."""
        return self.table.shape[1] * next(iter(self.entries.values())).shape[1]

    def _write(self, entries: dict[str, Array], order: Array, valid: Array, length: Array) -> "PagedCache":
        pages, page = next(iter(self.entries.values())).shape[:2]
        keep = valid & (order < self.places)
        owned = jnp.take_along_axis(self.table, jnp.clip(order // page, 0, self.table.shape[1] - 1), axis=1)
        owned = jnp.where(keep, owned, pages)  # Out of range is dropped.

        def put(pool: Array, late: Array) -> Array:
            return pool.at[owned, order % page].set(late.astype(pool.dtype), mode="drop")

        written = self._placed(jax.tree.map(put, self.entries, entries))
        return dataclasses.replace(self, entries=written, length=length, fresh=False)

    def _placed(self, entries: dict[str, Array]) -> dict[str, Array]:
        """Pages laid out on the active mesh."""
        axes = dict(self.axes)
        return {
            name: logical.constrain(entry, (None, None, *axes[name])) if name in axes else entry
            for name, entry in entries.items()
        }


def gathered(pages: Float[Array, "P page ..."], table: Int[Array, "B n"]) -> Float[Array, "B S ..."]:
    """Rows in one piece; what the table does not say is some page's, and nobody's to see."""
    rows = jnp.take(pages, table, axis=0, mode="clip")
    return rows.reshape(table.shape[0], -1, *pages.shape[2:])


def per_token(layer: Any, length: int, dtype: str) -> SlotCache:
    """Shapes and logical axes of what an attention layer keeps of each of up to `length` tokens, as an abstract cache
    of one row on the active mesh.

    Raises:
        NotImplementedError: it keeps something else: a state, a window that tokens leave, a cache in parts.
    """
    cache = jax.eval_shape(lambda: layer.init_cache(1, length, dtype))
    name = type(layer).__name__
    if isinstance(cache, StateCache):
        raise NotImplementedError(f"{name} has no pages: it keeps a state of fixed size, which needs none")
    if type(cache) is not SlotCache:
        raise NotImplementedError(f"{name} has no pages: it keeps a {type(cache).__name__} of its own")
    if cache.window:
        raise NotImplementedError(f"{name} has no pages: tokens leave its window of {cache.window}, which needs none")
    return cache


__all__ = ["PagedCache", "gathered", "per_token"]
