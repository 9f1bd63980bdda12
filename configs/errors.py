"""Mistakes of the user, told in one line: what was asked, what is near, what to do."""

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """Something the user can put right: a bad config, a missing file, a damaged record.

    Its text is one line that names the thing and says what to do. The command lines print that line and leave with
    status 2; every other exception is a defect of ours and keeps its traceback.
    """

    def __init__(self, message: str) -> None:
        line = " ".join(message.split())
        super().__init__(
            "".join(character if character.isprintable() else ascii(character)[1:-1] for character in line)
        )


class ConfigError(UserError, ValueError):
    """A config that cannot be run: an unknown field, a wrong type, a value out of range, numbers that do not divide."""


def nearest(name: str, known: Iterable[str], *, most: int = 3) -> list[str]:
    """The known names most like `name`, best first; empty when none is near."""
    return difflib.get_close_matches(name, sorted(set(known)), n=most, cutoff=0.5)


def unknown(kind: str, name: str, known: Iterable[str]) -> str:
    """The message for an unknown `name` of some `kind`, with the nearest known names first."""
    known = sorted(known)
    near = nearest(name, known)
    hint = f"did you mean {' or '.join(near)}?" if near else f"known: {', '.join(known)}"
    return f"unknown {kind} {name!r}: {hint}"
