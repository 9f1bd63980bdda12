"""The ragged layer: rows in groups, each group times its own matrix, as mixtures of experts need it."""

import dataclasses
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from kernels import dispatch
from kernels.ragged import cost, reference, tiles, xla

__all__ = ["Case", "IMPLEMENTATIONS", "cost", "ragged"]


@dataclasses.dataclass(frozen=True)
class Case:
    """The facts of one call that decide which implementations can do it."""

    x: tuple[int, ...]
    w: tuple[int, ...]
    dtype: Any


IMPLEMENTATIONS = {
    "tiles": dispatch.Implementation("tiles", tiles.ragged, lambda case: None, platforms=("cpu",)),
    "xla": dispatch.Implementation("xla", xla.ragged, lambda case: None, platforms=("gpu", "tpu")),
    "reference": dispatch.Implementation("reference", reference.ragged, lambda case: None),
}


def ragged(
    x: Float[Array, "R I"],
    w: Float[Array, "N I O"],
    sizes: Int[Array, " N"],
    *,
    implementation: str | None = None,
) -> Float[Array, "R O"]:
    """y[r] = x[r] @ w[group of r], in x's type: the first sizes[0] rows are group 0, the next sizes[1] group 1, ...

    Rows behind the last group give 0 and have no gradient, whatever they hold. The sizes, whose sum must not exceed R,
    may be anything at run time. Products run in x's type and accumulate in float32 (float64 for float64 inputs). `w`
    may be stored wider than x: it is cast inside, and its gradient comes back in its own type, straight from the
    float32 accumulation. Reverse-mode differentiable; forward mode only with `implementation="reference"`.

    `implementation` None chooses by platform; a named one obeys. Raises `ValueError` for shapes that do not fit.
    """
    if w.ndim != 3 or x.ndim != 2 or x.shape[1] != w.shape[1] or sizes.shape != w.shape[:1]:
        raise ValueError(
            f"ragged: x {x.shape} and sizes {sizes.shape} do not fit w {w.shape}: x must be [rows, inputs], "
            "w [groups, inputs, outputs], sizes [groups]"
        )
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise ValueError(f"ragged: x must be floating point, not {x.dtype}")
    chosen = dispatch.choose("ragged", implementation, IMPLEMENTATIONS, Case(x.shape, w.shape, x.dtype))
    return chosen.function(x, w, sizes)
