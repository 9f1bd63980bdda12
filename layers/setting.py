"""What every layer of one network shares: sizes, number formats, initialisation."""

import dataclasses
import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


@dataclasses.dataclass(frozen=True)
class Setting:
    """The network around a layer.

    Attributes:
        width: D, the residual stream.
        depth: number of blocks; scales the initialisation of residual outputs and layer-dependent constants.
        max_length: longest sequence the network is built for.
        param_dtype: stored weights.
        compute_dtype: activations and matrix products; reductions stay in float32.
        init_std: standard deviation of initial matrices.
        implementation: kernel implementation by name; None chooses by platform and shape.
    """

    width: int
    depth: int = 1
    max_length: int = 1024
    param_dtype: str = "float32"
    compute_dtype: str = "float32"
    init_std: float = 0.02
    implementation: str | None = None

    @property
    def residual_std(self) -> float:
        """Standard deviation for matrices that write into the residual stream (GPT-2's 1 / sqrt(2 depth))."""
        return self.init_std / math.sqrt(2 * self.depth)

    def normal(self, key: jax.Array, shape: tuple[int, ...], std: float) -> Float[Array, "..."]:
        """Draws float32 normals, then stores them in `param_dtype`: the draw does not depend on the format."""
        return (std * jax.random.normal(key, shape, jnp.float32)).astype(self.param_dtype)
