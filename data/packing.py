"""Rows of fixed length cut from tokenised documents, by random access.

A document is BOS + its tokens + EOS. It is laid out as (input, target) pairs, so a document of n tokens takes n + 1
places, its first token is predicted from BOS, and no pair ever crosses a document border. Within an epoch each pair
is in exactly one row.

A document that does not fit continues in another row. The continuing piece is a segment of its own there: its
positions restart at 0, and it sees nothing of the piece before (its first input is the last target of that piece).
"""

import hashlib
from typing import NamedTuple, Protocol

import numpy as np

from data.tokenizers import Tokenizer

Batch = dict[str, np.ndarray]  # inputs, targets, segment, position: int32 [B, T]; weight: float32 [B, T].


class Tokens(NamedTuple):
    """Tokenised documents without specials: document i is ids[starts[i] : starts[i] + lengths[i]]."""

    ids: np.ndarray  # An unsigned integer type.
    starts: np.ndarray  # int64
    lengths: np.ndarray  # int64


class Rows(Protocol):
    """An endless sequence of rows."""

    def gather(self, rows: np.ndarray) -> Batch:
        """The rows with these numbers, in this order; `rows` is int64 [B], counted from 0 over all epochs."""


class _Epochs:
    """What packed and padded rows share: an order per epoch, and the pairs of a document."""

    def __init__(self, tokens: Tokens, length: int, tokenizer: Tokenizer, seed: str | None):
        self.tokens, self.length, self.seed = tokens, length, seed
        self.bos, self.eos, self.pad = tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id
        self.pairs = tokens.lengths + 1
        self.rows_per_epoch = 0
        self._plans: dict[int, tuple[np.ndarray, ...]] = {}

    def plan(self, epoch: int) -> tuple[np.ndarray, ...]:
        """The order of an epoch. The last two stay in memory: a batch, or reading ahead, may lie across two."""
        plan = self._plans.get(epoch)
        if plan is None:
            kept = dict(sorted(self._plans.items())[-1:])
            self._plans = {**kept, epoch: (plan := self._plan(epoch))}
        return plan

    def _plan(self, epoch: int) -> tuple[np.ndarray, ...]:
        raise NotImplementedError

    def _rows(self, rows: np.ndarray, plan: tuple[np.ndarray, ...]) -> Batch:
        raise NotImplementedError

    def gather(self, rows: np.ndarray) -> Batch:
        """See Rows."""
        epochs, rows = np.divmod(np.asarray(rows, np.int64), self.rows_per_epoch)
        if not len(rows) or epochs[0] == epochs[-1] and (epochs == epochs[0]).all():
            return self._rows(rows, self.plan(int(epochs[0]) if len(rows) else 0))
        parts = {int(epoch): epochs == epoch for epoch in np.unique(epochs)}
        gathered = {epoch: self._rows(rows[mine], self.plan(epoch)) for epoch, mine in parts.items()}
        return scatter([(mine, gathered[epoch]) for epoch, mine in parts.items()], len(rows))

    def _batch(self, document: np.ndarray, offset: np.ndarray, valid: np.ndarray, segment: np.ndarray) -> Batch:
        """All arrays [B, T]: document numbers, pair numbers within the document, real places, segment numbers."""
        tokens, length = self.tokens, self.tokens.lengths[document]
        at = tokens.starts[document] + offset
        last = max(len(tokens.ids) - 1, 0)
        ids = tokens.ids if len(tokens.ids) else np.zeros(1, np.uint8)
        inputs = np.where(offset == 0, self.bos, ids[np.clip(at - 1, 0, last)].astype(np.int32))
        targets = np.where(offset == length, self.eos, ids[np.clip(at, 0, last)].astype(np.int32))
        column = np.arange(self.length, dtype=np.int64)
        # Consecutive pairs of a piece lie in consecutive columns, so a piece begins offset columns back, or at 0.
        position = np.minimum(offset, column)
        return {
            "inputs": np.where(valid, inputs, self.pad).astype(np.int32),
            "targets": np.where(valid, targets, self.pad).astype(np.int32),
            "segment": np.where(valid, segment, 0).astype(np.int32),
            "position": np.where(valid, position, 0).astype(np.int32),
            "weight": valid.astype(np.float32),
        }


