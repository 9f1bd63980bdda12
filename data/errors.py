"""The one error of this package, and how many unreadable records are let through before it is raised."""

import dataclasses
import logging

log = logging.getLogger("tessera.data")

NAMED = 5  # Skipped records that a report names; the rest are only counted.


class DataError(ValueError):
    """Input that cannot be used; the message is one line that names the thing and says what to do."""


def shorten(text: object, limit: int = 160) -> str:
    """`text` on one line of at most `limit` characters: library messages go into ours."""
    line = " ".join(str(text).split())
    return line if len(line) <= limit else line[: limit - 3] + "..."


@dataclasses.dataclass
class Skipped:
    """The records that could not be read: counted, the first ones named, allowed up to a share of all records.

    A damaged compressed file or table counts as one record, since nobody knows how many it held.
    """

    max_share: float
    count: int = 0
    first: list[str] = dataclasses.field(default_factory=list)

    def add(self, where: str, reason: str) -> None:
        """Notes one bad record. Raises DataError at once when none are allowed."""
        line = f"{where}: {reason}"
        if self.max_share <= 0:
            raise DataError(f"{line}; repair or remove it, or raise config.data.max_bad_share to skip such records")
        self.count += 1
        if len(self.first) < NAMED:
            self.first.append(line)

    def check(self, good: int) -> None:
        """Raises DataError when the bad records are more than the allowed share of all; else logs what was skipped."""
        if not self.count:
            return
        total = good + self.count
        if self.count > self.max_share * total:
            raise DataError(
                f"{self.count} of {total} records cannot be read, above config.data.max_bad_share={self.max_share:g}; "
                f"repair them or raise the limit; {self.report()}"
            )
        log.warning("%d of %d records skipped (%s)", self.count, total, self.report())

    def report(self) -> str:
        """The first bad records by name, on one line."""
        more = f", and {self.count - len(self.first)} more" if self.count > len(self.first) else ""
        return "first: " + " | ".join(self.first) + more if self.first else "none skipped"
