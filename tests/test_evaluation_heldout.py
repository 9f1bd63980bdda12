"""Held-out scoring against NumPy, and the windows it is made of."""

import numpy as np
import pytest
from evaluation_standins import Bytes, MeanModel, Pipeline, mean_model_log_probs, texts
from hypothesis import given, settings
from hypothesis import strategies as st

import evaluation
from evaluation import EvaluationError, scoring
from evaluation.scoring import Scorer, Window, buckets, rolling_windows


@settings(deadline=None, max_examples=300)
@given(st.integers(0, 200), st.integers(1, 40), st.data())
def test_every_token_is_scored_once_with_the_longest_context(count, length, data):
    """Each target is right, scored once, and preceded by as much true context as the rule of windows gives."""
    context = data.draw(st.integers(1, length))
    tokens, prefix = list(range(1000, 1000 + count)), 7
    stream = [prefix, *tokens]
    scored = []
    for window in rolling_windows(tokens, prefix, length, context):
        assert 1 <= len(window.inputs) == len(window.targets) <= length
        assert 1 <= window.scored <= len(window.targets)
        begin = stream.index(window.inputs[0])
        assert window.inputs == stream[begin : begin + len(window.inputs)]
        assert window.targets == stream[begin + 1 : begin + 1 + len(window.inputs)]
        for offset in range(len(window.targets) - window.scored, len(window.targets)):
            position = begin + 1 + offset  # Index in the stream; it has `position` tokens before it.
            seen = offset + 1
            assert seen == position or seen >= context
            scored.append(window.targets[offset])
        if count >= length:
            assert len(window.inputs) == length  # The last window too: it is shifted left, not cut short.
    assert scored == tokens


def test_windows_of_stride_one_give_every_token_full_context():
    windows = rolling_windows(list(range(10)), 99, 4, context=4)
    assert [window.scored for window in windows] == [4, 1, 1, 1, 1, 1, 1]
    assert windows[-1] == Window([5, 6, 7, 8], [6, 7, 8, 9], 1)


def test_windows_reject_impossible_contexts():
    with pytest.raises(ValueError, match="1 <= context <= length"):
        rolling_windows([1], 0, 4, context=5)


@settings(deadline=None, max_examples=200)
@given(st.lists(st.integers(1, 256), max_size=80), st.integers(1, 8))
def test_buckets_hold_their_windows_in_few_shapes(lengths, batch_size):
    sizes = buckets(lengths, 256, batch_size)
    assert all(size >= length for size, length in zip(sizes, lengths, strict=True))
    assert set(sizes) <= {64, 128, 256}
    used = sorted(set(sizes))
    assert all(sizes.count(size) >= 4 * batch_size for size in used[:-1])


def _expected(model, tokenizer, documents, length):
    """Sums of nll and of right guesses per document, by another way: whole windows recomputed in NumPy, no batches."""
    sums, hits = [], []
    for text in documents:
        ids = tokenizer.encode(text)
        total, right, done = 0.0, 0, 0
        while done < len(ids):
            end = min(done + length, len(ids))
            begin = max(0, end - length)
            stream = [tokenizer.bos_id, *ids]
            log_probs = mean_model_log_probs(model, stream[begin:end])
            for position in range(done, end):
                row = log_probs[position - begin]
                total -= row[ids[position]]
                right += int(row.argmax() == ids[position])
            done = end
        sums.append(total)
        hits.append(right)
    return np.array(sums), np.array(hits)


def test_heldout_equals_numpy():
    model, documents = MeanModel(Bytes.vocab_size), texts(9)
    length = 48
    results = evaluation.evaluate(model, Bytes(), Pipeline(documents), ["heldout"], length=length, batch_size=4)
    metrics = results.found["heldout"].metrics
    nll, hits = _expected(model, Bytes(), documents, length)
    sizes = np.array([len(text.encode()) for text in documents], float)
    rate = nll.sum() / sizes.sum()
    assert metrics["bits_per_byte"].value == pytest.approx(rate / np.log(2), rel=2e-6)
    assert metrics["byte_perplexity"].value == pytest.approx(np.exp(rate), rel=1e-5)
    assert metrics["token_accuracy"].value == pytest.approx(hits.sum() / sizes.sum())
    residual = nll - rate * sizes
    error = np.sqrt(9 / 8 * np.square(residual).sum()) / sizes.sum()
    assert metrics["bits_per_byte"].stderr == pytest.approx(error / np.log(2), rel=1e-4)
    assert metrics["byte_perplexity"].stderr == pytest.approx(np.exp(rate) * error, rel=1e-4)
    per_document = [row["nll"] for row in results.found["heldout"].samples]
    np.testing.assert_allclose(per_document, nll, rtol=1e-5)


