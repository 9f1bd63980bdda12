"""Standard errors: of means, of ratios, by bootstrap, over clusters, pooled over a group, and of paired differences.

Everything is NumPy in float64. A standard error that the data cannot give (fewer than two units) is None, never zero.
"""

import dataclasses
from collections.abc import Callable, Hashable, Sequence

import numpy as np
from jaxtyping import Float
from scipy import special

CHUNK = 1000  # Bootstrap iterations per seed: chunk i is drawn from seed + i, so that results do not depend on memory.
BLOCK = 4_000_000  # Largest number of resampled units held at once.


def mean(values: Float[np.ndarray, " n"]) -> tuple[float, float | None]:
    """The mean and its standard error, sample deviation (n - 1) over sqrt(n)."""
    values = _units(values)
    error = None if len(values) < 2 else float(values.std(ddof=1) / np.sqrt(len(values)))
    return float(values.mean()), error


def ratio(numerator: Float[np.ndarray, " n"], denominator: Float[np.ndarray, " n"]) -> tuple[float, float | None]:
    """sum(numerator) / sum(denominator) and its standard error by the delta method.

    A unit (a document) brings both sums, so dependence inside a unit is accounted for: this is the clustered error of
    a ratio estimator (Cochran 1977, eq. 6.13).
    """
    numerator, denominator = _units(numerator), _units(denominator)
    _same_length(numerator, denominator)
    total = denominator.sum()
    if total <= 0:
        raise ValueError(f"a ratio needs a positive denominator, got a total of {total}")
    value = numerator.sum() / total
    n = len(numerator)
    if n < 2:
        return float(value), None
    residual = numerator - value * denominator
    return float(value), float(np.sqrt(n / (n - 1) * np.square(residual).sum()) / total)


def bootstrap(
    statistic: Callable[..., np.ndarray],
    *columns: Float[np.ndarray, " n"],
    iterations: int,
    seed: int = 0,
) -> float | Float[np.ndarray, " m"] | None:
    """Standard error of `statistic` under resampling of the n units with replacement.

    `statistic` gets each column resampled as [r, n] and gives [r], or [r, m] for m statistics at once. Iterations come
    in chunks of 1,000, chunk i from seed + i. None for fewer than two units or fewer than two iterations.
    """
    arrays = [_units(column) for column in columns]
    _same_length(*arrays)
    n = len(arrays[0])
    if n < 2 or iterations < 2:
        return None
    draws = []
    for start in range(0, iterations, CHUNK):
        generator = np.random.default_rng(seed + start // CHUNK)
        remaining = min(CHUNK, iterations - start)
        while remaining:
            rows = min(remaining, max(1, BLOCK // n))
            picked = generator.integers(0, n, size=(rows, n))
            draws.append(np.asarray(statistic(*(array[picked] for array in arrays)), np.float64))
            remaining -= rows
    errors = np.concatenate(draws).std(axis=0, ddof=1)
    return errors if errors.ndim else float(errors)


def clustered(values: Float[np.ndarray, " n"], clusters: Sequence[Hashable]) -> float | None:
    """Standard error of the mean of `values` whose units come in clusters (questions of one image, rows of one file).

    SE^2 = s^2 / n + (1 / n^2) sum over clusters of sum_{i != j} (x_i - mean)(x_j - mean)  (Miller 2024, eq. 4).
    """
    values = _units(values)
    n = len(values)
    if len(clusters) != n:
        raise ValueError(f"clusters names {len(clusters)} units, values has {n}")
    if n < 2:
        return None
    difference = values - values.mean()
    _, inverse = np.unique(np.asarray([str(cluster) for cluster in clusters]), return_inverse=True)
    sums = np.bincount(inverse, weights=difference)
    cross = np.square(sums).sum() - np.square(difference).sum()
    return float(np.sqrt(max(values.var(ddof=1) / n + cross / n**2, 0.0)))


def pooled(errors: Sequence[float], sizes: Sequence[int]) -> float | None:
    """Standard error of a size-weighted group mean from the errors of its k tasks, by pooled variance.

    sqrt(sum (n_i - 1) se_i^2 n_i / (sum n_i - k) / sum n_i), as lm-evaluation-harness does.
    """
    if len(errors) != len(sizes) or not sizes:
        raise ValueError(f"a group needs one error per task, got {len(errors)} errors and {len(sizes)} sizes")
    n, se = np.asarray(sizes, np.float64), np.asarray(errors, np.float64)
    if n.sum() <= len(n):
        return None
    variance = np.sum((n - 1) * np.square(se) * n) / (n.sum() - len(n))
    return float(np.sqrt(variance / n.sum()))


@dataclasses.dataclass(frozen=True)
class Difference:
    """How far b lies above a."""

    value: float
    stderr: float | None
    n: int
    p_value: float | None  # Two-sided, Student's t with n - 1 degrees of freedom.


def paired(
    a: Float[np.ndarray, " n"], b: Float[np.ndarray, " n"], weights: Float[np.ndarray, " n"] | None = None
) -> Difference:
    """The difference b - a of two means over the same units; with `weights`, of two ratios with that denominator.

    What is common to a unit (a hard document) cancels, so this error is usually far below that of either mean.
    """
    a, b = _units(a), _units(b)
    _same_length(a, b)
    value, error = mean(b - a) if weights is None else ratio(b - a, weights)
    n = len(a)
    if error is None:
        p_value = None
    elif error == 0.0:
        p_value = 1.0 if value == 0.0 else 0.0
    else:
        p_value = float(2 * special.stdtr(n - 1, -abs(value) / error))
    return Difference(value, error, n, p_value)


def welch(a: Float[np.ndarray, " n"], b: Float[np.ndarray, " m"]) -> Difference:
    """mean(b) - mean(a) of units that are not paired (seeds), by Welch's test; n counts both."""
    (mean_a, error_a), (mean_b, error_b) = mean(a), mean(b)
    value, n = mean_b - mean_a, len(a) + len(b)
    if error_a is None or error_b is None:
        return Difference(value, None, n, None)
    variances = error_a**2, error_b**2
    error = float(np.sqrt(sum(variances)))
    if error == 0.0:
        return Difference(value, error, n, 1.0 if value == 0.0 else 0.0)
    freedom = sum(variances) ** 2 / (variances[0] ** 2 / (len(a) - 1) + variances[1] ** 2 / (len(b) - 1))
    return Difference(value, error, n, float(2 * special.stdtr(freedom, -abs(value) / error)))


def _units(values: Float[np.ndarray, " n"]) -> Float[np.ndarray, " n"]:
    array = np.asarray(values, np.float64)
    if array.ndim != 1 or not array.size:
        raise ValueError(f"statistics need a non-empty list of numbers, got shape {array.shape}")
    return array


def _same_length(*arrays: np.ndarray) -> None:
    if len({len(array) for array in arrays}) > 1:
        raise ValueError(f"columns differ in length: {', '.join(str(len(array)) for array in arrays)}")
