"""Data sets of tasks from local files: `DIR/<dataset>/<split>.jsonl` or `.parquet`, with the hub's column names."""

import json
import pathlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from evaluation.contract import EvaluationError

ENDINGS = (".jsonl", ".parquet")


def folders(root: pathlib.Path, task: str, path: str, name: str | None) -> list[pathlib.Path]:
    """Where the data of a task may lie, the first that exists counts: `<owner>/<dataset>`, `<dataset>` (each with the
    name of the subset, if it has one), `<task>`."""
    places = [root / path, root / path.rsplit("/", 1)[-1]]
    return [*(place / name if name else place for place in places), root / task]


def find(places: Iterable[pathlib.Path], split: str) -> list[pathlib.Path]:
    """The files of a split in the first of the folders that has any: `<split>.jsonl`, `<split>.parquet`, or the
    numbered parts that the hub gives out; [] if there are none."""
    for place in places:
        for ending in ENDINGS:
            files = [place / f"{split}{ending}"] if (place / f"{split}{ending}").is_file() else []
            files = files or sorted(place.glob(f"{split}-*-of-*{ending}"))
            if files:
                return files
    return []


def wanted(places: Sequence[pathlib.Path], split: str) -> str:
    """What was looked for, for people."""
    return " or ".join(str(place / f"{split}{{{','.join(ENDINGS)}}}") for place in dict.fromkeys(places))


def read(files: Sequence[pathlib.Path]) -> Any:
    """A `datasets.Dataset` of the rows of the files, held in memory. Raises EvaluationError, naming file and line."""
    import datasets
    import pyarrow

    tables = []
    for file in files:
        try:
            tables.append(_parquet(file) if file.suffix == ".parquet" else _table(file, list(_rows(file))))
        except (pyarrow.ArrowException, OSError) as error:
            raise EvaluationError(f"{file} cannot be read: {_line(error)}; replace it") from error
    try:
        table = pyarrow.concat_tables(tables, promote_options="permissive")
        return datasets.Dataset(table)
    except (pyarrow.ArrowException, ValueError, TypeError) as error:
        raise EvaluationError(f"{files[0]} holds no table of documents: {_line(error)}") from error


def _parquet(file: pathlib.Path) -> Any:
    from pyarrow import parquet

    return parquet.read_table(file)


def _rows(file: pathlib.Path) -> Iterable[Mapping[str, Any]]:
    with open(file, "rb") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line.decode("utf-8"))
            except (ValueError, RecursionError) as error:
                raise EvaluationError(f"{file}, line {number}: not JSON ({_line(error)}); replace the file") from error
            if not isinstance(row, dict):
                raise EvaluationError(f"{file}, line {number}: a JSON {type(row).__name__}, not an object of columns")
            yield row


def _table(file: pathlib.Path, rows: Sequence[Mapping[str, Any]]) -> Any:
    import pyarrow

    if not rows:
        raise EvaluationError(f"{file} holds no document")
    names = dict.fromkeys(name for row in rows for name in row)
    return pyarrow.table({name: pyarrow.array([row.get(name) for row in rows]) for name in names})


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200]
