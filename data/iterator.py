"""The endless iterator over training batches, on grain, and its saved position.

The position is the number of rows that all processes together have taken, so it means the same for any number of
processes and any batch size.
"""

import sys
from typing import Any

import grain
import numpy as np
from absl import flags

from data.errors import DataError
from data.packing import Batch, Rows

_AHEAD = 4  # Batches made ahead of the step, by one thread: a batch takes well under a millisecond.


class _Batches:
    """A grain source: batch i of this process, of the batches that begin at row `first`."""

    def __init__(self, rows: Rows, first: int, batch_size: int, share: slice):
        self.rows, self.first, self.batch_size, self.share = rows, first, batch_size, share

    def __len__(self) -> int:
        return sys.maxsize  # Epochs follow one another for ever.

    def __getitem__(self, i: Any) -> Batch:
        first = self.first + int(i) * self.batch_size
        return self.rows.gather(np.arange(first + self.share.start, first + self.share.stop, dtype=np.int64))

    def __repr__(self) -> str:
        return f"Batches(first={self.first}, batch_size={self.batch_size}, share={self.share})"


class TrainIterator(grain.DatasetIterator):
    """Batches of this process's rows, for ever; process p has the p-th contiguous part of every global batch.

    `get_state()` is a small JSON-able dict that is the same in all processes; it counts the batches handed out, not
    those made ahead. `set_state` continues exactly there, whatever the number of processes was when it was saved.
    """

    def __init__(
        self,
        rows: Rows,
        order: dict[str, Any],
        *,
        batch_size: int,
        process_index: int = 0,
        process_count: int = 1,
        workers: int = 0,
    ):
        """`order` holds, by name, everything that decides the order of rows; a saved position must agree with it."""
        super().__init__()
        share = batch_size // process_count
        self._rows, self._order, self._batch_size, self._workers = rows, order, batch_size, workers
        self._share = slice(process_index * share, (process_index + 1) * share)
        self._next_row = 0
        self._inner: grain.DatasetIterator | None = None

    def __next__(self) -> Batch:
        if self._closed:
            raise ValueError("the data iterator is closed; set_state opens it again")
        if self._inner is None:
            self._inner = self._start()
        batch = next(self._inner)
        self._next_row += self._batch_size
        return batch

    def _start(self) -> grain.DatasetIterator:
        source = _Batches(self._rows, self._next_row, self._batch_size, self._share)
        options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=_AHEAD)
        dataset = grain.MapDataset.source(source).to_iter_dataset(options)
        if self._workers:
            if not flags.FLAGS.is_parsed():  # grain reads absl's flags here; notebooks and tests never parse them.
                flags.FLAGS.mark_as_parsed()
            dataset = dataset.mp_prefetch(grain.MultiprocessingOptions(self._workers, per_worker_buffer_size=_AHEAD))
        return iter(dataset)

    def start_prefetch(self) -> None:
        """Begins making batches before the first is asked for."""
        if self._inner is None:
            self._inner = self._start()
        self._inner.start_prefetch()

    def get_state(self) -> dict[str, Any]:
        """The position: how many rows were taken, and the order they are counted in."""
        return {"next_row": self._next_row, "order": dict(self._order)}

    def set_state(self, state: dict[str, Any]) -> None:
        """Continues at a saved position. Raises DataError when it was saved under another order of rows."""
        next_row, saved = state.get("next_row"), state.get("order")
        if not isinstance(next_row, int) or isinstance(next_row, bool) or next_row < 0 or not isinstance(saved, dict):
            raise DataError("the saved data position is damaged: it needs a row number and an order; use another save")
        changed = [
            f"{name} was {saved.get(name)!r} and is {self._order.get(name)!r}"
            for name in sorted({*saved, *self._order})
            if saved.get(name) != self._order.get(name)
        ]
        if changed:
            raise DataError(
                f"the saved data position belongs to other data ({'; '.join(changed)}); restore the old data"
            )
        self.close()
        self._closed = False
        self._next_row = next_row

    def close(self) -> None:
        """Ends reading ahead. Idempotent."""
        if self._inner is not None:
            self._inner.close()
            self._inner = None
        super().close()
