"""What every form of decode attention is called with."""

import dataclasses
from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Int


@dataclasses.dataclass(frozen=True)
class Call:
    """The static part of one call of `kernels.decode.decode_attention`, defaults filled in."""

    value_width: int
    window: int  # 0 is none.
    soft_cap: float  # 0 is none.
    scale: float
    splits: int | None  # None: the form chooses.


class Inputs(NamedTuple):
    """The arrays of one call; with a `table`, k and v are pages [P, page, Hk, D]."""

    q: Float[Array, "B T H D"]
    k: Float[Array, "N S Hk D"]
    v: Float[Array, "N S Hk Dv"] | None
    table: Int[Array, "B n"] | None
    lengths: Int[Array, "B"]
    starts: Int[Array, "B"]
    sinks: Float[Array, "H"] | None

    @property
    def slots(self) -> int:
        """Places of a row's cache."""
        return self.k.shape[1] * (1 if self.table is None else self.table.shape[1])


def integer(x: Array) -> bool:
    """Whether an array holds whole numbers."""
    return bool(jnp.issubdtype(x.dtype, jnp.integer))


def seen(x: Array) -> str:
    """An array as messages show it."""
    return f"{x.dtype}{list(x.shape)}"


def check_rows(name: str, batch: int, lengths: Array, starts: Any, table: Any, window: Any, splits: Any) -> None:
    """`ValueError` for what says which places of a cache the rows see, where it does not fit a batch of this size."""
    if table is not None and (table.ndim != 2 or table.shape[0] != batch or not integer(table)):
        raise ValueError(f"{name}: block_table must be integers [B, n] with B = {batch}, not {seen(table)}")
    for what, x in (("lengths", lengths), ("starts", starts)):
        if x is not None and (x.shape != (batch,) or not integer(x)):
            raise ValueError(f"{name}: {what} must be {batch} integers, one per row, not {seen(x)}")
    if window is not None and window < 1:
        raise ValueError(f"{name}: a window holds at least 1 token, not {window}: None is no window")
    if splits is not None and splits < 1:
        raise ValueError(f"{name}: splits must be at least 1, not {splits}")
