"""The channel mixers."""

from typing import Any

import jax
from flax import nnx
from jaxtyping import Array, Float

from layers.linear import Linear
from layers.setting import Setting

KINDS = ("swiglu", "gelu", "relu2")


def _squared_relu(x: Float[Array, "..."]) -> Float[Array, "..."]:
    positive = jax.nn.relu(x)
    return positive * positive


class MLP(nnx.Module):
    """`swiglu`: (silu(x G) * x U) W (Shazeer 2020); `gelu` (tanh form) and `relu2` (So et al. 2021): act(x U) W."""

    def __init__(
        self, setting: Setting, *, kind: str = "swiglu", width: int = 704, bias: bool = False, rngs: nnx.Rngs
    ) -> None:
        if kind not in KINDS:
            raise ValueError(f"mlp kind {kind!r} is not one of {', '.join(KINDS)}")
        self.kind = kind
        into: dict[str, Any] = dict(axes=("embed", "mlp"), bias=bias, rngs=rngs)
        self.gate = Linear(setting, setting.width, width, **into) if kind == "swiglu" else None
        self.up = Linear(setting, setting.width, width, **into)
        self.down = Linear(
            setting, width, setting.width, axes=("mlp", "embed"), bias=bias, std=setting.residual_std, rngs=rngs
        )

    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        """Token by token. Works on [B*T, D]: elementwise backward passes in rank 3 are slow on CPU."""
        flat = x.reshape(-1, x.shape[-1])
        if self.kind == "swiglu":
            hidden = jax.nn.silu(self.gate(flat)) * self.up(flat)
        elif self.kind == "gelu":
            hidden = jax.nn.gelu(self.up(flat), approximate=True)
        else:
            hidden = _squared_relu(self.up(flat))
        return self.down(hidden).reshape(x.shape)

    @staticmethod
    def parameter_count(width: int, *, kind: str, hidden: int, bias: bool) -> int:
        """Declared number of parameters."""
        matrices = 3 if kind == "swiglu" else 2
        return matrices * width * hidden + (bias * ((matrices - 1) * hidden + width))
