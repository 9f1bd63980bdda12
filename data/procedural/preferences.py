"""Pairs of answers of which one is better by construction: the lines that follow in a text, and others in their place.

The better answer is the next lines of the text itself. The worse one is, by kind, "corrupted": the same lines with a
share of their letters and digits drawn anew, of the length and the look of the better one and without its sense; or
"elsewhere": lines of the same text that stand in another place, with sense and not here.
"""

import json
import os
import pathlib
from collections.abc import Sequence

import numpy as np

from data.errors import DataError

KINDS = ("corrupted", "elsewhere")
_LEAST = 8  # Letters and digits in an answer: there must be something to choose by.
_LETTERS = np.array(list("abcdefghijklmnopqrstuvwxyz"))


def generate(
    texts: Sequence[str],
    count: int,
    seed: int,
    *,
    kind: str = "corrupted",
    prompt_lines: int = 4,
    answer_lines: int = 1,
    share: float = 0.3,
) -> list[dict[str, str]]:
    """`count` records of "prompt", "chosen" and "rejected", drawn by `seed` alone.

    A record is `prompt_lines` lines of a text and the `answer_lines` after them, which hold at least eight letters or
    digits; of these "corrupted" changes `share`, at least one. Raises DataError for an unknown kind, and for texts with
    fewer such places.
    """
    if kind not in KINDS:
        raise DataError(f"unknown kind of pairs {kind!r}: known are {', '.join(KINDS)}")
    draw = np.random.default_rng(seed)
    cut = [text.splitlines(keepends=True) for text in texts]
    size = prompt_lines + answer_lines
    places = [(i, at) for i, lines in enumerate(cut) for at in range(len(lines) - size + 1)]
    found: list[dict[str, str]] = []
    for place in draw.permutation(len(places)):
        i, at = places[place]
        lines = cut[i]
        prompt, answer = "".join(lines[at : at + prompt_lines]), "".join(lines[at + prompt_lines : at + size])
        if _letters(answer).size < _LEAST:
            continue
        other = int(draw.integers(len(lines) - answer_lines + 1))
        worse = corrupted(answer, share, draw) if kind == KINDS[0] else "".join(lines[other : other + answer_lines])
        if _letters(worse).size >= _LEAST and worse != answer:
            found.append({"prompt": prompt, "chosen": answer, "rejected": worse})
        if len(found) == count:
            return found
    raise DataError(
        f"the texts have {len(found)} places for pairs of {size} lines, fewer than {count}: give more texts"
    )


def corrupted(text: str, share: float, draw: np.random.Generator) -> str:
    """The text with `share` of its letters and digits, at least one, changed to other letters."""
    letters, places = list(text), _letters(text)
    for i in draw.choice(places, max(1, round(share * places.size)), replace=False):
        letters[i] = str(draw.choice(_LETTERS[letters[i].lower() != _LETTERS]))
    return "".join(letters)


def _letters(text: str) -> np.ndarray:
    """The places of ASCII letters and digits."""
    return np.array([i for i, letter in enumerate(text) if letter.isascii() and letter.isalnum()], np.int64)


def write(records: Sequence[dict[str, str]], path: str | os.PathLike[str]) -> None:
    """The records as a .jsonl file, which is there whole or not at all."""
    path = pathlib.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(f".{path.name}.part")
    scratch.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    os.replace(scratch, path)