def test_token_and_byte_perplexity_differ_by_tokens_per_byte():
    class Pairs(Bytes):
        """Two letters to a token where they can be paired."""

        vocab_size = 259 + 1

        def encode(self, text):
            ids, index, raw = [], 0, text.encode()
            while index < len(raw):
                pair = raw[index : index + 2] == b"ab"
                ids.append(259 if pair else raw[index])
                index += 2 if pair else 1
            return ids

        def byte_length(self, ids):
            return sum(2 if token == 259 else token < 256 for token in ids)

    model, documents = MeanModel(Pairs.vocab_size), ["abababcd" * 5, "abc"]
    found = evaluation.evaluate(model, Pairs(), Pipeline(documents), length=16).found["heldout"]
    tokens, size = sum(len(Pairs().encode(text)) for text in documents), sum(map(len, documents))
    metrics = found.metrics
    assert tokens < size
    assert np.log(metrics["token_perplexity"].value) * tokens == pytest.approx(
        np.log(metrics["byte_perplexity"].value) * size
    )
    capped = evaluation.evaluate(model, Pairs(), Pipeline(documents), length=16, params={"heldout": {"max_tokens": 4}})
    assert [row["bytes"] for row in capped.found["heldout"].samples] == [7, 3]  # ab ab ab c | ab c
    assert [row["tokens"] for row in capped.found["heldout"].samples] == [4, 2]


@pytest.mark.parametrize("batch_size", [1, 3, 16])
def test_scores_do_not_depend_on_the_batch(batch_size):
    model = MeanModel(Bytes.vocab_size)
    windows = [window for text in texts(12, seed=1) for window in rolling_windows(Bytes().encode(text), 256, 100)]
    found = Scorer(model, batch_size=batch_size)(windows, length=100)
    for window, (values, best) in zip(windows, found, strict=True):
        log_probs = mean_model_log_probs(model, list(window.inputs))
        expected = log_probs[np.arange(len(window.targets)), window.targets][-window.scored :]
        np.testing.assert_allclose(values, expected, atol=2e-5)
        np.testing.assert_array_equal(best, (log_probs.argmax(1) == window.targets)[-window.scored :])


def test_few_shapes_are_compiled():
    model = MeanModel(40, seed=9)
    scoring.score.clear_cache()
    windows = [window for n in range(1, 200, 3) for window in rolling_windows([1] * n, 0, 128)]
    Scorer(model, batch_size=8)(windows, length=128)
    assert scoring.score._cache_size() <= 2


def test_no_copy_of_the_logits_is_made():
    """Beside the model's own logits the program keeps nothing of shape [B, T, V]."""
    import jax
    import jax.numpy as jnp

    batch, length, vocab = 4, 64, 4096
    model = MeanModel(vocab)
    from flax import nnx

    graph, state = nnx.split(model)
    ids = jnp.zeros((batch, length), jnp.int32)
    memory = (
        jax.jit(scoring.score.__wrapped__, static_argnums=(0, 1))
        .lower(graph, None, state, ids, ids)
        .compile()
        .memory_analysis()
    )
    assert memory.temp_size_in_bytes < 1.25 * batch * length * vocab * 4


def test_limits_select_documents():
    model, pipeline = MeanModel(Bytes.vocab_size), Pipeline(texts(8))

    def used(**options):
        found = evaluation.evaluate(model, Bytes(), pipeline, length=32, **options).found["heldout"]
        assert found.original == 8
        return [row["doc_id"] for row in found.samples]

    assert used() == list(range(8))
    assert used(limit=3) == [0, 1, 2]
    assert used(limit=0.25) == [0, 1]
    assert used(picked={"heldout": [5, 1]}) == [5, 1]
    with pytest.raises(EvaluationError, match="document 8 was asked for"):
        used(picked={"heldout": [8]})
    with pytest.raises(EvaluationError, match="limit must be"):
        used(limit=-1)


def test_bootstrap_errors_are_near_the_delta_method():
    model, pipeline = MeanModel(Bytes.vocab_size), Pipeline(texts(60, seed=2))
    delta = evaluation.evaluate(model, Bytes(), pipeline, length=32).found["heldout"].metrics
    drawn = evaluation.evaluate(model, Bytes(), pipeline, length=32, bootstrap_iterations=4000).found["heldout"].metrics
    for name in delta:
        assert drawn[name].value == delta[name].value
        assert drawn[name].stderr == pytest.approx(delta[name].stderr, rel=0.15)


def test_what_cannot_be_scored_is_one_clear_line():
    model = MeanModel(Bytes.vocab_size)
    with pytest.raises(EvaluationError, match="needs text"):
        evaluation.evaluate(model, Bytes(), None)
    with pytest.raises(EvaluationError, match="no held-out documents"):
        evaluation.evaluate(model, Bytes(), Pipeline([]))
    with pytest.raises(EvaluationError, match="empty"):
        evaluation.evaluate(model, Bytes(), Pipeline(["", ""]))
    model.head[...] = model.head[...].at[0, 0].set(np.nan)
    with pytest.raises(EvaluationError, match=r"no finite log-probability.*file0.txt"):
        evaluation.evaluate(model, Bytes(), Pipeline(["abc"]))


def test_weights_change_between_calls_is_seen():
    model, pipeline = MeanModel(Bytes.vocab_size), Pipeline(texts(3))
    first = evaluation.evaluate(model, Bytes(), pipeline, length=32).scalars()
    model.head[...] = model.head[...] * 0.0
    second = evaluation.evaluate(model, Bytes(), pipeline, length=32).scalars()
    assert first != second
    assert second["eval/heldout/token_perplexity"] == pytest.approx(Bytes.vocab_size, rel=1e-5)
