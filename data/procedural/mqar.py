"""Multi-query associative recall (Arora et al., "Zoology", arXiv:2312.04927).

A context of key-value pairs is followed by a stretch in which each key comes once more, near the front more often
than far; at each of those keys the model is to name the value.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np

from data.errors import DataError

IGNORED = -100  # The label where nothing is asked.
_CHUNK = 1 << 22  # Random numbers held at a time while keys are drawn.


@dataclasses.dataclass(frozen=True)
class MQAR:
    """The settings, named as in the reference.

    Raises DataError when they contradict one another: N must be even and below V, there must be enough keys
    (K <= V/2 - 1), and pairs and queries must fit (2KP + 2K <= N).
    """

    vocab_size: int = 8192  # V: keys are 1 .. V/2 - 1, values V/2 .. V - 1.
    input_seq_len: int = 64  # N
    num_kv_pairs: int = 4  # K
    power_a: float = 0.01  # Gap g is drawn with weight a (g + 1)^(a - 1): small a puts queries close to the context.
    num_passes: int = 1  # P: how many times the context is repeated.
    random_non_queries: bool = True  # Fill the unused inputs with random ids; False leaves 0.

    def __post_init__(self) -> None:
        n, k, p, v = self.input_seq_len, self.num_kv_pairs, self.num_passes, self.vocab_size
        if min(n, k, p) < 1 or not self.power_a > 0:
            raise DataError(f"MQAR: input_seq_len, num_kv_pairs, num_passes and power_a must be positive, got {self}")
        if n % 2 or v <= n:
            raise DataError(f"MQAR: input_seq_len must be even and below vocab_size, got {n} and {v}")
        if k > v // 2 - 1:
            raise DataError(f"MQAR: {k} distinct keys need a vocab_size of at least {2 * k + 2}, got {v}")
        if 2 * k * p + 2 * k > n:
            raise DataError(f"MQAR: {k} pairs in {p} passes and their queries need {2 * k * (p + 1)} places, got {n}")

    @property
    def context(self) -> int:
        """C = 2KP, the length of the pairs with their repetitions."""
        return 2 * self.num_kv_pairs * self.num_passes


def generate(task: MQAR, count: int, seed: int | Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """`count` examples: (inputs, labels), int32 [count, N] each; labels are IGNORED except at query keys.

    Row i holds k1 v1 .. kK vK, P times over; then slot g, if drawn, holds a key at place C + 2g, where the label is
    its value. The same task, count and seed give the same examples; any integers (a seed and a step, say) are a seed.
    """
    generator = np.random.default_rng(seed)
    n, k, half = task.input_seq_len, task.num_kv_pairs, task.vocab_size // 2
    keys = 1 + _distinct(generator, count, half - 1, k)
    values = half + _distinct(generator, count, task.vocab_size - half, k)
    gaps = _gaps(generator, task, count)

    inputs = np.zeros((count, n + 1), np.int64)
    labels = np.full((count, n + 1), IGNORED, np.int64)
    pairs = np.stack([keys, values], axis=-1).reshape(count, 2 * k)
    inputs[:, : task.context] = np.tile(pairs, (1, task.num_passes))
    np.put_along_axis(inputs, task.context + 2 * gaps, keys, axis=1)
    np.put_along_axis(labels, task.context + 2 * gaps + 1, values, axis=1)
    inputs, labels = inputs[:, :-1], labels[:, 1:]
    if task.random_non_queries:
        inputs = np.where(inputs == 0, generator.integers(task.vocab_size, size=inputs.shape), inputs)
    return inputs.astype(np.int32), labels.astype(np.int32)


def batch(task: MQAR, count: int, seed: int | Sequence[int]) -> dict[str, np.ndarray]:
    """`generate` in the columns of a training batch: the weight is 1 exactly where a value is asked for."""
    inputs, labels = generate(task, count, seed)
    asked = labels != IGNORED
    return {
        "inputs": inputs,
        "targets": np.where(asked, labels, 0).astype(np.int32),
        "segment": np.ones_like(inputs),
        "position": np.broadcast_to(np.arange(inputs.shape[1], dtype=np.int32), inputs.shape).copy(),
        "weight": asked.astype(np.float32),
    }


def slot_probabilities(task: MQAR) -> np.ndarray:
    """p(g) over the (N - C) / 2 slots after the context."""
    slots = np.arange(1, (task.input_seq_len - task.context) // 2 + 1, dtype=np.float64)
    weights = task.power_a * slots ** (task.power_a - 1)
    return weights / weights.sum()


def _gaps(generator: np.random.Generator, task: MQAR, count: int) -> np.ndarray:
    # Drawing K slots one by one without replacement is taking the K first of exponential arrival times.
    arrivals = generator.exponential(size=(count, (task.input_seq_len - task.context) // 2)) / slot_probabilities(task)
    return np.argsort(arrivals, axis=1, kind="stable")[:, : task.num_kv_pairs]


def _distinct(generator: np.random.Generator, count: int, size: int, k: int) -> np.ndarray:
    """int64 [count, k]: per row k different numbers of range(size), in random order."""
    if k * k > size:
        rows = max(1, _CHUNK // size)
        parts = [_by_order(generator, min(rows, count - first), size, k) for first in range(0, count, rows)]
        return np.concatenate([np.zeros((0, k), np.int64), *parts])
    drawn = generator.integers(size, size=(count, k))
    repeated = np.arange(count)
    while len(repeated):  # Few rows repeat a number; drawing those again as a whole keeps every order equally likely.
        ordered = np.sort(drawn[repeated], axis=1)
        repeated = repeated[(ordered[:, 1:] == ordered[:, :-1]).any(axis=1)]
        drawn[repeated] = generator.integers(size, size=(len(repeated), k))
    return drawn


def _by_order(generator: np.random.Generator, count: int, size: int, k: int) -> np.ndarray:
    order = generator.random((count, size))
    lowest = np.argpartition(order, k - 1, axis=1)[:, :k]
    ranks = np.argsort(np.take_along_axis(order, lowest, axis=1), axis=1)
    return np.take_along_axis(lowest, ranks, axis=1)
