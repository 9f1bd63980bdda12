"""Masks: the rule of each against its definition, composition, and the promise that block classes never lie."""

import dataclasses
import itertools

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings

from kernels.attention import cost, masks
from kernels.attention.masks import EMPTY, FULL, PARTIAL, Mask, array, expression
from kernels.tokens import Tokens, packed, sequence


def columns(rng: np.random.Generator, batch: int, length: int) -> Tokens:
    """Random tokens with every column: some sorted, some not."""
    segment = np.sort(rng.integers(0, 4, (batch, length)), axis=1)
    return Tokens(
        index=np.arange(length)[None] + rng.integers(0, 5, (batch, 1)),
        segment=segment,
        start=rng.integers(0, 6, (batch, length)),
        valid=rng.random((batch, length)) < 0.8,
        modality=rng.integers(0, 2, (batch, length)),
        frame=np.sort(rng.integers(0, 5, (batch, length)), axis=1),
        prompt=np.arange(length)[None] < rng.integers(0, length, (batch, 1)),
    )


def test_each_mask_is_its_definition() -> None:
    q, k = columns(np.random.default_rng(0), 2, 7), columns(np.random.default_rng(1), 2, 9)
    expected = {
        masks.everything(): lambda b, t, s: True,
        masks.causal(): lambda b, t, s: q.index[b, t] >= k.index[b, s],
        masks.sliding_window(3): lambda b, t, s: q.index[b, t] - k.index[b, s] < 3,
        masks.sink_tokens(2): lambda b, t, s: k.index[b, s] - k.start[b, s] < 2,
        masks.segments(): lambda b, t, s: q.segment[b, t] == k.segment[b, s],
        masks.valid(): lambda b, t, s: k.valid[b, s],
        masks.prefix(): lambda b, t, s: k.prompt[b, s],
        masks.prefix(3): lambda b, t, s: k.index[b, s] - k.start[b, s] < 3,
        masks.predicate(lambda q, k: q.frame == k.frame, ("q.frame", "k.frame")): lambda b, t, s: (
            q.frame[b, t] == k.frame[b, s]
        ),
        masks.frames(): lambda b, t, s: q.frame[b, t] == k.frame[b, s] and q.frame[b, t] >= 0,
        masks.across_modalities(): lambda b, t, s: q.modality[b, t] != k.modality[b, s] and k.prompt[b, s],
        masks.across_modalities(1, 0): lambda b, t, s: (
            q.modality[b, t] == 1 and k.modality[b, s] == 0 and k.prompt[b, s]
        ),
        masks.composite(1): lambda b, t, s: q.modality[b, t] != 1 or q.index[b, t] == k.index[b, s],
    }
    for mask, rule in expected.items():
        allowed = np.asarray(jnp.broadcast_to(mask.allowed(q, k), (2, 1, 7, 9)))
        for b, t, s in itertools.product(range(2), range(7), range(9)):
            assert allowed[b, 0, t, s] == rule(b, t, s), (mask, b, t, s)


