"""What an evaluation found: the JSON layout of lm-evaluation-harness with a block of our own, and the console table."""

import dataclasses
import datetime
import hashlib
import json
import math
import os
import pathlib
import platform
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from rich import box
from rich.table import Table

from evaluation import statistics
from evaluation.contract import Grid, Metric, Task, TaskResult


@dataclasses.dataclass(frozen=True)
class Results:
    """The results of several tasks on one model, with what is needed to repeat them."""

    name: str  # The model, as it is called in files and tables.
    tasks: Mapping[str, Task]
    found: Mapping[str, TaskResult]
    settings: Mapping[str, Any]  # batch_size, limit, seed, parameters of tasks, ...
    run: Mapping[str, Any]  # Variant, backend, mesh, dtype, versions, corpus, commit of the weights.
    seconds: float
    date: datetime.datetime
    harness: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # What `evaluation.harness` found.

    def scalars(self, prefix: str = "eval/") -> dict[str, float]:
        """`eval/<task>/<metric>` and `..._stderr`, flat, for a line of metrics."""
        flat = {}
        for task, result in self.found.items():
            for name, metric in result.metrics.items():
                flat[f"{prefix}{task}/{name}"] = metric.value
                if metric.stderr is not None:
                    flat[f"{prefix}{task}/{name}_stderr"] = metric.stderr
        return flat

    def json(self) -> dict[str, Any]:
        """The whole as one JSON object: lm-evaluation-harness keys, and our `run`, `units` and `grids`."""
        groups = self._groups()
        content = finite(
            {
                "results": {name: self._entry(name) for name in self.found},
                "groups": {name: _entry(name, metrics, {}) for name, (_, metrics) in groups.items()},
                "group_subtasks": {name: list(members) for name, (members, _) in groups.items()},
                "configs": {name: self._config(name) for name in self.found},
                "versions": {name: self.tasks[name].version for name in self.found},
                "n-shot": dict.fromkeys(self.found, 0),
                "higher_is_better": {
                    name: {key: metric.higher_is_better for key, metric in result.metrics.items()}
                    for name, result in self.found.items()
                },
                "n-samples": {
                    name: {"original": result.original, "effective": result.effective}
                    for name, result in self.found.items()
                },
                "units": {
                    name: {key: list(value) if key != "metric" else value for key, value in vars(result.units).items()}
                    for name, result in self.found.items()
                    if result.units is not None
                },
                "grids": {
                    name: {key: dataclasses.asdict(grid) for key, grid in result.grids.items()}
                    for name, result in self.found.items()
                    if result.grids
                },
                "config": dict(self.settings),
                "run": dict(self.run),
                "git_hash": git_hash(),
                "date": self.date.timestamp(),
                "model_name": self.name,
                "model_name_sanitized": sanitise(self.name),
                "task_hashes": {
                    name: _digest(row.get("doc_hash", row) for row in r.samples) for name, r in self.found.items()
                },
                "total_evaluation_time_seconds": round(self.seconds, 3),
            }
        )
        for key, part in finite(self.harness).items():
            if key != "samples":
                content.setdefault(key, {}).update(part)
        for name, rows in self.harness.get("samples", {}).items():
            content["task_hashes"][name] = _digest(row["doc_hash"] for row in rows)
        return content

    def table(self) -> Table:
        """The console table of lm-evaluation-harness."""
        table = Table(box=box.SIMPLE_HEAD, title=self.name, title_justify="left", title_style="bold", pad_edge=False)
        table.padding, table.collapse_padding = (0, 1), True
        for heading in ("Task", "Version", "Filter", "n-shot", "Metric", "", "Value", "Stderr"):
            right = heading in ("Value", "Stderr", "Version", "n-shot")
            table.add_column(heading, justify="right" if right else "left", no_wrap=True)
        for name, result in self.found.items():
            first = True
            for key, metric in sorted(result.metrics.items(), key=lambda item: "_n" in item[0] and "_k" in item[0]):
                head = (name, str(self.tasks[name].version), "none", "0") if first else ("", "", "", "")
                table.add_row(*head, key, *_cells(metric))
                first = False
            if first:
                table.add_row(
                    name, str(self.tasks[name].version), "none", "0", f"{result.effective} samples", "", "", "", ""
                )
        for name, (_, metrics) in self._groups().items():
            for key, metric in metrics.items():
                table.add_row(f"[bold]{name}[/bold]", "", "none", "0", key, *_cells(metric))
        for kind, style in (("results", "{}"), ("groups", "[bold]{}[/bold]")):
            for name, entry in self.harness.get(kind, {}).items():
                version = str(self.harness["versions"].get(name) or "")
                named, shots = style.format(name), str(self.harness["n-shot"].get(name, ""))
                for filtering, key, metric in _measured(entry, self.harness["higher_is_better"].get(name, {})):
                    table.add_row(named, version, filtering, shots, key, *_cells(metric))
                    named = version = shots = ""
        return table

    def write(self, folder: str | os.PathLike, *, log_samples: bool = True) -> pathlib.Path:
        """Writes results_<time>.json, samples_<task>_<time>.jsonl, and CSV and PNG of grids; returns the JSON's path.

        Every file appears whole or not at all. The JSON comes last, so a results file means a complete folder.
        """
        folder = pathlib.Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        stamp = self.date.isoformat(timespec="microseconds").replace(":", "-")
        samples = {name: result.samples for name, result in self.found.items()} | self.harness.get("samples", {})
        for name, rows in samples.items():
            if log_samples and rows:
                lines = "".join(json.dumps(finite(row), ensure_ascii=False) + "\n" for row in rows)
                write_atomic(folder / f"samples_{sanitise(name)}_{stamp}.jsonl", lines)
        for name, result in self.found.items():
            for key, grid in result.grids.items():
                stem = f"{sanitise(name)}_{sanitise(key)}_{stamp}"
                write_atomic(folder / f"{stem}.csv", csv(grid))
                write_atomic(folder / f"{stem}.png", _png(grid))
        path = folder / f"results_{stamp}.json"
        write_atomic(path, json.dumps(self.json(), indent=2, ensure_ascii=False) + "\n")
        return path

    def _entry(self, name: str) -> dict[str, Any]:
        result, key = self.found[name], self.tasks[name].cluster_key
        clustered = {}
        if key:
            for metric in result.metrics:
                rows = [row for row in result.samples if metric in row]
                if len(rows) > 1:
                    values = np.array([row[metric] for row in rows], np.float64)
                    clustered[metric] = statistics.clustered(values, [row[key] for row in rows])
        return _entry(name, result.metrics, clustered)

    def _config(self, name: str) -> dict[str, Any]:
        task = self.tasks[name]
        return {
            "task": name,
            "group": task.group,
            "output_type": task.output_type,
            "description": task.description,
            "parameters": task.parameters(self.settings.get("params", {}).get(name, {})),
            "metric_list": [
                {"metric": key, "higher_is_better": metric.higher_is_better}
                for key, metric in self.found[name].metrics.items()
            ],
            "metadata": {"version": task.version},
        }

    def _groups(self) -> dict[str, tuple[list[str], dict[str, Metric]]]:
        """Size-weighted means of the metrics that all tasks of a group share, for groups with two tasks or more."""
        members: dict[str, list[str]] = {}
        for name in self.found:
            if self.tasks[name].group and self.found[name].metrics:
                members.setdefault(self.tasks[name].group, []).append(name)
        groups = {}
        for group, names in members.items():
            shared = set.intersection(*(set(self.found[name].metrics) for name in names))
            if len(names) < 2 or not shared:
                continue
            sizes = [self.found[name].effective for name in names]
            metrics = {}
            for key in sorted(shared):
                parts = [self.found[name].metrics[key] for name in names]
                errors = [part.stderr for part in parts]
                value = float(np.average([part.value for part in parts], weights=sizes))
                error = None if None in errors else statistics.pooled(errors, sizes)
                metrics[key] = Metric(value, error, parts[0].higher_is_better)
            groups[group] = (names, metrics)
        return groups


