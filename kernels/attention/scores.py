"""What may happen to a block of scores before the mask: scale, soft cap, additive bias, a function of the caller's."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from kernels.tokens import Tokens


@dataclasses.dataclass(frozen=True)
class Places:
    """Where the scores given to a `score_mod` stand; index arrays broadcast against scores [B, H, T, S].

    The scores may be a block of the map: `batch`, `head`, `query` and `key` then are the numbers of its rows and
    columns, and `q`, `k` their tokens.
    """

    batch: Int[Array, "B 1 1 1"]
    head: Int[Array, "1 H 1 1"]
    query: Int[Array, "1 1 T 1"]
    key: Int[Array, "1 1 1 S"]
    q: Tokens
    k: Tokens


class Inputs(NamedTuple):
    """The arrays that change scores, all differentiable: `bias` [B|1, H|1, T|1, S|1], and those of the function."""

    bias: Array | None
    arrays: tuple[Array, ...]


@dataclasses.dataclass(frozen=True)
class Change:
    """The static part: everything between q.k and the mask. `function(scores, places, *arrays)` may be None."""

    scale: float
    soft_cap: float
    function: Callable[..., Array] | None
    bias: bool

    @property
    def linear(self) -> bool:
        """Scores are q.k times a number, which may then be applied later."""
        return not (self.soft_cap or self.bias or self.function)

    def __call__(
        self, s: Float[Array, "B H T S"], bias: Array | None, arrays: tuple[Array, ...], at: Places
    ) -> Float[Array, "B H T S"]:
        """s = scale q.k; then soft_cap tanh(s / soft_cap); + bias; function."""
        s = s * self.scale
        if self.soft_cap:
            s = self.soft_cap * jnp.tanh(s / self.soft_cap)
        if self.bias:
            s = s + bias.astype(s.dtype)
        return s if self.function is None else self.function(s, at, *arrays).astype(s.dtype)

    def pull(self, s: Array, inputs: tuple[Any, ...], at: Places) -> tuple[Array, Callable[[Array], tuple[Any, ...]]]:
        """The changed scores, and what makes of their gradient those of s, bias and arrays."""
        return jax.vjp(lambda s, bias, arrays: self(s, bias, arrays, at), s, *inputs)


def check_closure(function: Any) -> None:
    """Refuses a `score_mod` that closes over a traced array, whose gradient would be lost."""
    cells = getattr(function, "__closure__", None) or ()
    for name, cell in zip(getattr(getattr(function, "__code__", None), "co_freevars", ()), cells, strict=False):
        if isinstance(cell.cell_contents, jax.core.Tracer):
            raise ValueError(
                f"attention: score_mod closes over the traced array {name!r}: give it in score_arrays, as a further "
                "argument of score_mod"
            )
