"""What a measured claim leaves in claims/<slug>.json: every number with its spread, and what came of the checks."""

import dataclasses
import json
import math
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from evaluation import results
from evaluation.claims.checks import CheckResult, Finding, Key, Measured, Verdict, of, standard_error
from evaluation.claims.contract import Claim, Table
from evaluation.contract import EvaluationError

SCHEMA = 1
FOLDER = pathlib.Path("claims")  # Where records belong, from the root of the repository.


@dataclasses.dataclass(frozen=True)
class Measurement:
    """One number over the seeds of its record, in their order."""

    name: str
    unit: str
    keys: Mapping[str, str]
    values: tuple[float, ...]

    @property
    def mean(self) -> float:
        """Over seeds."""
        return float(np.mean(self.values))

    @property
    def deviation(self) -> float | None:
        """The sample standard deviation over seeds; None for a single one."""
        error = standard_error(np.asarray(self.values))
        return None if error is None else error * math.sqrt(len(self.values))

    @property
    def key(self) -> Key:
        """How checks name it."""
        return of(self.name, **self.keys)


@dataclasses.dataclass(frozen=True)
class Record:
    """A claim as it was measured, complete: pages and pictures are made of this alone."""

    slug: str
    title: str
    paper: str
    says: str
    setting: str
    version: int
    checks: tuple[CheckResult, ...]
    tables: tuple[Table, ...]
    measurements: tuple[Measurement, ...]
    seeds: tuple[int, ...]
    parameters: Mapping[str, Any]
    changed: Mapping[str, Any]  # The parameters that were not the claim's own, with the claim's own values.
    command: str
    runs: tuple[Mapping[str, Any], ...]  # Trained runs: seed, folder, step, reused.
    environment: Mapping[str, Any]  # Versions and device.
    commits: tuple[str, ...]  # Of the code that measured.
    date: str  # ISO, UTC, when the last seed was done.
    seconds: float  # Of all seeds together.

    @property
    def verdict(self) -> Verdict:
        """Of all checks together."""
        return Verdict.together(check.verdict for check in self.checks)

    @property
    def measured(self) -> Measured:
        """The values, by key."""
        return Measured({each.key: each.values for each in self.measurements})

    def table(self, table: Table) -> tuple[list[str], list[str], dict[tuple[str, str], Measurement]]:
        """Names of rows, names of columns, and the measurement in each cell that has one."""
        rows: dict[str, None] = {}  # As sets that keep an order.
        columns: dict[str, None] = {}
        cells: dict[tuple[str, str], Measurement] = {}
        measures = (table.measures,) if isinstance(table.measures, str) else table.measures
        used = {*table.where, table.rows, *([table.columns] if table.columns else [])}
        for each in self.measurements:
            fits = all(each.keys.get(key) == value for key, value in table.where.items())
            if each.name in measures and set(each.keys) == used and fits:
                cell = (each.keys[table.rows], each.keys[table.columns] if table.columns else each.name)
                rows[cell[0]] = columns[cell[1]] = None
                cells[cell] = each
        return list(rows), list(columns), cells

    def others(self) -> list[Measurement]:
        """The measurements that no table shows."""
        shown = {each.key for table in self.tables for each in self.table(table)[2].values()}
        return [each for each in self.measurements if each.key not in shown]

    def json(self) -> dict[str, Any]:
        """As strict JSON: what `load` reads, and beside it what a reader would otherwise have to compute."""
        plain = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        checks = [
            dataclasses.asdict(check)
            | {
                "verdict": check.verdict,
                "findings": [
                    dataclasses.asdict(finding) | {"mean": finding.mean, "stderr": finding.stderr}
                    for finding in check.findings
                ],
            }
            for check in self.checks
        ]
        measurements = [
            dataclasses.asdict(each) | {"mean": each.mean, "deviation": each.deviation, "n": len(each.values)}
            for each in self.measurements
        ]
        tables = [dataclasses.asdict(table) for table in self.tables]
        derived = {"checks": checks, "tables": tables, "measurements": measurements}
        return {"schema": SCHEMA, "verdict": str(self.verdict)} | plain_json(plain | derived)

    def write(self, folder: pathlib.Path) -> pathlib.Path:
        """Writes <folder>/<slug>.json in one step; returns its path."""
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{self.slug}.json"
        results.write_atomic(path, json.dumps(self.json(), indent=1, ensure_ascii=False, allow_nan=False) + "\n")
        return path


def judged(record: Record, claim: Claim) -> Record:
    """The record with words, tables and checks of its claim as that stands now; what was measured stays.

    Raises EvaluationError if the claim has a new version, which these measurements are not of.
    """
    if record.version != claim.version:
        raise EvaluationError(
            f"claim {claim.slug} was measured at version {record.version} and is now at {claim.version}: "
            f"measure it again with {record.command}"
        )
    return dataclasses.replace(
        record,
        title=claim.title,
        paper=claim.paper,
        says=claim.says,
        setting=claim.setting,
        tables=tuple(claim.tables),
        checks=tuple(check.decide(record.measured) for check in claim.checks),
    )


def load(path: pathlib.Path) -> Record:
    """The record in a file; EvaluationError, naming the file, if it is damaged or of another schema."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        schema = content.pop("schema")
    except (ValueError, KeyError, AttributeError) as error:
        raise EvaluationError(f"{path} is no record of a claim ({error!r}): restore it, or measure again") from error
    if schema != SCHEMA:
        raise EvaluationError(f"{path} has schema {schema}, this code reads {SCHEMA}: measure the claim again")
    try:
        return _decode(content)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise EvaluationError(f"{path} is damaged ({error!r}): restore it, or measure the claim again") from error


def load_all(folder: pathlib.Path = FOLDER) -> list[Record]:
    """The records in a folder, by slug; none if there is no folder."""
    return [load(path) for path in sorted(folder.glob("*.json"))]


def plain_json(value: Any) -> Any:
    """Strict JSON that keeps every number: those that are not finite become texts, which `float` reads."""
    if isinstance(value, Mapping):
        return {str(key): plain_json(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [plain_json(each) for each in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value


def _decode(content: dict[str, Any]) -> Record:
    names = [field.name for field in dataclasses.fields(Record)]
    checks = [
        CheckResult(
            *(check[name] for name in ("name", "sentence", "source", "rule")),
            tuple(
                Finding(each["statement"], _floats(each["margins"]), int(each["agreeing"]), Verdict(each["verdict"]))
                for each in check["findings"]
            ),
        )
        for check in content["checks"]
    ]
    measurements = [
        Measurement(each["name"], each["unit"], each["keys"], _floats(each["values"]))
        for each in content["measurements"]
    ]
    derived = {
        "checks": tuple(checks),
        "measurements": tuple(measurements),
        "tables": tuple(Table(**{**each, "measures": _frozen(each["measures"])}) for each in content["tables"]),
        "seeds": tuple(map(int, content["seeds"])),
        "parameters": {name: _frozen(each) for name, each in content["parameters"].items()},
        "changed": {name: _frozen(each) for name, each in content["changed"].items()},
        "runs": tuple(content["runs"]),
        "commits": tuple(map(str, content["commits"])),
    }
    return Record(**{name: derived.get(name, content[name]) for name in names})


def _floats(values: Sequence[Any]) -> tuple[float, ...]:
    return tuple(map(float, values))


def _frozen(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value
