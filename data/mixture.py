"""Several sources in one endless sequence of rows, in given proportions and a fixed order."""

from collections.abc import Sequence

import numpy as np

from data.packing import Batch, Rows, scatter

_RESOLUTION = 1 << 20  # Weights are rounded to parts of this, so that the arithmetic below is exact.


class Mixture:
    """Rows of several sources, interleaved evenly: any stretch of rows holds each source by its weight, to a few rows.

    The choice depends on the row's number only. Each source counts its own rows and so has epochs of its own.
    """

    def __init__(self, sources: Sequence[Rows], weights: Sequence[float]):
        """`weights` are positive, one per source, and need not add up to 1."""
        self.sources = tuple(sources)
        self.parts = [max(1, round(weight / sum(weights) * _RESOLUTION)) for weight in weights]

    def assign(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """For each row number, int64 [B]: the source, and the number of the row within that source."""
        source = np.full(rows.shape, len(self.parts) - 1)
        number = np.array(rows, np.int64)
        open_ = np.ones(rows.shape, bool)  # Not yet given to a source; `number` then counts the rows left over.
        left = sum(self.parts)
        for i, part in enumerate(self.parts[:-1]):
            before, after = number * part // left, (number + 1) * part // left  # Rows of this source up to here.
            taken = open_ & (after > before)
            source[taken] = i
            number = np.where(open_, np.where(taken, before, number - before), number)
            open_ &= ~taken
            left -= part
        return source, number

    def gather(self, rows: np.ndarray) -> Batch:
        """See Rows."""
        source, number = self.assign(np.asarray(rows, np.int64))
        parts = [(source == i, i) for i in np.unique(source)]
        return scatter([(mine, self.sources[i].gather(number[mine])) for mine, i in parts], len(source))
