"""Runs side by side on a terminal: quality, speed and cost."""

import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from rich import box
from rich.table import Table

from evaluation import report, results, runs


def table(folders: Sequence[str | pathlib.Path]) -> Table:
    """One line per run folder, in order; differences are to the first, document by document, with standard errors."""
    found = runs.read(folders)
    differences = [None, *results.compare([run.evaluation for run in found], "heldout")]
    title = f"Held-out bits per byte (lower is better), and the difference to {found[0].name}"
    shown = Table(box=box.SIMPLE_HEAD, title=title, title_justify="left", pad_edge=False)
    shown.add_column("Run", no_wrap=True)
    for name in ("Params", "Bits/byte", "Difference", "Tokens/s", "Cache B/tok."):
        shown.add_column(name, justify="right", no_wrap=True)
    for run, difference in zip(found, differences, strict=True):
        cost = report.cost(run)
        metric = run.metric("heldout", "bits_per_byte")
        shown.add_row(
            run.name,
            _count(cost.parameters),
            "–" if metric is None else _with_error(*metric),
            "" if difference is None else _with_error(difference.value, difference.stderr, sign="+"),
            _count(cost.throughput),
            _count(cost.cache_bytes),
        )
    return shown


def differences(documents: Sequence[tuple[str, Mapping[str, Any]]]) -> Table:
    """How far runs lie from the first, by task, paired by document; `documents` are (name, results JSON)."""
    first = documents[0][0]
    shown = Table(
        box=box.SIMPLE_HEAD,
        title=f"difference to {first}, paired",
        title_justify="left",
        title_style="bold",
        pad_edge=False,
    )
    for heading in ("Task", "Metric", "Run", "Difference", "", "Stderr", "p", "Units"):
        shown.add_column(heading, justify="left" if heading in ("Task", "Metric", "Run") else "right")
    for task in documents[0][1]["units"]:
        found_by_run = results.compare([document for _, document in documents], task)
        for (name, _), found in zip(documents[1:], found_by_run, strict=True):
            if found is None:
                continue
            metric = documents[0][1]["units"][task]["metric"]
            error = ("±", f"{found.stderr:.4f}", f"{found.p_value:.2g}") if found.stderr is not None else ("", "", "")
            shown.add_row(task, metric, name, f"{found.value:+.4f}", *error, str(found.n))
    return shown


def _with_error(value: float, error: float | None, sign: str = "") -> str:
    return f"{value:{sign}.3f}" + ("" if error is None else f" ± {error:.3f}")


def _count(value: float | None) -> str:
    return "–" if value is None else f"{value:,.0f}"
