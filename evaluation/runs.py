"""A run folder as the report reads it: config, metric lines, evaluation results, samples. No weights are loaded."""

import dataclasses
import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import ml_collections
import numpy as np

from configs import fields
from evaluation.contract import EvaluationError


@dataclasses.dataclass(frozen=True)
class Run:
    """What a run folder says of itself."""

    name: str  # Distinct within a report.
    folder: pathlib.Path
    config: ml_collections.ConfigDict
    metrics: Sequence[Mapping[str, Any]]  # Lines of metrics.jsonl, by step; a step that came twice counts once.
    evaluation: Mapping[str, Any]  # The newest results JSON; {} if there is none.
    samples: Sequence[Mapping[str, Any]]  # The newest samples: those of the last step that has any.
    notes: Sequence[str]  # What could not be read, for the reader of the report.

    def series(self, key: str) -> tuple[np.ndarray, np.ndarray]:
        """(steps, values) of a metric, where it was written."""
        found = [(line["step"], line[key]) for line in self.metrics if _is_number(line.get(key))]
        steps, values = zip(*found, strict=True) if found else ((), ())
        return np.array(steps, float), np.array(values, float)

    def last(self, key: str) -> float | None:
        """The last value of a metric."""
        values = self.series(key)[1]
        return float(values[-1]) if len(values) else None

    def metric(self, task: str, name: str) -> tuple[float, float | None] | None:
        """Value and standard error of a task's metric: from the results, else from the metric lines."""
        entry = self.evaluation.get("results", {}).get(task, {})
        if _is_number(entry.get(f"{name},none")):
            error = entry.get(f"{name}_stderr,none")
            return entry[f"{name},none"], error if _is_number(error) else None
        value = self.last(f"eval/{task}/{name}")
        return None if value is None else (value, self.last(f"eval/{task}/{name}_stderr"))

    @property
    def described(self) -> Mapping[str, Any]:
        """The `run` block of the results: versions, device, corpus."""
        return self.evaluation.get("run", {})


def read(folders: Sequence[str | pathlib.Path]) -> list[Run]:
    """The runs in `folders`, named by their configs or, where those coincide, by their folders.

    Raises EvaluationError for a folder that is no run. A line that was cut short, as by a kill, is left out and noted.
    """
    paths = [pathlib.Path(folder) for folder in folders]
    if not paths:
        raise EvaluationError("a report needs at least one run folder")
    runs = [_read(path) for path in paths]
    names = [run.name for run in runs]
    if len(set(names)) < len(names):
        names = [path.name or str(path) for path in paths]
    if len(set(names)) < len(names):
        names = [str(path) for path in paths]
    return [dataclasses.replace(run, name=name) for run, name in zip(runs, names, strict=True)]


def _read(folder: pathlib.Path) -> Run:
    file = folder / "config.json"
    if not file.is_file():
        reason = "has no config.json" if folder.is_dir() else "does not exist"
        raise EvaluationError(f"{folder} is no run folder: it {reason}")
    notes: list[str] = []
    try:
        config = fields.from_plain(json.loads(file.read_text(encoding="utf-8")))
    except (json.JSONDecodeError, AttributeError) as error:
        raise EvaluationError(f"{file} is damaged: {error}; restore it or leave the run out") from error
    merged: dict[int, dict[str, Any]] = {}
    for line in _lines(folder / "metrics.jsonl", notes):
        if "step" in line:  # A resumed run writes the steps after its checkpoint again; the later line holds.
            merged[line["step"]] = merged.get(line["step"], {}) | line
    samples = _lines(folder / "samples.jsonl", notes)
    latest = max((row.get("step", 0) for row in samples), default=0)
    return Run(
        name=config.get("name", folder.name),
        folder=folder,
        config=config,
        metrics=[merged[step] for step in sorted(merged)],
        evaluation=_evaluation(folder, notes),
        samples=[row for row in samples if row.get("step", 0) == latest],
        notes=notes,
    )


def _evaluation(folder: pathlib.Path, notes: list[str]) -> dict[str, Any]:
    """The newest results: of eval.py under eval/, else the last line of eval.jsonl that the loop wrote."""
    merged: dict[str, Any] = {}
    found = [line for line in _lines(folder / "eval.jsonl", notes) if "results" in line][-1:]
    for file in sorted((folder / "eval").rglob("results_*.json")):
        try:
            found.append(json.loads(file.read_text(encoding="utf-8")))
        except json.JSONDecodeError as error:
            notes.append(f"{file} is damaged and left out: {error}")
    for results in sorted(found, key=lambda results: results.get("date", 0)):
        merged = _overlay(merged, results)
    return merged


def _overlay(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """Results of a later evaluation over those of an earlier one, task by task."""
    by_task = ("results", "units", "grids", "configs", "versions", "higher_is_better", "n-samples")
    return {**below, **above, **{key: {**below.get(key, {}), **above.get(key, {})} for key in by_task}}


def _lines(file: pathlib.Path, notes: list[str]) -> list[dict[str, Any]]:
    if not file.is_file():
        return []
    rows, bad = [], 0
    for line in file.read_text(encoding="utf-8", errors="replace").splitlines():
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            bad += 1
            continue
        if isinstance(row, dict):
            rows.append(row)
        else:
            bad += 1
    if bad:
        notes.append(f"{file}: {bad} unreadable line{'s' if bad > 1 else ''} left out")
    return rows


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
