"""How far the run is: a bar with rate, remaining time and loss on a terminal, plain lines elsewhere."""

import contextlib
import sys
import time
from collections.abc import Iterator
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn


class Clock:
    """Seconds of training, without what evaluations and saves take, and over all sessions of a resumed run."""

    def __init__(self, elapsed: float = 0.0) -> None:
        self._elapsed, self._since = elapsed, time.perf_counter()
        self._paused: float | None = None
        self._mark: tuple[float, int] | None = None

    def seconds(self) -> float:
        """So far."""
        now = time.perf_counter() if self._paused is None else self._paused
        return self._elapsed + (now - self._since)

    @contextlib.contextmanager
    def pause(self) -> Iterator[None]:
        """A block during which the clock stands still."""
        self._paused = time.perf_counter()
        try:
            yield
        finally:
            self._since += time.perf_counter() - self._paused
            self._paused = None

    def rate(self, tokens: int) -> float | None:
        """Tokens per second since the last call, `tokens` being the sum so far; None the first time, which compiles."""
        now, before = self.seconds(), self._mark
        self._mark = (now, tokens)
        return (tokens - before[1]) / (now - before[0]) if before and now > before[0] else None


class Bar:
    """Tells a person where a run of `total` steps is; `quiet` is for processes that keep still."""

    def __init__(self, name: str, total: int, *, quiet: bool = False) -> None:
        self._console = Console(file=sys.stdout, quiet=quiet, highlight=False, soft_wrap=True)
        self._total = total
        self._first: tuple[int, float] | None = None  # Step and time of the first reading: before it, all is compiling.
        self._progress = Progress(
            TextColumn("[bold]{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[shown]}"),
            TimeRemainingColumn(),
            console=self._console,
            disable=quiet or not self._console.is_terminal,
        )
        self._task = self._progress.add_task(name, total=total, shown="preparing")

    def __enter__(self) -> "Bar":
        self._progress.start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._progress.stop()

    def begin(self, start: int) -> None:
        """Training starts after `start` steps."""
        self._progress.reset(self._task, total=self._total, completed=start, shown="compiling")

    def step(self, step: int) -> None:
        """`step` steps are done."""
        self._progress.update(self._task, completed=step)

    def numbers(self, step: int, loss: float, rate: float | None) -> None:
        """What the last reading said."""
        shown = f"loss {loss:.4f}" + (f", {rate:,.0f} tokens/s" if rate else "")
        self._progress.update(self._task, completed=step, shown=shown)
        if not self._console.is_terminal:
            self._first = self._first or (step, time.monotonic())
            steps, seconds = step - self._first[0], time.monotonic() - self._first[1]
            left = f", {duration(seconds / steps * (self._total - step))} left" if steps else ""
            self._console.print(f"step {step}/{self._total}: {shown}{left}")

    def say(self, text: str) -> None:
        """A line of its own."""
        self._console.print(text, markup=False)

    def show(self, thing: Any) -> None:
        """A table, or whatever else rich can show."""
        self._console.print(thing)

    def doing(self, what: str) -> None:
        """What happens between steps."""
        self._progress.update(self._task, shown=what)


def duration(seconds: float) -> str:
    """h:mm:ss, or m:ss below an hour."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
