"""Rows of fixed length: every pair of neighbouring tokens once, in order, never across documents."""

import collections
import types

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.mixture import Mixture
from data.packing import PackedRows, PaddedRows, Tokens, permutation

SPECIALS = types.SimpleNamespace(bos_id=0, eos_id=1, pad_id=2)
DOCUMENTS = st.lists(st.integers(0, 23), min_size=1, max_size=12)
LENGTH = st.integers(1, 17)
GOLDEN = [4, 6, 1, 2, 7, 9, 8, 0, 3, 5]
KIND = st.sampled_from([PackedRows, PaddedRows])


def tokens_of(lengths):
    """Documents of these lengths, no id used twice, lying in the array with gaps and in another order."""
    ids = np.arange(3, 3 + sum(lengths), dtype=np.uint16)
    store, starts = np.full(sum(lengths) + len(lengths) + 1, 9999, np.uint16), np.zeros(len(lengths), np.int64)
    firsts, at = np.cumsum([0, *lengths[:-1]]), 1
    for i in reversed(range(len(lengths))):
        starts[i] = at
        store[at : at + lengths[i]] = ids[firsts[i] : firsts[i] + lengths[i]]
        at += lengths[i] + 1
    documents = [[0, *ids[first : first + n].tolist(), 1] for first, n in zip(firsts, lengths, strict=True)]
    return Tokens(store, starts, np.array(lengths, np.int64)), documents


def pieces(batch):
    """(row, inputs, targets, positions) of every segment of every row."""
    for row in range(len(batch["inputs"])):
        segment = batch["segment"][row]
        for number in range(1, segment.max(initial=0) + 1):
            (places,) = np.nonzero(segment == number)
            assert len(places) and (np.diff(places) == 1).all(), "a segment is one stretch"
            yield row, *(batch[name][row, places].tolist() for name in ("inputs", "targets", "position"))


@settings(max_examples=300, deadline=None)
@given(lengths=DOCUMENTS, length=LENGTH, kind=KIND, epoch=st.integers(0, 3))
def test_an_epoch_holds_each_pair_once(lengths, length, kind, epoch):
    tokens, documents = tokens_of(lengths)
    rows = kind(tokens, length, SPECIALS, "seed")
    batch = rows.gather(np.arange(rows.rows_per_epoch) + epoch * rows.rows_per_epoch)
    assert {name: (value.dtype.name, value.shape) for name, value in batch.items()} == {
        name: ("float32" if name == "weight" else "int32", (rows.rows_per_epoch, length))
        for name in ("inputs", "targets", "segment", "position", "weight")
    }
    expected = collections.Counter(pair for ids in documents for pair in zip(ids, ids[1:], strict=False))
    found = collections.Counter()
    for _, inputs, targets, positions in pieces(batch):
        assert inputs[1:] == targets[:-1], "the target is the next token of the same document"
        assert positions == list(range(len(inputs))), "positions restart in every piece"
        assert 0 not in inputs[1:] and 1 not in targets[:-1], "one document per segment"
        found.update(zip(inputs, targets, strict=True))
    assert found == expected
    padding = batch["segment"] == 0
    assert (batch["weight"] == ~padding).all() and (batch["position"][padding] == 0).all()
    assert (batch["inputs"][padding] == 2).all() and (batch["targets"][padding] == 2).all()


@settings(max_examples=100, deadline=None)
@given(lengths=DOCUMENTS, length=LENGTH)
def test_packing_wastes_less_than_a_row(lengths, length):
    tokens, documents = tokens_of(lengths)
    rows = PackedRows(tokens, length, SPECIALS, "seed")
    weight = rows.gather(np.arange(rows.rows_per_epoch))["weight"]
    assert (weight == 0).sum() < length and ((weight == 0).any(axis=1)).sum() <= 1
    assert weight.sum() == sum(len(ids) - 1 for ids in documents)