class PackedRows(_Epochs):
    """All documents end to end in a shuffled order, cut into rows, the rows shuffled again.

    Only the last row of an epoch has padding. Each epoch has an order of its own.
    """

    def __init__(self, tokens: Tokens, length: int, tokenizer: Tokenizer, seed: str):
        """`seed` is any text that names the order."""
        super().__init__(tokens, length, tokenizer, seed)
        self.total = int(self.pairs.sum())
        self.rows_per_epoch = -(-self.total // length)

    def _plan(self, epoch: int) -> tuple[np.ndarray, ...]:
        documents = permutation(len(self.pairs), f"{self.seed}/documents/{epoch}")
        ends = np.cumsum(self.pairs[documents])
        return documents, ends, permutation(self.rows_per_epoch, f"{self.seed}/rows/{epoch}")

    def _rows(self, rows: np.ndarray, plan: tuple[np.ndarray, ...]) -> Batch:
        documents, ends, order = plan
        at = order[rows].astype(np.int64)[:, None] * self.length + np.arange(self.length)
        valid = at < self.total
        at = np.minimum(at, self.total - 1)
        rank = np.searchsorted(ends, at.ravel(), side="right").reshape(at.shape)
        document = documents[rank]
        offset = at - (ends[rank] - self.pairs[document])
        return self._batch(document, offset, valid, rank - rank[:, :1] + 1)


class PaddedRows(_Epochs):
    """One piece of one document per row, the rest of the row padding; the rows of an epoch are shuffled.

    With seed None they come in the order of the documents instead.
    """

    def __init__(self, tokens: Tokens, length: int, tokenizer: Tokenizer, seed: str | None):
        """`seed` is any text that names the order, or None."""
        super().__init__(tokens, length, tokenizer, seed)
        self.ends = np.cumsum(-(-self.pairs // length))
        self.rows_per_epoch = int(self.ends[-1]) if len(self.ends) else 0

    def _plan(self, epoch: int) -> tuple[np.ndarray, ...]:
        if self.seed is None:
            return (np.arange(self.rows_per_epoch),)
        return (permutation(self.rows_per_epoch, f"{self.seed}/rows/{epoch}"),)

    def document(self, piece: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """For piece numbers in document order: the document, and the number of the piece within it."""
        document = np.searchsorted(self.ends, piece, side="right")
        return document, piece - (self.ends[document] + -self.pairs[document] // self.length)

    def _rows(self, rows: np.ndarray, plan: tuple[np.ndarray, ...]) -> Batch:
        document, piece = self.document(plan[0][rows].astype(np.int64))
        offset = piece[:, None] * self.length + np.arange(self.length)
        document = np.broadcast_to(document[:, None], offset.shape)
        valid = offset < self.pairs[document]
        return self._batch(document, np.minimum(offset, self.pairs[document] - 1), valid, np.ones_like(offset))


def scatter(parts: list[tuple[np.ndarray, Batch]], size: int) -> Batch:
    """One batch of `size` rows from (bool [size] of places, rows for them) parts that together fill it."""
    whole = {}
    for name, value in parts[0][1].items():
        whole[name] = np.empty((size, *value.shape[1:]), value.dtype)
        for mine, batch in parts:
            whole[name][mine] = batch[name]
    return whole


def permutation(size: int, name: str) -> np.ndarray:
    """A random order of range(size), decided by `name` alone.

    Sorting the raw output of a counter-based generator, because NumPy promises that stream to stay the same in later
    versions, which it does not for its own permutations: a resumed run must see the order it began with.
    """
    key = int.from_bytes(hashlib.sha256(name.encode()).digest()[:16], "big")
    order = np.argsort(np.random.Philox(key=key).random_raw(size), kind="stable")
    return order.astype(np.uint32) if size < 2**32 else order
