"""Rotary position embeddings (Su et al. 2021) on float positions, and their stretched forms."""

import dataclasses
import math

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from layers.norm import widened

SCALINGS = ("none", "linear", "ntk", "yarn", "llama3")
LAYOUTS = ("half", "interleaved")


@dataclasses.dataclass(frozen=True)
class Rope:
    """Frequencies and layout; field meanings in `configs/rope.py`. theta 0 leaves vectors unrotated, `share` below 1
    the last channels of each.

    Sources: linear, Chen et al. 2023 (arXiv 2306.15595); ntk, the fixed change of base
    theta * factor^(d / (d - 2)); yarn, Peng et al. 2023 (arXiv 2309.00071) with DeepSeek's two factors;
    llama3, the Llama 3.1 release.
    """

    theta: float = 10000.0
    layout: str = "half"
    scaling: str = "none"
    factor: float = 1.0
    original_length: int = 4096
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float = 1.0
    mscale_all_dim: float = 0.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    share: float = 1.0

    def __post_init__(self) -> None:
        if self.scaling not in SCALINGS:
            raise ValueError(f"rope scaling {self.scaling!r} is not one of {', '.join(SCALINGS)}")
        if self.layout not in LAYOUTS:
            raise ValueError(f"rope layout {self.layout!r} is not one of {', '.join(LAYOUTS)}")

    def frequencies(self, dim: int) -> np.ndarray:
        """Radians per position of the dim/2 channel pairs, float64; `ValueError` if dim is odd."""
        if dim % 2:
            raise ValueError(f"rotary width {dim} must be even")
        pairs = np.arange(dim // 2, dtype=np.float64)
        base = self.theta
        if self.scaling == "ntk":
            base = base * self.factor ** (dim / (dim - 2)) if dim > 2 else base
        plain = base ** (-2 * pairs / dim)
        if self.scaling == "linear":
            return plain / self.factor
        if self.scaling == "yarn":
            return self._yarn(plain, pairs, dim)
        if self.scaling == "llama3":
            return self._llama3(plain)
        return plain

    def _yarn(self, plain: np.ndarray, pairs: np.ndarray, dim: int) -> np.ndarray:
        def pair_turning(turns: float) -> float:  # The (fractional) pair that turns this often over original_length.
            return dim * math.log(self.original_length / (2 * math.pi * turns)) / (2 * math.log(self.theta))

        low = max(math.floor(pair_turning(self.beta_fast)), 0)
        high = min(math.ceil(pair_turning(self.beta_slow)), dim - 1)
        ramp = np.clip((pairs - low) / (high - low if high != low else 0.001), 0, 1)
        return plain / self.factor * ramp + plain * (1 - ramp)

    def _llama3(self, plain: np.ndarray) -> np.ndarray:
        turns = self.original_length * plain / (2 * np.pi)
        smooth = (turns - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor)
        return plain / self.factor * (1 - np.clip(smooth, 0, 1)) + plain * np.clip(smooth, 0, 1)

    def _yarn_gain(self, mscale: float) -> float:
        return 1.0 if self.factor <= 1 else 0.1 * mscale * math.log(self.factor) + 1.0

    @property
    def amplitude(self) -> float:
        """Factor on cos and sin (yarn only)."""
        if self.scaling != "yarn":
            return 1.0
        return self._yarn_gain(self.mscale) / self._yarn_gain(self.mscale_all_dim)

    @property
    def logit_factor(self) -> float:
        """m^2 on the whole softmax logit of latent attention (yarn with mscale_all_dim; DeepSeek-V2)."""
        return self._yarn_gain(self.mscale_all_dim) ** 2 if self.scaling == "yarn" else 1.0

    def rotate(self, x: Float[Array, "B T H D"], position: Float[Array, "B T"]) -> Float[Array, "B T H D"]:
        """x with channel pair i turned by position * frequency_i; angles in float32, result in x's dtype."""
        if not self.theta:
            return x
        turned = int(x.shape[-1] * self.share)
        frequencies = jnp.asarray(self.frequencies(turned), jnp.float32)
        if turned == x.shape[-1]:
            return rotate(x, position, frequencies, self.amplitude, self.layout)
        first = rotate(x[..., :turned], position, frequencies, self.amplitude, self.layout)
        return jnp.concatenate([first, x[..., turned:]], axis=-1)


def rotate(
    x: Float[Array, "B T H D"],
    position: Float[Array, "B T"],
    frequencies: Float[Array, "D/2"],
    amplitude: float = 1.0,
    layout: str = "half",
) -> Float[Array, "B T H D"]:
    """Rotates channel pairs by position * frequency; pairs are (i, i + D/2) or (2i, 2i + 1) by `layout`."""
    angle = position.astype(jnp.float32)[..., None] * frequencies
    cos, sin = amplitude * jnp.cos(angle)[:, :, None], amplitude * jnp.sin(angle)[:, :, None]
    if layout == "half":
        first, second = jnp.split(widened(x), 2, axis=-1)
        turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    else:
        first, second = widened(x[..., 0::2]), widened(x[..., 1::2])
        turned = jnp.stack([first * cos - second * sin, second * cos + first * sin], axis=-1).reshape(x.shape)
    return turned.astype(x.dtype)
