"""X-EcoMLA's decompositions and the attention they make, in NumPy float64, from the paper and what its code counts.

Shares nothing with `models.conversion`: keys and values are repeated for all query heads before anything else, weights
are [inputs, outputs], and every head is a loop.
"""

from typing import NamedTuple

import numpy as np


class Student(NamedTuple):
    """The products that decide what a converted layer computes, per head: [D, channels]."""

    query_nope: list[np.ndarray]
    query_rope: list[np.ndarray]
    key_nope: list[np.ndarray]
    key_rope: np.ndarray
    value: list[np.ndarray]


def repeated(matrix: np.ndarray, width: int, repeats: int) -> np.ndarray:
    """[D, n_kv * width] -> [D, n_h * width]: every head as often as query heads read it, neighbours equal."""
    heads = [matrix[:, i : i + width] for i in range(0, matrix.shape[1], width)]
    return np.concatenate([head for head in heads for _ in range(repeats)], axis=1)


def low_rank(matrix: np.ndarray, rank: int) -> np.ndarray:
    u, s, v = np.linalg.svd(matrix)
    return (u[:, :rank] * s[:rank]) @ v[:rank]


def student(
    query: np.ndarray, key: np.ndarray, value: np.ndarray, *, heads: int, kv_heads: int, q_rank: int, kv_rank: int,
    nope: list[int], rope: list[int], wrong: str = "",
) -> Student:  # fmt: skip
    """`nope` and `rope` are the channels of a head. `wrong`: "separate" decomposes keys and values apart, "per head"
    would keep a rotated key for each head (the first one's is given), "not repeated" averages nothing."""
    width, value_width = query.shape[1] // heads, value.shape[1] // kv_heads
    keys, values = (repeated(m, w, heads // kv_heads) for m, w in ((key, width), (value, value_width)))
    if wrong == "separate":
        keys_cut, values_cut = low_rank(keys, kv_rank // 2), low_rank(values, kv_rank - kv_rank // 2)
    else:
        both = low_rank(np.concatenate([keys, values], axis=1), kv_rank)
        keys_cut, values_cut = both[:, : keys.shape[1]], both[:, keys.shape[1] :]
    queries = low_rank(query, q_rank) if q_rank else query
    per_head = lambda matrix, w, chosen: [matrix[:, h * w : (h + 1) * w][:, chosen] for h in range(heads)]  # noqa: E731
    rotated = per_head(keys, width, rope)
    return Student(
        per_head(queries, width, nope), per_head(queries, width, rope), per_head(keys_cut, width, nope),
        rotated[0] if wrong == "per head" else sum(rotated) / heads,
        per_head(values_cut, value_width, list(range(value_width))),
    )  # fmt: skip


def code_rank(matrix: np.ndarray, energy: float, divisor: int = 8) -> int:
    """As the released code counts: singular values up to which the share is not exceeded, then rounded up."""
    s = np.linalg.svd(matrix, compute_uv=False)
    total, running, count = float(np.sum(s**2)), 0.0, 0
    for value in s:
        running += float(value) ** 2
        count += running / total <= energy
    return -(-max(1, count) // divisor) * divisor


def paper_rank(matrix: np.ndarray, energy: float, divisor: int = 8) -> int:
    """The smallest R whose singular values have the share, then rounded up."""
    s = np.linalg.svd(matrix, compute_uv=False)
    rank = next(r for r in range(1, len(s) + 1) if np.sum(s[:r] ** 2) >= energy * np.sum(s**2))
    return -(-rank // divisor) * divisor


def yarn(width: int, theta: float, factor: float, original: int) -> np.ndarray:
    """Frequencies, after DeepSeek's code with beta_fast 32 and beta_slow 1."""
    edge = lambda turns: width * np.log(original / (turns * 2 * np.pi)) / (2 * np.log(theta))  # noqa: E731
    low, high = max(np.floor(edge(32)), 0), min(np.ceil(edge(1)), width - 1)
    plain = theta ** -(np.arange(0, width, 2) / width)
    ramp = np.clip((np.arange(width // 2) - low) / max(high - low, 1e-3), 0, 1)
    return plain / factor * ramp + plain * (1 - ramp)


def turned(x: np.ndarray, frequencies: np.ndarray, amplitude: float) -> np.ndarray:
    """[T, d] with neighbouring channels 2i, 2i + 1 turned by position times frequency i."""
    out = np.empty_like(x)
    for t, row in enumerate(x):
        for i, frequency in enumerate(frequencies):
            cos, sin = amplitude * np.cos(t * frequency), amplitude * np.sin(t * frequency)
            a, b = row[2 * i], row[2 * i + 1]
            out[t, 2 * i], out[t, 2 * i + 1] = a * cos - b * sin, b * cos + a * sin
    return out


def attention(
    made: Student, out: np.ndarray, x: np.ndarray, frequencies: np.ndarray, amplitude: float = 1.0
) -> np.ndarray:
    """[T, D] -> [T, D]: causal, softmax scale (d_qk + d_r)^-0.5, no norm anywhere."""
    heads, length = [], len(x)
    key_rope = turned(x @ made.key_rope, frequencies, amplitude)
    for h, value in enumerate(made.value):
        nope = (x @ made.query_nope[h]) @ (x @ made.key_nope[h]).T
        rope = turned(x @ made.query_rope[h], frequencies, amplitude) @ key_rope.T
        scores = (nope + rope) / np.sqrt(made.query_nope[h].shape[1] + made.query_rope[h].shape[1])
        scores[np.triu_indices(length, 1)] = -np.inf
        weights = np.exp(scores - scores.max(axis=1, keepdims=True))
        heads.append(weights / weights.sum(axis=1, keepdims=True) @ (x @ value))
    return np.concatenate(heads, axis=1) @ out
