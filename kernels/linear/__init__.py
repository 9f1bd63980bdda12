"""The dense layer: rows times a matrix, with fp32 accumulation and its own backward pass."""

import dataclasses
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float

from kernels import dispatch
from kernels.linear import cost, reference, xla

__all__ = ["Case", "IMPLEMENTATIONS", "cost", "linear"]


@dataclasses.dataclass(frozen=True)
class Case:
    """The facts of one call that decide which implementations can do it."""

    x: tuple[int, ...]
    w: tuple[int, ...]
    dtype: Any


IMPLEMENTATIONS = {
    "cpu": dispatch.Implementation("cpu", xla.linear_cpu, lambda case: None, platforms=("cpu",)),
    "xla": dispatch.Implementation("xla", xla.linear_xla, lambda case: None, platforms=("gpu", "tpu")),
    "reference": dispatch.Implementation("reference", reference.linear, lambda case: None),
}


def linear(
    x: Float[Array, "... I"],
    w: Float[Array, "I O"],
    bias: Float[Array, "O"] | None = None,
    *,
    implementation: str | None = None,
) -> Float[Array, "... O"]:
    """x @ w (+ bias), in x's type.

    Products run in x's type and accumulate in float32 (float64 for float64 inputs); `bias` is added before rounding.
    `w` and `bias` may be stored wider than x (float32 weights, bfloat16 activations): they are cast inside, and their
    gradients come back in their own type, straight from the float32 accumulation. Reverse-mode differentiable any
    number of times; forward mode (`jax.jvp`) only with `implementation="reference"`.

    `implementation` None chooses by platform; a named one obeys. Raises `ValueError` for shapes that do not fit.
    """
    if w.ndim != 2 or x.ndim < 1 or x.shape[-1] != w.shape[0]:
        raise ValueError(f"linear: x {x.shape} does not fit w {w.shape}; w must be [{x.shape[-1:]}, outputs]")
    if bias is not None and bias.shape != w.shape[1:]:
        raise ValueError(f"linear: bias {bias.shape} must hold one number per output of w {w.shape}")
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise ValueError(f"linear: x must be floating point, not {x.dtype}")
    chosen = dispatch.choose("linear", implementation, IMPLEMENTATIONS, Case(x.shape, w.shape, x.dtype))
    return chosen.function(x, w, bias)