def environment() -> dict[str, Any]:
    """Versions and devices, for the `run` block."""
    import flax

    device = jax.devices()[0]
    return {
        "jax": jax.__version__,
        "flax": flax.__version__,
        "python": platform.python_version(),
        "platform": device.platform,
        "device_kind": device.device_kind,
        "devices": jax.device_count(),
        "processes": jax.process_count(),
        "cpu_cores": os.cpu_count(),
    }


def git_hash() -> str | None:
    """The commit of this code, or None outside a repository."""
    if shutil.which("git") is None:
        return None
    command, folder = ["git", "rev-parse", "--short=12", "HEAD"], pathlib.Path(__file__).parent
    done = subprocess.run(command, capture_output=True, text=True, cwd=folder, check=False)
    return done.stdout.strip() if done.returncode == 0 else None


def sanitise(name: str) -> str:
    """A name fit for a file: whatever is no letter, digit, dot, dash, comma, equals sign or underscore becomes `_`."""
    return re.sub(r"[^\w.,=+-]+", "_", name).strip("_") or "model"


def csv(grid: Grid) -> str:
    """A grid as CSV, the first column holding the names of the rows."""
    lines = [",".join([f"{grid.row_name}\\{grid.column_name}", *map(str, grid.columns)])]
    lines += [
        ",".join([str(row), *(f"{value:.6g}" for value in values)])
        for row, values in zip(grid.rows, grid.values, strict=True)
    ]
    return "\n".join(lines) + "\n"


