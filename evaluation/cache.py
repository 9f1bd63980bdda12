"""Results of tasks kept in a folder, so that an interrupted or widened evaluation does finished tasks only once."""

import dataclasses
import hashlib
import json
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

from evaluation.contract import EvaluationError, Grid, Metric, TaskResult, Units
from evaluation.results import finite, write_atomic


class Cache:
    """One JSON file per task and circumstances in `folder`."""

    def __init__(self, folder: str | pathlib.Path) -> None:
        self.folder = pathlib.Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)

    def __call__(self, circumstances: Mapping[str, Any], compute: Callable[[], TaskResult]) -> TaskResult:
        """The kept result of equal `circumstances` (everything the result depends on), else what `compute` finds, kept.

        Raises EvaluationError, naming the file, for a damaged one.
        """
        text = json.dumps(finite(circumstances), sort_keys=True, default=str)
        path = self.folder / f"{circumstances['task']}_{hashlib.sha256(text.encode()).hexdigest()[:24]}.json"
        if path.is_file():
            return _decode(path)
        result = compute()
        write_atomic(path, json.dumps(finite(dataclasses.asdict(result))))
        return result


def _decode(path: pathlib.Path) -> TaskResult:
    try:
        kept = json.loads(path.read_text(encoding="utf-8"))
        return TaskResult(
            name=kept["name"],
            metrics={name: Metric(**metric) for name, metric in kept["metrics"].items()},
            samples=kept["samples"],
            effective=kept["effective"],
            original=kept["original"],
            units=None if kept["units"] is None else Units(**kept["units"]),
            grids={name: Grid(**grid) for name, grid in kept["grids"].items()},
        )
    except (ValueError, KeyError, TypeError) as error:
        raise EvaluationError(
            f"kept result {path} is damaged ({error}): delete it to have the task run again"
        ) from error
