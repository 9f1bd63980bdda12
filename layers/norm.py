"""Normalisations; statistics at least in float32, result in the input's dtype."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from layers.setting import Setting

KINDS = ("rms", "layer", "srms")


def widened(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """x in float32, or in its own type where that is wider: what sums and angles are computed in."""
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def rms_normalise(x: Float[Array, "... D"], epsilon: float) -> Float[Array, "... D"]:
    """x / sqrt(mean(x^2) + epsilon), without a gain, in x's dtype."""
    wide = widened(x)
    return (wide * jax.lax.rsqrt(jnp.mean(wide * wide, -1, keepdims=True) + epsilon)).astype(x.dtype)


class Norm(nnx.Module):
    """`rms` (Zhang and Sennrich 2019), `layer` (Ba et al. 2016), or `srms`: RMS without a gain (TransNormerLLM).

    `axis` is the logical axis of the gain; None replicates it. The gain is what is stored plus `offset` (1 in Gemma).
    """

    def __init__(
        self,
        setting: Setting,
        width: int,
        *,
        kind: str = "rms",
        epsilon: float = 1e-6,
        offset: float = 0.0,
        axis: Any = None,
    ) -> None:
        if kind not in KINDS:
            raise ValueError(f"norm kind {kind!r} is not one of {', '.join(KINDS)}")
        self.kind, self.epsilon, self.offset = kind, epsilon, offset
        stored = jnp.full((width,), 1 - offset, setting.param_dtype)
        self.gain = None if kind == "srms" else nnx.Param(stored, axes=(axis,))
        self.bias = nnx.Param(jnp.zeros((width,), setting.param_dtype), axes=(axis,)) if kind == "layer" else None

    def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
        """Normalises the last axis."""
        if self.kind == "layer":
            wide = widened(x)
            wide = wide - jnp.mean(wide, -1, keepdims=True)
            x = (wide * jax.lax.rsqrt(jnp.mean(wide * wide, -1, keepdims=True) + self.epsilon)).astype(x.dtype)
            return x * self._factor(x) + self.bias[...].astype(x.dtype)
        x = rms_normalise(x, self.epsilon)
        return x if self.gain is None else x * self._factor(x)

    def _factor(self, x: Float[Array, "... D"]) -> Float[Array, "D"]:
        gain = self.gain[...]
        return (gain if not self.offset else widened(gain) + self.offset).astype(x.dtype)