def finite(value: Any) -> Any:
    """`value` as strict JSON: NumPy scalars become Python's, tuples lists, and numbers that are not finite null."""
    if isinstance(value, Mapping):
        return {str(key): finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple | np.ndarray):
        return [finite(item) for item in value]
    if isinstance(value, np.generic):
        return finite(value.item())
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def write_atomic(path: pathlib.Path, content: str | bytes) -> None:
    """The file at `path` becomes `content` in one step; an interrupted write leaves what was there before."""
    data = content.encode("utf-8") if isinstance(content, str) else content
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(temporary, 0o666 & ~umask)  # mkstemp makes private files; results are for everybody who may read.
        os.replace(temporary, path)
    except BaseException:
        pathlib.Path(temporary).unlink(missing_ok=True)
        raise


def _entry(name: str, metrics: Mapping[str, Metric], clustered: Mapping[str, float | None]) -> dict[str, Any]:
    entry: dict[str, Any] = {"alias": name}
    for key, metric in metrics.items():
        entry[f"{key},none"] = metric.value
        entry[f"{key}_stderr,none"] = "N/A" if metric.stderr is None else metric.stderr
        if clustered.get(key) is not None:
            entry[f"{key}_stderr_clustered,none"] = clustered[key]
    return entry


def _measured(entry: Mapping[str, Any], higher: Mapping[str, bool]) -> Iterator[tuple[str, str, Metric]]:
    """(filter, metric's name, metric) of an entry of the harness, whose fields are called "name,filter"."""
    for field, value in entry.items():
        name, comma, filtering = field.rpartition(",")
        if not comma or name.endswith("_stderr") or not isinstance(value, int | float):
            continue
        error = entry.get(f"{name}_stderr,{filtering}")
        up = higher.get(name)
        yield filtering, name, Metric(value, error if isinstance(error, float) else None, up is None or up)


def _cells(metric: Metric) -> tuple[str, str, str]:
    arrow = "↑" if metric.higher_is_better else "↓"
    return arrow, _shown(metric.value), "" if metric.stderr is None else f"± {_shown(metric.stderr)}"


def _shown(value: float) -> str:
    return f"{value:.4f}" if abs(value) < 1000 else f"{value:,.1f}" if abs(value) < 1e6 else f"{value:.3e}"


def _digest(parts: Iterable[Any]) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(json.dumps(finite(part), sort_keys=True, default=str).encode("utf-8"))
    return digest.hexdigest()


def _png(grid: Grid) -> bytes:
    from evaluation import plots

    return plots.png(plots.heat_map(grid))


def compare(results: Sequence[Mapping[str, Any]], task: str) -> list[statistics.Difference | None]:
    """For results JSONs [first, *others]: other - first on the task's units; None where the units are not the same."""
    first = results[0].get("units", {}).get(task)
    return [_difference(first, other.get("units", {}).get(task)) for other in results[1:]]


def _difference(a: Mapping[str, Any] | None, b: Mapping[str, Any] | None) -> statistics.Difference | None:
    if not a or not b or a["metric"] != b["metric"] or list(a["ids"]) != list(b["ids"]):
        return None
    if list(a["denominator"]) != list(b["denominator"]):
        return None
    return statistics.paired(np.array(a["numerator"]), np.array(b["numerator"]), np.array(a["denominator"]))