@settings(max_examples=100, deadline=None)
@given(lengths=DOCUMENTS, length=LENGTH)
def test_padded_rows_hold_one_piece_each(lengths, length):
    tokens, documents = tokens_of(lengths)
    rows = PaddedRows(tokens, length, SPECIALS, "seed")
    assert rows.rows_per_epoch == sum(-(-(len(ids) - 1) // length) for ids in documents)
    assert (rows.gather(np.arange(rows.rows_per_epoch))["segment"].max(axis=1) == 1).all()
    ordered = PaddedRows(tokens, length, SPECIALS, None)
    batch = ordered.gather(np.arange(ordered.rows_per_epoch))
    inputs = [i for _, inputs, _, _ in pieces(batch) for i in inputs]
    assert inputs == [i for ids in documents for i in ids[:-1]], "without a seed rows come in the documents' order"


@settings(max_examples=100, deadline=None)
@given(lengths=DOCUMENTS, length=LENGTH, kind=KIND, wanted=st.lists(st.integers(0, 60), min_size=1, max_size=9))
def test_any_row_can_be_had_alone_and_in_any_company(lengths, length, kind, wanted):
    """Across epochs, with repeats, out of order."""
    tokens, _ = tokens_of(lengths)
    rows, again = kind(tokens, length, SPECIALS, "seed"), kind(tokens, length, SPECIALS, "seed")
    together = rows.gather(np.array(wanted))
    for i, row in enumerate(wanted):
        alone = again.gather(np.array([row]))
        for name in alone:
            np.testing.assert_array_equal(together[name][i], alone[name][0])


def test_a_continuing_piece_is_a_segment_of_its_own():
    """One document of 5 tokens in rows of 4: 6 pairs, so 4 and 2."""
    tokens, (ids,) = tokens_of([5])
    rows = PackedRows(tokens, 4, SPECIALS, "seed").gather(np.arange(2))
    first = int(np.argmax(rows["inputs"][:, 0] == 0))
    assert rows["inputs"][first].tolist() == ids[:4] and rows["inputs"][1 - first].tolist() == [*ids[4:6], 2, 2]
    assert rows["position"][1 - first].tolist() == [0, 1, 0, 0] and rows["segment"][1 - first].tolist() == [1, 1, 0, 0]


@pytest.mark.parametrize("kind", [PackedRows, PaddedRows])
def test_order_differs_by_epoch_and_by_seed(kind):
    tokens, _ = tokens_of([5] * 40)
    orders = []
    for seed, epoch in (("a", 0), ("a", 1), ("b", 0), ("a", 0)):
        rows = kind(tokens, 6, SPECIALS, seed)
        batch = rows.gather(np.arange(rows.rows_per_epoch) + epoch * rows.rows_per_epoch)
        orders.append(batch["inputs"][:, 1].tolist())
    assert orders[0] == orders[3] and orders[0] != orders[1] and orders[0] != orders[2]
    assert sorted(orders[0]) != orders[0]


def test_documents_get_other_neighbours_in_other_epochs():
    """Not only the rows are shuffled: which documents share a row changes too."""
    tokens, _ = tokens_of([4] * 40)
    rows = PackedRows(tokens, 10, SPECIALS, "seed")  # Two documents of 5 pairs in each row.
    couples = []
    for epoch in (0, 1):
        batch = rows.gather(np.arange(rows.rows_per_epoch) + epoch * rows.rows_per_epoch)
        couples.append({frozenset(row[[1, 6]].tolist()) for row in batch["inputs"]})
    assert len(couples[0]) == 20 and len(couples[0] & couples[1]) < 10


def test_permutation_is_fair_and_does_not_move():
    """The golden order guards resumed runs against a change of NumPy; fairness is a chi-square over all orders of 4."""
    assert permutation(10, "0/documents/0").tolist() == GOLDEN
    counts = collections.Counter(tuple(permutation(4, str(i)).tolist()) for i in range(4800))
    assert len(counts) == 24
    assert sum((n - 200) ** 2 / 200 for n in counts.values()) < 49.7  # 23 degrees of freedom, p = 0.001.


# Mixtures.


class Numbered:
    """A source whose rows are its own name and the row's number."""

    def __init__(self, name):
        self.name = name

    def gather(self, rows):
        return {"inputs": np.stack([np.full(len(rows), self.name), rows], axis=1)}


@settings(max_examples=100, deadline=None)
@given(weights=st.lists(st.floats(0.01, 10.0), min_size=1, max_size=5), first=st.integers(0, 10**9))
def test_mixture_keeps_proportions_everywhere_and_each_source_in_order(weights, first):
    rows = Mixture([Numbered(i) for i in range(len(weights))], weights).gather(np.arange(first, first + 400))["inputs"]
    for i, weight in enumerate(weights):
        numbers = rows[rows[:, 0] == i, 1]
        share = weight / sum(weights)
        assert abs(len(numbers) - 400 * share) <= len(weights) + 1
        # Consecutive numbers, and the first is where the proportion says: nothing of a source is skipped or repeated.
        assert (np.diff(numbers) == 1).all()
        if len(numbers):
            assert abs(numbers[0] - first * share) <= len(weights) + 1 + first * 1e-5


def test_mixture_starts_each_source_at_its_first_row():
    rows = Mixture([Numbered(0), Numbered(1), Numbered(2)], [1, 2, 5]).gather(np.arange(80))["inputs"]
    for i, n in enumerate((10, 20, 50)):
        assert rows[rows[:, 0] == i, 1].tolist() == list(range(n))
