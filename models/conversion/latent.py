"""Reparameterisations of latent attention that change no function: the gain folded away, the latent rotated.

Everything here is NumPy in float64; the weights of a network are cast back once, at the end.
"""

import dataclasses
from typing import Any

import numpy as np
from jaxtyping import Float

from configs.errors import UserError


class ConversionError(UserError):
    """A conversion that cannot be done as asked; one line that says what to do."""


@dataclasses.dataclass(frozen=True)
class LatentWeights:
    """What of one layer of MLA touches its latent of d channels: rows times matrices, float64.

    Attributes:
        down: W_DKV without the rotated key's columns.
        gain: of the latent's norm; None where there is no norm.
        key_up, value_up: W_UK, W_UV.
        bias: of W_DKV; None where there is none.
    """

    down: Float[np.ndarray, "D d"]
    gain: Float[np.ndarray, " d"] | None
    key_up: Float[np.ndarray, "d h n"]
    value_up: Float[np.ndarray, "d h v"]
    bias: Float[np.ndarray, " d"] | None = None

    def folded(self) -> "LatentWeights":
        """The gain multiplied into W_UK and W_UV (TPLA, arXiv 2508.15881, section 3): the same function."""
        if self.gain is None:
            return self
        gain = self.gain[:, None, None]
        ups = dict(key_up=gain * self.key_up, value_up=gain * self.value_up)
        return dataclasses.replace(self, gain=np.ones_like(self.gain), **ups)

    def rotated(self, rotation: Float[np.ndarray, "d d"]) -> "LatentWeights":
        """The latent times an orthogonal matrix, undone in W_UK and W_UV: the same function, since a norm without a
        gain keeps lengths. Raises `ConversionError` if the gain is not folded away."""
        if self.gain is not None and np.any(self.gain != 1):
            raise ConversionError("a latent can only be rotated when its norm has no gain: fold it away first")
        turned = [np.einsum("ce,chn->ehn", rotation, up) for up in (self.key_up, self.value_up)]
        bias = None if self.bias is None else self.bias @ rotation
        return LatentWeights(self.down @ rotation, self.gain, *turned, bias)


def weights_of(arrays: dict[str, Any], prefix: str, layer: int, heads: int) -> LatentWeights:
    """Those of one layer out of the flat, stacked arrays of a network; `prefix` is its attention's place in them."""

    def get(name: str) -> np.ndarray:
        return np.asarray(arrays[f"{prefix}.{name}"][layer], np.float64)

    def perhaps(name: str) -> np.ndarray | None:
        return get(name) if f"{prefix}.{name}" in arrays else None

    ups = (up.reshape(len(up), heads, -1) for up in (get("key_up.weight"), get("value_up.weight")))
    return LatentWeights(get("latent.weight"), perhaps("latent_norm.gain"), *ups, perhaps("latent.bias"))


def named(weights: dict[int, LatentWeights]) -> dict[int, dict[str, np.ndarray]]:
    """The arrays of each layer by the names they have in it."""

    def of(own: LatentWeights) -> dict[str, np.ndarray]:
        vectors = {"latent_norm.gain": own.gain, "latent.bias": own.bias}
        ups = {"key_up.weight": own.key_up, "value_up.weight": own.value_up}
        return (
            {name: vector for name, vector in vectors.items() if vector is not None}
            | {"latent.weight": own.down}
            | {name: up.reshape(len(up), -1) for name, up in ups.items()}
        )

    return {layer: of(own) for layer, own in weights.items()}


def hadamard(size: int, rng: np.random.Generator) -> Float[np.ndarray, "d d"]:
    """A randomised Hadamard rotation: random signs, then Sylvester's matrix over the root of its size. Raises
    `ConversionError` for a size that is no power of two."""
    if size < 1 or size & (size - 1):
        raise ConversionError(
            f"a Hadamard rotation needs a latent whose width is a power of two, not {size}: use transform='pca' or "
            "'identity'"
        )
    matrix = np.ones((1, 1))
    while len(matrix) < size:
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    return rng.choice([-1.0, 1.0], size)[:, None] * matrix / np.sqrt(size)


def principal(moment: Float[np.ndarray, "d d"]) -> Float[np.ndarray, "d d"]:
    """The eigenvectors of a second moment (or covariance) as columns, the largest eigenvalue first."""
    return np.linalg.eigh(moment)[1][:, ::-1]
