"""What every form of latent decode attention is called with, beside `kernels.decode.call.Call`, the static part."""

from typing import NamedTuple

from jaxtyping import Array, Float, Int, Shaped


class Inputs(NamedTuple):
    """The arrays of one call; with a `table`, the cache is in pages: N of them, of S places."""

    q: Float[Array, "B T H C"]
    q_rope: Float[Array, "B T H R"]
    values: Shaped[Array, "N S g C"]
    scales: Float[Array, "N S g blocks"]
    rope: Float[Array, "N S R"]
    table: Int[Array, "B n"] | None
    lengths: Int[Array, "B"]
    starts: Int[Array, "B"]

    @property
    def slots(self) -> int:
        """Places of a row's cache."""
        return self.values.shape[1] * (1 if self.table is None else self.table.shape[1])
