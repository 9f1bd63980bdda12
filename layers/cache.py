"""What a layer remembers while a sequence is decoded, behind one interface.

A cache is a value: `append` returns what the new queries may attend to and the cache after the new tokens. Rows of a
batch advance on their own; padding (valid False, at the end of a row's new tokens) leaves no trace.
`SlotCache` keeps per-token entries (keys and values, or a latent), all of them or a window of them; `StateCache`
keeps a state of fixed size.
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from kernels.tokens import Tokens
from sharding import logical


class View(NamedTuple):
    """What new queries may attend to.

    Attributes:
        entries: [B, S, ...]; with a `table`, pages [P, page, ...].
        tokens: metadata of the tokens in the S places of each row.
        lengths: how many of the S places the last query of each row may see, and the queries before it one less each
            (as `kernels.decode` has it); None where that is not so.
        table: which page holds which places of a row (`layers.paged`); None where entries lie in one piece.
    """

    entries: dict[str, Array]
    tokens: Tokens
    lengths: Int[Array, "B"] | None = None
    table: Int[Array, "B n"] | None = None


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("entries", "tokens", "length"),
    meta_fields=("pinned", "window", "fresh", "axes"),
)
@dataclasses.dataclass(frozen=True)
class SlotCache:
    """Per-token entries in slots.

    Attributes:
        entries: named arrays [B, S, ...].
        tokens: metadata of the stored tokens [B, S]; unused slots are not valid.
        length: tokens seen so far, per row.
        pinned: the first slots, which are never overwritten (sink tokens).
        window: 0 keeps every token (S bounds the sequence); otherwise the slots after the pinned ones are a ring of
            this many, and the oldest token leaves when a new one comes.
        fresh: static; nothing was appended yet, so a prefill attends to its own tokens only.
        axes: static; the logical axes of one token's entries, by name, where a mesh may cut them.
    """

    entries: dict[str, Array]
    tokens: Tokens
    length: Int[Array, "B"]
    pinned: int = 0
    window: int = 0
    fresh: bool = True
    axes: tuple[tuple[str, logical.Axes], ...] = ()

    @classmethod
    def create(
        cls,
        batch: int,
        length: int,
        shapes: Mapping[str, tuple[int, ...]],
        dtype: str,
        *,
        axes: Mapping[str, logical.Axes] | None = None,
        pinned: int = 0,
        window: int = 0,
    ) -> "SlotCache":
        """An empty cache for sequences up to `length`; `shapes` are those of one token's entries, `axes` their logical
        axes."""
        slots = min(length, pinned + window) if window else length
        if window and slots < pinned + window:  # The whole sequence fits: nothing is ever overwritten.
            pinned = window = 0
        tokens = Tokens(index=jnp.zeros((batch, slots), jnp.int32), valid=jnp.zeros((batch, slots), bool))
        entries = {name: jnp.zeros((batch, slots, *shape), dtype) for name, shape in shapes.items()}
        cache = cls(entries, tokens, jnp.zeros((batch,), jnp.int32), pinned, window, axes=tuple((axes or {}).items()))
        return dataclasses.replace(cache, entries=cache._placed(entries))

    @property
    def slots(self) -> int:
        """S."""
        return self.tokens.length

    def append(self, entries: dict[str, Array], tokens: Tokens) -> tuple[View, "SlotCache"]:
        """Stores the entries [B, T, ...] of new tokens.

        Raises:
            ValueError: the tokens are packed documents (a cache holds one document per row), or a prefill is longer
                than a cache that keeps everything.
        """
        if tokens.segment is not None:
            raise ValueError("a cache holds one document per row: unpack the documents (no segment column) first")
        new = tokens.length
        if not self.window and new > self.slots:
            raise ValueError(f"{new} tokens do not fit a cache of {self.slots} slots: make the cache longer")
        index = jnp.broadcast_to(tokens.index, (len(self.length), new))
        valid = jnp.ones_like(index, bool) if tokens.valid is None else jnp.broadcast_to(tokens.valid, index.shape)
        count = jnp.cumsum(valid, axis=1, dtype=jnp.int32)
        arriving = Tokens(index=index, valid=valid)
        cache = self._write(entries, arriving, self.length[:, None] + count - valid, self.length + count[:, -1])
        if self.fresh:
            return View(entries, dataclasses.replace(tokens, index=index)), cache
        if self.window and new > 1:  # Writing first would drop keys that the earlier of the new queries still see.
            both = lambda old, late: jnp.concatenate([old, late.astype(old.dtype)], axis=1)  # noqa: E731
            return View(jax.tree.map(both, self.entries, entries), jax.tree.map(both, self.tokens, arriving)), cache
        # A lone query sees all of a ring. Places that padding leaves empty are seen by padding alone.
        return View(cache.entries, cache.tokens, jnp.minimum(self.length + new, self.slots)), cache

    def _write(self, entries: dict[str, Array], tokens: Tokens, order: Array, length: Array) -> "SlotCache":
        slot = order
        keep = tokens.valid
        if self.window:
            slot = jnp.where(order < self.pinned, order, self.pinned + (order - self.pinned) % self.window)
            keep &= (order < self.pinned) | (order >= length[:, None] - self.window)  # A slot is written once.
        slot = jnp.where(keep, slot, self.slots)  # Out of range is dropped.
        rows = jnp.arange(slot.shape[0])[:, None]

        def put(old: Array, late: Array) -> Array:
            return old.at[rows, slot].set(late.astype(old.dtype), mode="drop")

        return dataclasses.replace(
            self,
            entries=self._placed(jax.tree.map(put, self.entries, self._placed(entries))),
            tokens=jax.tree.map(put, self.tokens, tokens),
            length=length,
            fresh=False,
        )

    def _placed(self, entries: dict[str, Array]) -> dict[str, Array]:
        """Entries [B, ., ...] laid out on the active mesh."""
        axes = dict(self.axes)
        return {
            name: logical.constrain(entry, ("batch", None, *axes[name])) if name in axes else entry
            for name, entry in entries.items()
        }


@functools.partial(jax.tree_util.register_dataclass, data_fields=("state", "length"), meta_fields=("fresh",))
@dataclasses.dataclass(frozen=True)
class StateCache:
    """A state of fixed size per row: named arrays [B, ...], and the tokens seen so far."""

    state: dict[str, Array]
    length: Int[Array, "B"]
    fresh: bool = True

    @classmethod
    def create(cls, batch: int, shapes: Mapping[str, tuple[int, ...]], dtype: str = "float32") -> "StateCache":
        """The zero state."""
        state = {name: jnp.zeros((batch, *shape), dtype) for name, shape in shapes.items()}
        return cls(state, jnp.zeros((batch,), jnp.int32))

    def advance(self, state: dict[str, Array], tokens: Tokens) -> "StateCache":
        """The cache after `tokens`, whose effect is already in `state`.

        Raises:
            ValueError: the tokens are packed documents.
        """
        if tokens.segment is not None:
            raise ValueError("a cache holds one document per row: unpack the documents (no segment column) first")
        new = tokens.length if tokens.valid is None else jnp.sum(tokens.valid, axis=1, dtype=jnp.int32)
        return StateCache(state, self.length + new, fresh=False)


LayerCache = SlotCache | StateCache


@functools.partial(jax.tree_util.register_dataclass, data_fields=("layers", "length"), meta_fields=())
@dataclasses.dataclass(frozen=True)
class Caches:
    """The caches of a whole network, one per layer (kinds and lengths may differ), and the tokens seen per row."""

    layers: tuple[LayerCache, ...]
    length: Int[Array, "B"]


def content_bytes(cache: LayerCache) -> int:
    """Bytes of what is remembered, without the tokens' metadata."""
    content = cache.entries if isinstance(cache, SlotCache) else cache.state
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(content))
