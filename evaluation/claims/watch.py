"""How far a claim is: lines, and between them a bar on a terminal or a line now and then elsewhere."""

import sys
import time

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

SECONDS = 10.0  # Without a terminal, the least time between two lines of progress.


class Watch:
    """Tells a person what is going on; the bar is there only while something is counted."""

    def __init__(self, *, every: float = SECONDS) -> None:
        self._console = Console(file=sys.stdout, highlight=False, soft_wrap=True)
        self._every, self._last = every, 0.0
        self.bar: Progress | None = None  # While something is counted on a terminal.
        self._task = TaskID(0)

    def say(self, text: str) -> None:
        """A line of its own."""
        self._console.print(text, markup=False)

    def report(self, what: str, done: int, total: int) -> None:
        """`done` of `total` pieces of `what` are finished."""
        if self._console.is_terminal:
            if self.bar is None:
                columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
                self.bar = Progress(*columns, console=self._console, transient=True)
                self._task = self.bar.add_task(what, total=total)
                self.bar.start()
            self.bar.update(self._task, description=what, completed=done, total=total)
        elif done == total or time.monotonic() - self._last >= self._every:
            self._last = time.monotonic()
            self.say(f"  {what}: {done}/{total}")

    def pause(self) -> None:
        """Takes the bar away, until something is reported again."""
        if self.bar is not None:
            self.bar.stop()
            self.bar = None
