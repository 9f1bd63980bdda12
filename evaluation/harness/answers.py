"""Answers to requests kept in a file, so that an interrupted evaluation goes on where it was."""

import hashlib
import json
import pathlib
from collections.abc import Sequence
from typing import Any

from evaluation.contract import EvaluationError


class Answers:
    """One JSON line per answer in a file that belongs to one model: whoever opens it names it after the weights."""

    def __init__(self, file: str | pathlib.Path) -> None:
        """Reads what is there; a last line that was cut short by a kill is dropped. Raises EvaluationError."""
        self.file = pathlib.Path(file)
        self.file.parent.mkdir(parents=True, exist_ok=True)
        self._known: dict[str, Any] = {}
        raw = self.file.read_bytes() if self.file.is_file() else b""
        whole = raw[: raw.rfind(b"\n") + 1]
        for number, line in enumerate(whole.splitlines(), 1):
            try:
                row = json.loads(line)
                self._known[row["key"]] = row["answer"]
            except (ValueError, KeyError, TypeError) as error:
                raise EvaluationError(
                    f"kept answers {self.file} are damaged in line {number} ({error}): delete the file to ask again"
                ) from error
        if len(whole) < len(raw):
            with open(self.file, "r+b") as cut_short:
                cut_short.truncate(len(whole))

    def get(self, kind: str, arguments: Sequence[Any]) -> Any:
        """The kept answer, or None."""
        return self._known.get(_key(kind, arguments))

    def add(self, kind: str, arguments: Sequence[Any], answer: Any) -> None:
        """Keeps an answer, at once."""
        key = _key(kind, arguments)
        self._known[key] = answer
        with open(self.file, "a", encoding="utf-8") as lines:
            lines.write(json.dumps({"key": key, "answer": answer}) + "\n")


def _key(kind: str, arguments: Sequence[Any]) -> str:
    return hashlib.sha256(json.dumps([kind, *arguments], sort_keys=True).encode("utf-8")).hexdigest()[:32]
