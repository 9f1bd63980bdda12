"""What every form of decode attention is called with."""

import dataclasses
from typing import NamedTuple

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
