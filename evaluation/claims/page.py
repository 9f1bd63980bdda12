"""docs/claims.md, made from records alone: equal records give equal text."""

import math
import pathlib
from collections.abc import Iterable, Sequence

from evaluation.claims import record
from evaluation.claims.checks import CheckResult, Finding, Verdict
from evaluation.claims.contract import Table
from evaluation.claims.record import Measurement, Record

PATH = pathlib.Path("docs/claims.md")

_HEAD = """\
# Claims

What published systems claim, tried here by small experiments: `python eval.py --claim=SLUG` repeats one of them. Every
check follows from what the paper says, not from what came out. Its verdict is computed: it **holds**, it **does not
hold**, or the seeds cannot tell and it is **within noise**. A claim holds if all of its checks do. What does not hold
here, at this size, may hold in the paper's setting, and the other way round. Behind a margin, ± is the standard error
of its mean over seeds; behind a measured number, the standard deviation over seeds.

`python eval.py claims` makes this page from the records beside it; nothing in it is typed by hand.
"""
_EMPTY = "\nNo claim has been measured yet. `python eval.py ls claims` lists those that can be.\n"


def render(records: Sequence[Record]) -> str:
    """The page."""
    if not records:
        return _HEAD + _EMPTY
    ordered = sorted(records, key=lambda each: each.slug)
    lines = ["| claim | paper | verdict | checks |", "| --- | --- | --- | --- |"]
    for each in ordered:
        title = f"[{_cell(each.title)}](#{each.slug})"
        lines.append(f"| {title} | {_paper(each)} | **{each.verdict}** | {tally(each.checks)} |")
    return "\n".join([_HEAD, *lines, "", "\n".join(_section(each) for each in ordered)])


def tally(checks: Sequence[CheckResult]) -> str:
    """`3 hold, 1 does not hold`."""
    counts = {verdict: sum(check.verdict is verdict for check in checks) for verdict in Verdict}
    words = {Verdict.HOLDS: ("holds", "hold"), Verdict.FAILS: ("does not hold", "do not hold")}
    shown = [f"{n} {words.get(verdict, (verdict, verdict))[n > 1]}" for verdict, n in counts.items() if n]
    return ", ".join(shown) or "none"


def differences(finding: Finding) -> str:
    """The margin of a comparison: `by 0.231 ± 0.020, 3 of 3 seeds`."""
    error = finding.stderr
    spread = f" ± {shown(error, _decimals(error))}" if error is not None and math.isfinite(error) else ""
    decimals = _decimals(error if error and math.isfinite(error) else finding.mean)
    seeds = len(finding.margins)
    return f"by {shown(finding.mean, decimals)}{spread}, {finding.agreeing} of {seeds} seed{'s' * (seeds > 1)}"


def shown(value: float, decimals: int) -> str:
    """A number with so many decimals, or three digits where that would be too long or nothing."""
    if not math.isfinite(value):
        return "not a number" if math.isnan(value) else "∞" if value > 0 else "−∞"
    plain = f"{value:,.{decimals}f}"
    too_small = value and abs(value) < 0.5 * 10**-decimals
    text = f"{value:.3g}" if too_small or abs(value) >= 1e12 else plain
    return f"−{text[1:]}" if text.startswith("-") else text


def _section(each: Record) -> str:
    parts = [f'<a id="{each.slug}"></a>', "", f"## {each.title}", ""]
    parts += [f"The paper ({_paper(each)}) says: {each.says}", "", f"Here: {each.setting}", ""]
    parts += [f"**Verdict: {each.verdict}** ({tally(each.checks)}).", ""]
    for check in each.checks:
        parts.append(f"- **{check.verdict}**: {check.name}. {check.sentence} ({check.source}; {check.rule})")
        parts += [f"  - `{finding.statement}`: {finding.verdict}, {differences(finding)}" for finding in check.findings]
    for table in each.tables:
        parts += ["", *_table(each, table)]
    others = each.others()
    if others:
        parts += ["", "| other measurements | |", "| --- | ---: |"]
        parts += [f"| {_cell(str(other.key))} | {_value(other, 3)} |" for other in others]
    parts += ["", f"![{each.title}](../claims/{each.slug}.svg)", "", f"    {each.command}", ""]
    if each.changed:
        own = ", ".join(f"{name} = {_text(value)}" for name, value in sorted(each.changed.items()))
        parts += [f"These are not the claim's own parameters, which are {own}.", ""]
    parts += [_circumstances(each), ""]
    return "\n".join(parts)


def _table(each: Record, table: Table) -> list[str]:
    rows, columns, cells = each.table(table)
    heads = [_cell(column) for column in columns]
    lines = [f"{table.title}:", "", f"| {' | '.join([table.rows, *heads])} |"]
    lines.append(f"| --- |{' ---: |' * len(columns)}")
    for row in rows:
        found = (cells.get((row, column)) for column in columns)
        values = (_value(cell, table.decimals) if cell is not None else "–" for cell in found)
        lines.append(f"| {' | '.join([_cell(row), *values])} |")
    return lines


def _value(each: Measurement, decimals: int) -> str:
    deviation = each.deviation
    spread = f" ± {shown(deviation, decimals)}" if deviation else ""
    counts = all(value.is_integer() for value in each.values)
    return f"{shown(each.mean, 0 if counts and not spread else decimals)}{spread}{f' {each.unit}' if each.unit else ''}"


def _circumstances(each: Record) -> str:
    described = each.environment
    device = str(described.get("device_kind"))
    if described.get("devices", 1) > 1:
        device += f" × {described['devices']}"
    if described.get("platform") == "cpu":
        device += f" ({described.get('cpu_cores')} cores)"
    trained = len(each.runs)
    before = sum(bool(run["reused"]) for run in each.runs)
    runs = f", {trained} runs trained" + f" ({before} of them before)" * bool(before) if trained else ""
    versions = f"jax {described.get('jax')}, flax {described.get('flax')}, Python {described.get('python')}"
    parts = [
        f"Seed{'s' * (len(each.seeds) > 1)} {', '.join(map(str, each.seeds))}{runs}",
        f"on {device}, with {versions}",
        f"{each.date[:10]}, {_minutes(each.seconds)}{_commits(each.commits)}",
        f"every number: [{each.slug}.json](../claims/{each.slug}.json).",
    ]
    return "; ".join(parts)


def _commits(commits: Iterable[str]) -> str:
    names = ", ".join(f"`{commit}`" for commit in commits)
    return f", at {names}" if names else ""


def _minutes(seconds: float) -> str:
    return f"{seconds / 60:.0f} minutes" if seconds >= 100 else f"{seconds:.0f} seconds"


def _paper(each: Record) -> str:
    return f"[{each.paper}](https://arxiv.org/abs/{each.paper})" if each.paper else "not on arXiv"


def _decimals(value: float) -> int:
    """So many that two digits of `value` are shown."""
    return 3 if value == 0 or not math.isfinite(value) else max(0, 1 - math.floor(math.log10(abs(value))))


def _text(value: object) -> str:
    return ", ".join(map(str, value)) if isinstance(value, tuple) else str(value)


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def stale(folder: pathlib.Path = record.FOLDER, path: pathlib.Path = PATH) -> bool:
    """Whether the page in `path` is not that of the records in `folder`."""
    return not path.is_file() or path.read_text(encoding="utf-8") != render(record.load_all(folder))
