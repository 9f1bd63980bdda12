"""Block sizes found by measurement: one small JSON file per kind of device in `kernels/tuned/`.

`benchmarks/tune_kernels.py` writes the files; where there is none, kernels go by their own heuristics. A file holds,
for each op and implementation, records of a case (type, widths, lengths) and the settings that were fastest for it.
"""

import functools
import json
import math
import pathlib
import re
from typing import Any

from kernels.platform import device_kind

FOLDER = pathlib.Path(__file__).parent / "tuned"
# Facts of a case that must agree; the others (lengths) may differ, and the nearest record is taken.
EXACT = ("dtype", "width", "value_width", "kind")


def lookup(op: str, implementation: str, **facts: Any) -> dict[str, Any] | None:
    """The settings recorded for the nearest case on this kind of device, or None.

    Records whose exact facts differ do not count, nor do those of lengths more than four times as long or short.
    """
    records = _records(device_kind()).get(op, {}).get(implementation, [])
    near = [(_distance(record["case"], facts), n) for n, record in enumerate(records)]
    distance, n = min(near, default=(math.inf, 0))
    return records[n]["settings"] if distance <= 2 else None


def path(kind: str) -> pathlib.Path:
    """The file of a kind of device: "NVIDIA H200" is nvidia_h200.json."""
    return FOLDER / (re.sub(r"[^a-z0-9]+", "_", kind.lower()).strip("_") + ".json")


def record(kind: str, op: str, implementation: str, case: dict[str, Any], entry: dict[str, Any]) -> pathlib.Path:
    """Writes one result, in place of an older one of the same case; the file is replaced whole or not at all."""
    file = path(kind)
    results: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {"device": kind}
    records = results.setdefault(op, {}).setdefault(implementation, [])
    records[:] = [old for old in records if old["case"] != case] + [{"case": case, **entry}]
    records.sort(key=lambda record: json.dumps(record["case"], sort_keys=True))
    file.parent.mkdir(exist_ok=True)
    temporary = file.with_suffix(".json.new")
    temporary.write_text(json.dumps(results, indent=1) + "\n")
    temporary.replace(file)
    _records.cache_clear()
    return file


@functools.cache
def _records(kind: str) -> dict[str, Any]:
    file = path(kind) if kind else None
    return json.loads(file.read_text()) if file and file.exists() else {}


def _distance(case: dict[str, Any], facts: dict[str, Any]) -> float:
    """Zero for the same case; a factor of two in a length is 1; infinite where an exact fact differs."""
    if any(case.get(name) != facts.get(name) for name in EXACT):
        return math.inf
    lengths = [name for name in case if name not in EXACT]
    if any(name not in facts for name in lengths):
        return math.inf
    return max((abs(math.log2(max(facts[name], 1) / max(case[name], 1))) for name in lengths), default=0.0)
