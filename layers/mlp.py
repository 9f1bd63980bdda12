"""The dense channel mixer, and what it shares with mixtures of experts."""

import functools
from collections.abc import Callable
from typing import Any

import jax
from flax import nnx
from jaxtyping import Array, Float

from layers.linear import Linear
from layers.setting import Setting

_GATED: dict[str, Callable] = {"swiglu": jax.nn.silu, "geglu": functools.partial(jax.nn.gelu, approximate=True)}
KINDS = (*_GATED, "gelu", "relu2")


def is_gated(kind: str) -> bool:
    """Whether an MLP of this kind has a matrix G. `ValueError` for a kind there is not."""
    if kind not in KINDS:
        raise ValueError(f"mlp kind {kind!r} is not one of {', '.join(KINDS)}")
    return kind in _GATED


def hidden_units(kind: str, up: Float[Array, "..."], gate: Float[Array, "..."] | None) -> Float[Array, "..."]:
    """act(gate) * up, or act(up) where there is no gate, of the products x G and x U."""
    if gate is not None:
        return _GATED[kind](gate) * up
    if kind == "gelu":
        return jax.nn.gelu(up, approximate=True)
    positive = jax.nn.relu(up)
    return positive * positive


class MLP(nnx.Module):
    """`swiglu`, `geglu`: (act(x G) * x U) W with SiLU or GELU (Shazeer 2020); `gelu` and `relu2` (So et al. 2021):
    act(x U) W. GELU is its tanh form."""

    def __init__(
        self, setting: Setting, *, kind: str = "swiglu", width: int = 704, bias: bool = False, rngs: nnx.Rngs
    ) -> None:
        gated = is_gated(kind)
        self.setting, self.kind, self.width = setting, kind, width
        into: dict[str, Any] = dict(axes=("embed", "mlp"), bias=bias, rngs=rngs)
        self.gate = Linear(setting, setting.width, width, **into) if gated else None
        self.up = Linear(setting, setting.width, width, **into)
        self.down = Linear(
            setting, width, setting.width, axes=("mlp", "embed"), bias=bias, std=setting.residual_std, rngs=rngs
        )

    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        """Token by token. Works on [B*T, D]: elementwise backward passes in rank 3 are slow on CPU."""
        flat = x.reshape(-1, x.shape[-1])
        gate = None if self.gate is None else self.gate(flat)
        hidden = hidden_units(self.kind, self.up(flat), gate)
        return self.down(hidden).reshape(x.shape)

    def flops(self, length: int) -> float:
        """Floating-point operations (2 per multiply-add) of matrix products in one forward pass over a row."""
        return 2.0 * length * (2 + is_gated(self.kind)) * self.setting.width * self.width

    def idle_parameter_count(self) -> int:
        """Parameters that a token does not meet."""
        return 0

    @staticmethod
    def parameter_count(width: int, *, kind: str, hidden: int, bias: bool) -> int:
        """Declared number of parameters."""
        matrices = 2 + is_gated(kind)
        return matrices * width * hidden + (bias * ((matrices - 1) * hidden + width))
