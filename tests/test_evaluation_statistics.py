"""Standard errors against closed forms, brute force and simulation."""

import math

import numpy as np
import pytest
from scipy import stats

from evaluation import statistics


def test_mean_is_the_textbook_error():
    value, error = statistics.mean(np.array([1.0, 2.0, 3.0, 4.0]))
    assert value == 2.5
    assert error == pytest.approx(math.sqrt(5 / 3) / 2)


def test_one_unit_has_no_error():
    assert statistics.mean(np.array([3.0])) == (3.0, None)
    assert statistics.ratio(np.array([3.0]), np.array([2.0])) == (1.5, None)
    assert statistics.bootstrap(lambda x: x.mean(-1), np.array([3.0]), iterations=100) is None
    assert statistics.clustered(np.array([3.0]), ["a"]) is None
    assert statistics.paired(np.array([3.0]), np.array([4.0])).stderr is None


@pytest.mark.parametrize("bad", [np.array([]), np.zeros((2, 2))])
def test_empty_or_misshapen_columns_raise(bad):
    with pytest.raises(ValueError, match="non-empty list"):
        statistics.mean(bad)


def test_lengths_must_agree():
    with pytest.raises(ValueError, match="differ in length"):
        statistics.ratio(np.ones(3), np.ones(4))
    with pytest.raises(ValueError, match="positive denominator"):
        statistics.ratio(np.ones(3), np.zeros(3))


def test_ratio_with_equal_denominators_is_the_mean():
    values = np.random.default_rng(0).normal(size=50)
    value, error = statistics.ratio(values, np.full(50, 4.0))
    expected, expected_error = statistics.mean(values / 4.0)
    assert value == pytest.approx(expected)
    assert error == pytest.approx(expected_error)


def test_ratio_error_covers_the_truth_in_simulation():
    """Documents of varied length with a common rate per document: the reported error is the spread of the estimate."""
    generator = np.random.default_rng(1)
    estimates, errors = [], []
    for _ in range(400):
        length = generator.integers(20, 400, size=80).astype(float)
        rate = generator.normal(2.0, 0.5, size=80)  # All bytes of a document share it: dependence inside a unit.
        value, error = statistics.ratio(length * rate, length)
        estimates.append(value)
        errors.append(error)
    assert np.mean(errors) == pytest.approx(np.std(estimates), rel=0.12)


def test_bootstrap_of_a_mean_is_the_plug_in_error():
    values = np.random.default_rng(2).exponential(size=60)
    error = statistics.bootstrap(lambda x: x.mean(-1), values, iterations=20_000)
    assert error == pytest.approx(
        values.std(ddof=0) / math.sqrt(60), rel=0.02
    )  # The bootstrap's limit uses n, not n - 1.


def test_bootstrap_agrees_with_the_delta_method_for_ratios():
    generator = np.random.default_rng(3)
    denominator = generator.integers(50, 500, size=200).astype(float)
    numerator = denominator * generator.normal(1.5, 0.2, size=200)
    _, delta = statistics.ratio(numerator, denominator)
    error = statistics.bootstrap(lambda a, b: a.sum(-1) / b.sum(-1), numerator, denominator, iterations=10_000)
    assert error == pytest.approx(delta, rel=0.05)


def test_bootstrap_repeats_bitwise_and_counts_its_iterations(monkeypatch):
    values, seen = np.arange(10.0), []

    def statistic(x):
        seen.append(len(x))
        return np.median(x, axis=-1)

    first = statistics.bootstrap(statistic, values, iterations=2500, seed=5)
    assert sum(seen) == 2500
    assert statistics.bootstrap(statistic, values, iterations=2500, seed=5) == first
    assert statistics.bootstrap(statistic, values, iterations=2500, seed=6) != first
    assert statistics.bootstrap(statistic, values, iterations=0) is None


def test_bootstrap_holds_little_memory_for_many_units(monkeypatch):
    monkeypatch.setattr(statistics, "BLOCK", 1000)
    sizes = []
    statistics.bootstrap(lambda x: (sizes.append(x.size), x.mean(-1))[1], np.arange(300.0), iterations=50)
    assert max(sizes) <= 1000 and len(sizes) > 1


def test_clustered_against_the_double_sum():
    generator = np.random.default_rng(4)
    values, clusters = generator.normal(size=30), list(generator.integers(0, 7, size=30))
    total = 0.0
    for i in range(30):
        for j in range(30):
            if i != j and clusters[i] == clusters[j]:
                total += (values[i] - values.mean()) * (values[j] - values.mean())
    expected = math.sqrt(values.var(ddof=1) / 30 + total / 900)
    assert statistics.clustered(values, clusters) == pytest.approx(expected)


def test_clusters_of_one_are_no_clusters_and_copies_add_nothing():
    values = np.random.default_rng(5).normal(size=25)
    assert statistics.clustered(values, range(25)) == pytest.approx(statistics.mean(values)[1])
    copied = statistics.clustered(np.repeat(values, 10), np.repeat(np.arange(25), 10))
    assert copied == pytest.approx(values.std(ddof=0) / 5, rel=0.02)  # Ten copies of a value say no more than one.
    assert statistics.mean(np.repeat(values, 10))[1] < copied / 3  # What ignoring the clusters would have claimed.


def test_pooled_is_the_formula_and_reduces_to_one_task():
    assert statistics.pooled([0.1], [50]) == pytest.approx(0.1)
    expected = math.sqrt((9 * 0.04 * 10 + 29 * 0.01 * 30) / 38 / 40)
    assert statistics.pooled([0.2, 0.1], [10, 30]) == pytest.approx(expected)
    with pytest.raises(ValueError, match="one error per task"):
        statistics.pooled([0.1], [1, 2])


def test_paired_is_the_paired_t_test():
    generator = np.random.default_rng(6)
    a = generator.normal(size=40)
    b = a + generator.normal(0.1, 0.05, size=40)
    found = statistics.paired(a, b)
    expected = stats.ttest_rel(b, a)
    assert found.value == pytest.approx(np.mean(b - a))
    assert found.p_value == pytest.approx(expected.pvalue, rel=1e-6)
    assert found.stderr < statistics.mean(a)[1] / 5  # What is common to a unit cancels.


def test_paired_ratio_is_the_difference_of_ratios():
    generator = np.random.default_rng(7)
    size = generator.integers(10, 100, size=30).astype(float)
    a, b = size * generator.normal(2, 0.3, 30), size * generator.normal(2.1, 0.3, 30)
    found = statistics.paired(a, b, size)
    assert found.value == pytest.approx(b.sum() / size.sum() - a.sum() / size.sum())
    assert found.n == 30


def test_paired_without_spread():
    assert statistics.paired(np.ones(3), np.ones(3)).p_value == 1.0
    assert statistics.paired(np.ones(3), 2 * np.ones(3)).p_value == 0.0


def test_welch_is_the_unequal_variance_t_test():
    generator = np.random.default_rng(8)
    a, b = generator.normal(0, 1, 5), generator.normal(1, 3, 8)
    found, expected = statistics.welch(a, b), stats.ttest_ind(b, a, equal_var=False)
    assert found.value == pytest.approx(b.mean() - a.mean())
    assert found.value / found.stderr == pytest.approx(expected.statistic)
    assert found.p_value == pytest.approx(expected.pvalue)
    assert statistics.welch(a, b[:1]).p_value is None
