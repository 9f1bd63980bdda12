"""One layer of grouped-query attention as latent attention of one wide key: exact, whatever basis the keys are in."""

import dataclasses
from collections.abc import Mapping

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from layers.rope import rotate


class ListedRope(nnx.Module):
    """Positions whose frequencies are an array, pair by pair; pairs are adjacent. Stands for a `layers.rope.Rope`."""

    logit_factor = 1.0

    def __init__(self, count: int) -> None:
        self.listed = nnx.Variable(jnp.zeros((count,), jnp.float32))

    def rotate(self, x: Float[Array, "B T H D"], position: Float[Array, "B T"]) -> Float[Array, "B T H D"]:
        """x with pair i turned by position * listed[i]."""
        return rotate(x, position, self.listed[...], layout="interleaved")


def affine(linear: str, arrays: Mapping[str, np.ndarray]) -> Float[np.ndarray, "E O"]:
    """A matrix with its bias (or zeros) as one row more, E = D + 1, float64."""
    weight = np.asarray(arrays[f"{linear}.weight"], np.float64)
    bias = arrays.get(f"{linear}.bias", np.zeros(weight.shape[1]))
    return np.concatenate([weight, np.asarray(bias, np.float64)[None]])


def merged_query(
    query: Float[np.ndarray, "E hd"], basis: Float[np.ndarray, "L L"], heads: int, kv_heads: int, rotary: int
) -> Float[np.ndarray, "E h dr"]:
    """Each head's query, and behind it what of it meets the first `rotary` channels of the merged key."""
    query = query.reshape(len(query), heads, -1)
    own = basis.reshape(kv_heads, -1, len(basis))[np.arange(heads) * kv_heads // heads, :, :rotary]
    return np.concatenate([query, np.einsum("ehd,hdr->ehr", query, own)], axis=-1)


@dataclasses.dataclass(frozen=True)
class Merged:
    """Latent attention, every projection with its bias as its last row; float64, rows times matrices.

    Attributes:
        query: E = D + 1 rows; of each head first the d channels without positions, then the r rotated ones.
        rope_key: the rotated key of all heads.
        latent: [keys without positions, values], before `reduced` of all key/value heads side by side.
        key_up, value_up: from the latent to each head.
    """

    query: Float[np.ndarray, "E h dr"]
    rope_key: Float[np.ndarray, "E r"]
    latent: Float[np.ndarray, "E w"]
    key_up: Float[np.ndarray, "w h d"]
    value_up: Float[np.ndarray, "w h v"]

    @classmethod
    def of(
        cls, arrays: Mapping[str, np.ndarray], heads: int, kv_heads: int, basis: Float[np.ndarray, "L L"], rotary: int,
        scale: float = 1.0,
    ) -> "Merged":  # fmt: skip
        """From the arrays of a layer `mha`; its keys side by side, times `basis`, have positions in the first `rotary`
        channels only (TransMLA, arXiv 2502.07864, section 4: head i reads the block floor(i g / h) of the merged key).
        Queries are multiplied by `scale`.

        The same function as the layer if all L = g d channels are rotated, each pair with the frequency it has there.
        """
        query, key, value = (affine(name, arrays) for name in ("query", "key", "value"))
        key, blocks = key @ basis, np.arange(heads) * kv_heads // heads
        values = np.eye(value.shape[1]).reshape(value.shape[1], kv_heads, -1)[:, blocks]
        keys = np.moveaxis(basis.reshape(kv_heads, -1, len(basis))[blocks], -1, 0)[rotary:]
        return cls(
            merged_query(scale * query, basis, heads, kv_heads, rotary),
            key[:, :rotary],
            np.concatenate([key[:, rotary:], value], axis=1),
            np.concatenate([keys, np.zeros((len(values), *keys.shape[1:]))]),
            np.concatenate([np.zeros((len(keys), *values.shape[1:])), values]),
        )

    def reduced(self, down: Float[np.ndarray, "w k"], up: Float[np.ndarray, "k w"]) -> "Merged":
        """The latent times `down`, which `up` undoes as far as it can."""
        ups = (np.tensordot(up, each, 1) for each in (self.key_up, self.value_up))
        return Merged(self.query, self.rope_key, self.latent @ down, *ups)

    def arrays(self, out: Mapping[str, np.ndarray], bias: bool) -> dict[str, np.ndarray]:
        """Those of a layer `mla` of the same function; of `out` the output's are kept."""
        matrices = {"query": self.query.reshape(len(self.query), -1), "latent": self.latent}
        matrices["rope_key"] = self.rope_key
        ups = {"key_up": self.key_up, "value_up": self.value_up}
        return (
            {f"{name}.weight": matrix[:-1] for name, matrix in matrices.items()}
            | ({f"{name}.bias": matrix[-1] for name, matrix in matrices.items()} if bias else {})
            | {f"{name}.weight": up.reshape(len(up), -1) for name, up in ups.items()}
            | {name: array for name, array in out.items() if name.startswith("out.")}
        )
