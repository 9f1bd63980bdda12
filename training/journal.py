"""What the loop writes down: reports read one step late, evaluations, and the last word on a run."""

import contextlib
from typing import Any

import jax
import ml_collections
import numpy as np

from configs.errors import UserError
from training import metrics, processes, run_folder
from training.progress import Bar, Clock
from training.run_folder import RunFolder
from training.setup import Training
from training.step import Report


class NotFinite(UserError):
    """A step met a loss or gradient that is not finite; the state is the one from before that step."""

    def __init__(self, step: int, leaves: list[str], position: Any) -> None:
        self.step, self.leaves, self.position = step, leaves, position
        shown = ", ".join(leaves[:8]) + (f" and {len(leaves) - 8} more" if len(leaves) > 8 else "")
        super().__init__(
            f"step {step} is not finite in: {shown}; stopped; the state before it is checkpoint {step - 1}. "
            "Lower config.optimizer.learning_rate or set config.optimizer.clip_norm, and start anew or with "
            "config.train.init_from"
        )


class Journal(contextlib.AbstractContextManager):
    """Keeps the report of the newest step unread, so that the device is never waited for while it could work."""

    def __init__(
        self,
        config: ml_collections.ConfigDict,
        folder: RunFolder,
        bar: Bar,
        clock: Clock,
        training: Training,
        start: int,
    ) -> None:
        self._config, self._folder, self._bar, self._clock, self._training = config, folder, bar, clock, training
        self._tokens = config.data.batch_size * config.data.length * (2 if config.data.form == "preferences" else 1)
        self._unread: tuple[int, Report, Any] | None = None
        self._writers = metrics.writers(folder.path, config, start) if processes.first() else []
        self.evaluated = {line["step"] for line in run_folder.lines(folder.path / "eval.jsonl")}

    def __exit__(self, *error: Any) -> None:
        for writer in self._writers:
            writer.close()

    def note(self, step: int, report: Report, position: Any) -> None:
        """Takes the report of `step`, and reads that of the step before; NotFinite if that one broke."""
        before, self._unread = self._unread, (step, report, position)
        if before:
            self._read(*before)
        self._bar.step(step)

    def catch_up(self) -> None:
        """Reads what is unread, so that everything up to now is on disk; NotFinite if that step broke."""
        if self._unread:
            before, self._unread = self._unread, None
            self._read(*before)

    def write(self, step: int, values: dict[str, Any]) -> None:
        """Numbers of a step, to every writer."""
        for writer in self._writers:
            writer.write(step, {"time": round(self._clock.seconds(), 3), **values})

    def write_evaluation(self, step: int, results: Any, texts: list[dict[str, Any]]) -> None:
        """An evaluation: its numbers among the metrics, all of it in eval.jsonl, the texts in samples.jsonl."""
        self.evaluated.add(step)
        if not processes.first():
            return
        if results is not None:
            self.write(step, results.scalars("eval/"))
        run_folder.append(self._folder.path / "samples.jsonl", [{"step": step, **text} for text in texts])
        found = results.json() if results is not None else {}
        run_folder.append(self._folder.path / "eval.jsonl", [{"step": step, **found}])

    def last(self, step: int) -> dict[str, float]:
        """All numbers that were written for `step`."""
        rows = [row for row in run_folder.lines(self._folder.path / "metrics.jsonl") if row["step"] == step]
        return {name: value for row in rows for name, value in row.items()}

    def _read(self, step: int, report: Report, position: Any) -> None:
        found = jax.device_get(report)
        values = {"loss": 0.0} | {name: float(value) for name, value in found.metrics.items()}  # The loss comes first.
        if found.halted:
            leaves = [
                name for name, broken in zip(self._training.leaves, np.asarray(found.broken), strict=True) if broken
            ]
            self.write(step, {**values, "not_finite": leaves})
            raise NotFinite(step, leaves, position)
        if step == 1 or step % self._config.log.every == 0 or step == self._config.train.steps:
            rate = self._clock.rate(step * self._tokens)
            if rate:
                values["tokens_per_second"] = round(rate, 1)
                share = self._training.utilisation(rate)
                values |= {"mfu": share} if share is not None else {}
            self.write(step, values)
            self._bar.numbers(step, values["loss"], rate)
