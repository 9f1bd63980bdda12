"""Attention of heads as attention from a latent, by singular values (X-EcoMLA, arXiv 2503.11132, section 3).

Everything here is NumPy, one layer at a time, in float32, as the released code has it, or in float64 for such weights.
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from models.conversion.networks import Weights

Matrix = Float[np.ndarray, "inputs outputs"]


@dataclasses.dataclass(frozen=True)
class Decomposition:
    """The singular values of a matrix, largest first, and the vectors on its two sides."""

    left: Float[np.ndarray, "inputs R"]
    values: Float[np.ndarray, " R"]
    right: Float[np.ndarray, "R outputs"]

    @classmethod
    def of(cls, matrix: Matrix) -> "Decomposition":
        """In the type of the matrix."""
        return cls(*np.linalg.svd(matrix, full_matrices=False))

    def split(self, rank: int, sigma: str) -> tuple[Matrix, Matrix]:
        """The nearest product of two matrices around `rank` channels; `sigma` says which one has the values."""
        down, values, up = self.left[:, :rank], self.values[:rank], self.right[:rank]
        return (down * values, up) if sigma == "down" else (down, values[:, None] * up)


@dataclasses.dataclass(frozen=True)
class Heads:
    """One layer of MHA, GQA or MQA: its options, its matrices, and those of its biases that there are."""

    options: Mapping[str, Any]
    query: Matrix
    key: Matrix
    value: Matrix
    out: Matrix
    biases: Mapping[str, Float[np.ndarray, " outputs"]]

    @functools.cached_property
    def queries(self) -> Decomposition:
        """Of W_Q."""
        return Decomposition.of(self.query)

    @functools.cached_property
    def joint(self) -> Decomposition:
        """Of [W_K, W_V], both repeated for all query heads; on the right with the columns of each head once.

        Repeating columns n times multiplies singular values by the root of n and divides the vectors on the right by
        it, so that the repeated matrix itself is not needed.
        """
        once = Decomposition.of(np.hstack([self.key, self.value]))
        root = np.sqrt(self.repeats)
        return Decomposition(once.left, root * once.values, once.right / root)

    @property
    def repeats(self) -> int:
        """Query heads for each key/value head."""
        return self.options["heads"] // self.options["kv_heads"]

    def by_head(self, columns: Float[np.ndarray, "... C"], which: str) -> Float[np.ndarray, "... h w"]:
        """Columns by head; `which` is "heads" or "kv_heads"."""
        return columns.reshape(*columns.shape[:-1], self.options[which], -1)

    def for_queries(self, columns: Float[np.ndarray, "... C"]) -> Float[np.ndarray, "... H w"]:
        """Columns of key/value heads, once for each query head that reads them."""
        return np.repeat(self.by_head(columns, "kv_heads"), self.repeats, axis=-2)


def heads_of(arrays: Weights, options: Mapping[str, Any]) -> Heads:
    """Those of a layer with these arrays."""
    wide = {name: array.astype(np.promote_types(array.dtype, np.float32), copy=False) for name, array in arrays.items()}
    query, key, value, out = (wide[f"{part}.weight"] for part in ("query", "key", "value", "out"))
    biases = {name.removesuffix(".bias"): array for name, array in wide.items() if name.endswith(".bias")}
    return Heads(options, query, key, value, out, biases)


def channels(
    width: int, nope: int, rotary: int, rope: str, layout: str
) -> tuple[Int[np.ndarray, " nope"], Int[np.ndarray, " rotary"]]:
    """The channels of a head that become its unrotated and its rotated ones; `layout` is how pairs of it are turned.

    "released": the first and the last. "matched": of the pairs, every (width / rotary)-th is rotated, since these turn
    exactly as the pairs of a head of width `rotary` do, and the others, the slowest first, are unrotated.
    """
    if rope == "released":
        return np.arange(nope), np.arange(width - rotary, width)
    half = width // 2
    pairs = np.arange(width).reshape(2, half).T if layout == "half" else np.arange(width).reshape(half, 2)
    kept = np.arange(0, half, width // rotary)
    others = np.setdiff1d(np.arange(half), kept)
    slowest = np.concatenate([others[::-1], kept[::-1]])
    turned = pairs[kept].T if layout == "half" else pairs[kept]
    return pairs[slowest].reshape(-1)[:nope], turned.reshape(-1)


def factorised(heads: Heads, options: Mapping[str, Any], sigma: str, rope: str) -> Weights:
    """The weights of latent attention with these options, but for W_O, as `models.conversion.xecomla.upcycle` says."""
    nope, rotary, width = options["qk_nope_head_dim"], options["qk_rope_head_dim"], heads.options["head_dim"]
    plain, turned = channels(width, nope, rotary, rope, heads.options["rope"]["layout"])
    both = np.concatenate([plain, turned])
    weights, query = {}, heads.query
    if options["q_lora_rank"]:
        weights["query_down.weight"], query = heads.queries.split(options["q_lora_rank"], sigma)
    weights["query.weight"] = _flat(heads.by_head(query, "heads")[..., both])
    weights["latent.weight"], up = heads.joint.split(options["kv_lora_rank"], sigma)
    keys, values = np.split(up, [heads.key.shape[1]], axis=1)
    weights["key_up.weight"] = _flat(heads.for_queries(keys)[..., plain])
    weights["value_up.weight"] = _flat(heads.for_queries(values))
    weights["rope_key.weight"] = heads.by_head(heads.key, "kv_heads")[..., turned].mean(axis=-2)
    if options["query_bias"]:
        weights["query.bias"] = _flat(heads.by_head(heads.biases["query"], "heads")[..., both])
        weights["latent.bias"] = np.zeros(options["kv_lora_rank"])
        weights["rope_key.bias"] = heads.by_head(heads.biases["key"], "kv_heads")[..., turned].mean(axis=-2)
    if options["out_bias"]:
        weights["out.bias"] = heads.biases.get("out", np.zeros(heads.out.shape[1]))
        if "value" in heads.biases:  # Probabilities sum to 1, so that every output has it once.
            weights["out.bias"] = weights["out.bias"] + _flat(heads.for_queries(heads.biases["value"])) @ heads.out
    if options["latent_norm"] == "rms":
        weights["latent_norm.gain"] = np.ones(options["kv_lora_rank"])
        if options["q_lora_rank"]:
            weights["query_norm.gain"] = np.ones(options["q_lora_rank"])
    return weights


def truncated(heads: Heads, q_rank: int, kv_rank: int) -> Weights:
    """W_Q, W_K and W_V of the layer as it was, as products of these ranks (0: W_Q as it is)."""
    key, value = np.split(np.matmul(*heads.joint.split(kv_rank, "down")), [heads.key.shape[1]], axis=1)
    query = np.matmul(*heads.queries.split(q_rank, "down")) if q_rank else heads.query
    return {"query.weight": query, "key.weight": key, "value.weight": value}


def _flat(by_head: Float[np.ndarray, "... h w"]) -> Float[np.ndarray, "... C"]:
    return by_head.reshape(*by_head.shape[:-2], -1)