def test_masks_with_arrays_are_their_definition() -> None:
    """Windows per head, explicit blocks, chosen keys and spans; known and traced arrays alike."""
    rng = np.random.default_rng(4)
    q, k = columns(rng, 2, 7), columns(rng, 2, 9)
    q, k = (dataclasses.replace(side, index=side.index - 2) for side in (q, k))
    sizes, sinks = np.array([1, 3, 6]), np.array([0, 2, 1])
    live = rng.random((2, 3, 3, 4)) < 0.5
    chosen, first = rng.random((2, 1, 9)) < 0.5, rng.integers(-3, 9, (1, 3, 9))
    last, begin = first + rng.integers(0, 8, (1, 3, 9)), rng.integers(-3, 9, (2, 7))

    def block(b: int, h: int, i: int, j: int) -> bool:
        return 0 <= i < 3 and 0 <= j < 4 and live[b, h, i, j]

    definitions = [
        (masks.head_windows, (sizes, sinks), lambda b, h, t, s, i, j: i - j < sizes[h] or j - k.start[b, s] < sinks[h]),
        (lambda live: masks.blocks(live, 3, 2), (live,), lambda b, h, t, s, i, j: block(b, h, i // 3, j // 2)),
        (masks.keys, (chosen,), lambda b, h, t, s, i, j: chosen[b, 0, s]),
        (masks.spans_of_keys, (first, last), lambda b, h, t, s, i, j: first[0, h, s] <= i < last[0, h, s]),
        (masks.spans_of_queries, (begin, begin + 3), lambda b, h, t, s, i, j: begin[b, t] <= j < begin[b, t] + 3),
    ]
    for build, arrays, rule in definitions:
        for mask in (build(*arrays), build(*map(jnp.asarray, arrays))):
            allowed = np.broadcast_to(mask.allowed(q, k), (2, 3, 7, 9))
            for b, h, t, s in np.ndindex(allowed.shape):
                expected = rule(b, h, t, s, int(q.index[b, t]), int(k.index[b, s]))
                assert allowed[b, h, t, s] == expected, (mask, b, h, t, s)
            for size in ((1, 1), (2, 3), (3, 2), (4, 5)):
                assert_classes_are_true(mask, q, k, *size)
            np.testing.assert_array_equal(
                mask.materialise(q, k, slice(1, 5), slice(2, 9)), mask.allowed(q, k)[:, :, 1:5, 2:9]
            )


def test_two_masks_of_a_kind_keep_their_arrays_apart() -> None:
    tokens, (a, b) = sequence(6), (masks.keys(np.arange(6) < 2), masks.keys(np.arange(6) % 2 == 0))
    x, y = (np.asarray(mask.allowed(tokens, tokens)) for mask in (a, b))
    np.testing.assert_array_equal((a | ~b).allowed(tokens, tokens), x | ~y)
    np.testing.assert_array_equal(
        ((a & b) | (b & masks.causal())).allowed(tokens, tokens), x & y | y & np.tri(6, dtype=bool)
    )


def test_block_maps_are_classified_exactly_at_any_block_size() -> None:
    """A coarse block of a fine map is full if all of it is live, empty if none of it is."""
    live = np.ones((4, 4), bool)
    live[2:, :2], live[0, 3] = False, False
    tokens = sequence(32)
    status = masks.blocks(live, 8).classify(tokens, tokens, 16, 16)
    np.testing.assert_array_equal(status[0, 0], [[FULL, PARTIAL], [EMPTY, FULL]])
    fine = masks.blocks(live, 8).classify(tokens, tokens, 4, 4)[0, 0]
    np.testing.assert_array_equal(fine, np.where(live, FULL, EMPTY).repeat(2, 0).repeat(2, 1))


def test_composition_is_set_algebra() -> None:
    q = columns(np.random.default_rng(2), 2, 8)
    a, b = masks.causal(), masks.segments()
    x, y = (np.asarray(jnp.broadcast_to(mask.allowed(q, q), (2, 1, 8, 8))) for mask in (a, b))
    np.testing.assert_array_equal((a & b).allowed(q, q), x & y)
    np.testing.assert_array_equal((a | b).allowed(q, q), x | y)
    np.testing.assert_array_equal((~a).allowed(q, q), ~x)
    assert ~~a == a
    assert masks.everything() & a == a and a & masks.everything() == a
    assert a | masks.everything() == masks.everything()


def test_masks_are_values() -> None:
    one = masks.causal() & (masks.sliding_window(8) | masks.sink_tokens(2)) & masks.valid()
    two = masks.causal() & (masks.sliding_window(8) | masks.sink_tokens(2)) & masks.valid()
    assert one == two and hash(one) == hash(two)
    assert one != masks.causal() & (masks.sliding_window(9) | masks.sink_tokens(2)) & masks.valid()
    assert one.columns == {"index", "start", "valid"}
    assert one.columns_of("q") == {"index"}
    assert repr(one) == "(causal() & (sliding_window(8) | sink_tokens(2)) & valid())"
    assert jax.tree.leaves(one) == []


def test_only_the_columns_read_are_needed_and_absent_ones_are_named() -> None:
    plain = sequence(4)
    assert (masks.segments() & masks.valid() & masks.sink_tokens(1)).allowed(plain, plain).shape == (1, 1, 4, 4)
    with pytest.raises(ValueError, match=r"q\.frame.*Tokens\(frame=\.\.\.\)"):
        masks.predicate(lambda q, k: q.frame >= k.frame, ("q.frame", "k.frame")).allowed(plain, plain)
    with pytest.raises(ValueError, match=r"k\.segment"):
        masks.segments().allowed(packed(jnp.ones((1, 4), jnp.int32)), plain)
    with pytest.raises(AttributeError):  # A column that was not declared is not there.
        masks.predicate(lambda q, k: q.frame >= k.frame).allowed(plain, plain)


@pytest.mark.parametrize(
    "build, message",
    [
        (lambda: masks.sliding_window(0), "at least 1"),
        (lambda: masks.sink_tokens(-1), "at least 0"),
        (lambda: masks.head_windows([4, 0]), "at least 1"),
        (lambda: masks.head_windows([4, 2], [1, 1, 1]), "3 numbers of sinks for 2 heads"),
        (lambda: masks.blocks(np.ones(4, bool), 2), "nq, nk"),
        (lambda: masks.blocks(np.ones((2, 2), bool), 0), "at least 1"),
        (lambda: masks.keys(np.ones(4)), "booleans"),
        (lambda: masks.spans_of_keys(np.zeros(3), np.ones(3)), "whole numbers"),
        (lambda: masks.predicate(lambda q, k: True, ("q.colour",)), "q.colour"),
        (lambda: masks.predicate(lambda q, k: True, ("index",)), "index"),
    ],
)
def test_bad_parameters_are_refused(build, message) -> None:
    with pytest.raises(ValueError, match=message):
        build()


def test_materialise_on_any_slice() -> None:
    q = columns(np.random.default_rng(3), 2, 12)
    mask = masks.causal() & masks.segments() | masks.sink_tokens(1)
    whole = mask.materialise(q)
    np.testing.assert_array_equal(mask.materialise(q, q, slice(3, 7), slice(2, 12)), whole[:, :, 3:7, 2:12])
    np.testing.assert_array_equal(masks.causal().materialise(5)[0, 0], np.tril(np.ones((5, 5), bool)))
    np.testing.assert_array_equal(masks.causal().materialise(5, 8)[0, 0], np.tri(5, 8, dtype=bool))


LEAVES = st.one_of(
    st.just(masks.everything()),
    st.just(masks.causal()),
    st.integers(1, 12).map(masks.sliding_window),
    st.integers(0, 5).map(masks.sink_tokens),
    st.just(masks.segments()),
    st.just(masks.valid()),
    st.just(masks.prefix()),
    st.just(masks.frames()),
    st.sampled_from([masks.across_modalities(), masks.across_modalities(1, 0), masks.composite(1)]),
    st.just(masks.head_windows([2, 5], 1)),
    st.integers(0, 99).map(lambda seed: masks.blocks(np.random.default_rng(seed).random((5, 4)) < 0.6, 3, 4)),
    st.just(masks.predicate(lambda q, k: q.frame >= k.frame, ("q.frame", "k.frame"), by_block=True)),
    st.just(masks.predicate(lambda q, k: q.frame != k.frame, ("q.frame", "k.frame"), by_block=True)),
    st.just(
        masks.predicate(lambda q, k: (q.modality == 1) & (k.modality == 0), ("q.modality", "k.modality"), by_block=True)
    ),
    st.integers(-3, 3).map(
        lambda n: masks.predicate(lambda q, k: n * q.index + 2 <= k.index // 2 - 1, by_block=True)
    ),
    st.just(masks.predicate(lambda q, k: q.index * k.index > 9 - k.index, by_block=True)),
    st.just(masks.predicate(lambda q, k: (q.index + k.index) % 3 == 0)),
)  # fmt: skip
EXPRESSIONS = st.recursive(
    LEAVES,
    lambda inner: st.one_of(
        st.tuples(inner, inner).map(lambda pair: pair[0] & pair[1]),
        st.tuples(inner, inner).map(lambda pair: pair[0] | pair[1]),
        inner.map(lambda mask: ~mask),
    ),
    max_leaves=5,
)


def assert_classes_are_true(mask: Mask, q: Tokens, k: Tokens, block_q: int, block_k: int) -> np.ndarray:
    status = np.asarray(mask.classify(q, k, block_q, block_k))
    allowed = np.asarray(mask.allowed(q, k))
    batch, heads = (max(a, b) for a, b in zip(status.shape[:2], allowed.shape[:2], strict=True))
    status = np.broadcast_to(status, (batch, heads, *status.shape[2:]))
    allowed = np.broadcast_to(allowed, (batch, heads, *allowed.shape[2:]))
    assert status.shape[2:] == (-(-q.length // block_q), -(-k.length // block_k))
    for (b, h, i, j), kind in np.ndenumerate(status):
        block = allowed[b, h, i * block_q : (i + 1) * block_q, j * block_k : (j + 1) * block_k]
        assert kind in (EMPTY, PARTIAL, FULL)
        assert kind != EMPTY or not block.any(), (mask, b, h, i, j)
        assert kind != FULL or block.all(), (mask, b, h, i, j)
    return status


@settings(max_examples=150, deadline=None)
@given(
    mask=EXPRESSIONS,
    seed=st.integers(0, 1000),
    lengths=st.tuples(st.integers(1, 24), st.integers(1, 24)),
    blocks=st.tuples(st.sampled_from([1, 3, 4, 8]), st.sampled_from([1, 3, 4, 8])),
)
def test_no_expression_loses_a_pair_or_claims_one(mask, seed, lengths, blocks) -> None:
    rng = np.random.default_rng(seed)
    q, k = columns(rng, 2, lengths[0]), columns(rng, 2, lengths[1])
    assert_classes_are_true(mask, q, k, *blocks)


def test_classes_are_sharp_where_intervals_can_be() -> None:
    q = sequence(16)
    status = np.asarray((masks.causal() & masks.sliding_window(8)).classify(q, q, 4, 4))[0, 0]
    np.testing.assert_array_equal(status, [[1, 0, 0, 0], [2, 1, 0, 0], [1, 2, 1, 0], [0, 1, 2, 1]])
    rows = packed(jnp.repeat(jnp.array([[1, 2, 3, 0]]), 4, axis=1))
    status = np.asarray((masks.segments() & masks.valid()).classify(rows, rows, 4, 4))[0, 0]
    np.testing.assert_array_equal(status, np.diag([2, 2, 2, 0]))
    assert (np.asarray(masks.predicate(lambda q, k: q.index >= k.index).classify(q, q, 4, 4)) == PARTIAL).all()


def test_classes_are_the_same_traced_and_not() -> None:
    q = columns(np.random.default_rng(4), 2, 13)
    mask = masks.causal() & masks.segments() & masks.valid() | masks.prefix()
    concrete = mask.classify(q, q, 4, 4)
    assert isinstance(concrete, np.ndarray)
    traced = jax.jit(lambda tokens: mask.classify(tokens, tokens, 4, 4))(q)
    np.testing.assert_array_equal(concrete, traced)


@expression
class HeadWindows(Mask):
    """A window per head: what a later mask of that kind takes."""

    windows: tuple[int, ...]
    reads = ("q.index", "k.index")

    def extra(self, side, length):
        window = np.broadcast_to(np.asarray(self.windows)[None, :, None], (1, len(self.windows), length))
        return {"window": window} if side == "q" else {}

    def rule(self, q, k):
        return q.index - k.index < q.window


@expression
class BlockList(Mask):
    """Live blocks of `size` tokens listed in an array made at run time."""

    size: int
    live: jax.Array = array(default=None)

    def extra(self, side, length):
        return {"block": (np.arange(length) // self.size)[None, None]}

    def rule(self, q, k):
        return self.live[q.block, k.block]

    def block_rule(self, q, k):
        same = (q.block.low == q.block.high) & (k.block.low == k.block.high)
        live = self.live[q.block.low, k.block.low]
        return masks.Truth(live | ~same, live & same)


def test_per_head_masks_are_a_small_addition() -> None:
    mask = masks.causal() & HeadWindows((2, 5, 40))
    allowed = np.asarray(mask.materialise(20))
    assert allowed.shape == (1, 3, 20, 20)
    for head, window in enumerate((2, 5, 40)):
        expected = (masks.causal() & masks.sliding_window(window)).materialise(20)[0, 0]
        np.testing.assert_array_equal(allowed[0, head], expected)
    status = assert_classes_are_true(mask, sequence(20), sequence(20), 4, 4)
    assert (status[0, 0] == EMPTY).sum() > (status[0, 2] == EMPTY).sum()
    both = (HeadWindows((1, 9)) & HeadWindows((2, 3))).materialise(6)
    np.testing.assert_array_equal(both[0], HeadWindows((1, 3)).materialise(6)[0])


def test_block_lists_are_a_small_addition_and_pass_through_jit() -> None:
    live = jnp.asarray(np.random.default_rng(5).random((4, 4)) < 0.4)
    mask = masks.causal() & BlockList(4, live)
    expected = np.tril(np.ones((16, 16), bool)) & np.repeat(np.repeat(np.asarray(live), 4, 0), 4, 1)
    np.testing.assert_array_equal(jax.jit(lambda mask: mask.materialise(16))(mask)[0, 0], expected)
    status = assert_classes_are_true(mask, sequence(16), sequence(16), 4, 4)
    assert ((status[0, 0] != EMPTY) == (np.asarray(live) & np.tri(4, dtype=bool))).all()
    assert_classes_are_true(mask, sequence(16), sequence(16), 8, 3)


def test_draw_gives_a_picture_of_the_map(tmp_path) -> None:
    figure = (masks.causal() & masks.sliding_window(8)).draw(32, block=8)
    image = np.asarray(figure.axes[0].images[0].get_array())
    np.testing.assert_array_equal(image, (masks.causal() & masks.sliding_window(8)).materialise(32)[0, 0])
    assert len(figure.axes[0].patches) == 16
    figure.savefig(tmp_path / "mask.png")
    assert (tmp_path / "mask.png").stat().st_size > 1000


COUNTED = [
    masks.everything(),
    masks.causal(),
    masks.causal() & masks.sliding_window(1),
    masks.causal() & masks.sliding_window(7) & masks.sliding_window(9),
    masks.causal() & masks.sliding_window(1000),
    masks.sliding_window(5),
    masks.causal() & (masks.sliding_window(5) | masks.sink_tokens(3)),
    ~masks.causal(),
]


@pytest.mark.parametrize("mask", COUNTED, ids=str)
@pytest.mark.parametrize("length, keys", [(1, 1), (1, 300), (17, 17), (5, 290), (300, 7), (258, 300)])
def test_pairs_are_counted_exactly(mask, length, keys) -> None:
    offset = keys - length
    index = np.arange(max(length, keys))[None]
    q, k = Tokens(index=index[:, :length] + offset), Tokens(index=index[:, :keys])
    assert cost.pairs(mask, length, keys) == np.asarray(mask.allowed(q, k)).sum()


def test_pairs_of_packed_rows_and_heads_are_averaged() -> None:
    tokens = packed(jnp.asarray(np.sort(np.random.default_rng(6).integers(0, 4, (3, 300)), axis=1)))
    mask = masks.causal() & masks.segments() & masks.valid() & HeadWindows((3, 50))
    allowed = np.asarray(mask.allowed(tokens, tokens))
    assert cost.pairs(mask, 300, tokens=(tokens, tokens)) == pytest.approx(allowed.sum() / 6)


def test_flops_and_bytes_count_every_product_and_array() -> None:
    batch, length, keys, heads, kv_heads, width, value_width = 2, 5, 7, 4, 2, 3, 6
    q, v = (batch, length, heads, width), (batch, keys, kv_heads, value_width)
    forward = backward = 0
    for _, _, t, s in itertools.product(range(batch), range(heads), range(length), range(keys)):
        if t + keys - length >= s:
            forward += 2 * width + 2 * value_width  # q.k, p v
            backward += 2 * width + 2 * value_width + 2 * value_width + 2 * width + 2 * width  # q.k, do.v, dv, dq, dk
    live = cost.pairs(masks.causal(), length, keys)
    assert cost.flops(q, v, live) == forward
    assert cost.flops(q, v, live, backward=True) == backward
    arrays = {
        "q": batch * length * heads * width, "k": batch * keys * kv_heads * width,
        "v": batch * keys * kv_heads * value_width, "out": batch * length * heads * value_width,
    }  # fmt: skip
    lse = 4 * batch * length * heads
    assert cost.bytes(q, v, itemsize=2) == 2 * sum(arrays.values()) + lse
    assert cost.bytes(q, v, itemsize=2, backward=True) == 2 * 2 * sum(arrays.values()) + lse


def test_executed_pairs_are_those_of_live_blocks() -> None:
    q = sequence(64)
    assert cost.executed(masks.causal(), q, q, 16, 16) == 10 * 256
    assert cost.executed(masks.everything(), q, q, 16, 16) == 64 * 64
