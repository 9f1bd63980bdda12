"""Matrix products with a named initialisation and named axes."""

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from kernels.linear import linear
from layers.setting import Setting
from sharding import logical


def contracted(equation: str, *operands: Array) -> Array:
    """`jnp.einsum` accumulated at least in float32, in the first operand's dtype."""
    dtype = operands[0].dtype
    return jnp.einsum(equation, *operands, preferred_element_type=jnp.promote_types(dtype, jnp.float32)).astype(dtype)


class Linear(nnx.Module):
    """y = x W (+ b), W of shape [inputs, outputs].

    `axes` are the logical axes of W; a bias carries the second. `std` defaults to the setting's.
    """

    def __init__(
        self,
        setting: Setting,
        inputs: int,
        outputs: int,
        *,
        axes: logical.Axes,
        rngs: nnx.Rngs,
        std: float | None = None,
        bias: bool = False,
    ) -> None:
        std = setting.init_std if std is None else std
        self.axes = axes
        self.weight = nnx.Param(setting.normal(rngs.params(), (inputs, outputs), std), axes=axes)
        self.bias = nnx.Param(jnp.zeros((outputs,), setting.param_dtype), axes=axes[1:]) if bias else None

    def matrix(self, dtype: jax.typing.DTypeLike) -> Float[Array, "I O"]:
        """W in `dtype`, laid out for use on the active mesh."""
        return logical.gather(self.weight[...].astype(dtype), self.axes)

    def __call__(self, x: Float[Array, "... I"]) -> Float[Array, "... O"]:
        """The product in x's dtype, accumulated in float32."""
        # One device keeps float32 weights up to the product (and their gradients); a mesh moves the narrow copy.
        weight = self.weight[...] if logical.active() is None else self.matrix(x.dtype)
        y = linear(x, weight, None if self.bias is None else logical.gather(self.bias[...], self.axes[1:]))
        return checkpoint_name(y, "linear")
