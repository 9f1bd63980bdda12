"""What eval.py does with claims: list them, measure one, and bring what is recorded up to date."""

import pathlib
import signal
from collections.abc import Callable, Mapping
from typing import Any

import ml_collections
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from evaluation import claims, results
from evaluation.claims import drawing, page, record, running
from evaluation.claims.contract import Claim, Convert, Trained
from evaluation.claims.record import Record
from evaluation.claims.watch import Watch
from evaluation.contract import EvaluationError


class Stopped(Exception):
    """A run was told to stop, by a signal, and is saved."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.status = 130 if number == signal.SIGINT else 0


def measure(
    slug: str,
    given: Mapping[str, Mapping[str, Any]],
    train: Callable[[ml_collections.ConfigDict], Trained],
    *,
    convert: Convert | None = None,
    smoke: bool = False,
    output: str = "",
) -> int:
    """Measures a claim, shows its verdict, and writes <slug>.json and <slug>.svg; the exit status.

    `given` has parameters by slug; `convert` is for claims that start runs from converted ones. Without `output`, what
    the claim's own parameters gave is recorded in claims/ and docs/claims.md is made anew, and anything else stays
    under runs/. A verdict is no failure: the status is 0.
    """
    claim = claims.get(slug)
    stray = sorted(given.keys() - {slug})
    if stray:
        raise EvaluationError(f"parameters were given for {stray[0]!r}; the claim to measure is {slug}")
    parameters = claim.parameters(given.get(slug, {}), smoke=smoke)
    own = parameters == dict(claim.defaults)
    folder = pathlib.Path(output) if output else record.FOLDER if own else running.HOME
    watch = Watch()
    try:
        found, kept = running.measure(claim, parameters, train, watch, convert)
    except (KeyboardInterrupt, Stopped) as error:
        watch.say(f"stopped; the same command goes on with the seeds kept under {running.HOME / slug}")
        return error.status if isinstance(error, Stopped) else 130
    path = found.write(folder)
    _draw(found, claim, folder)
    kept.forget()
    _show(found)
    watch.say(f"written: {path}, {path.with_suffix('.svg')}")
    if folder == record.FOLDER:
        _write_page()
        watch.say(f"written: {page.PATH}")
    elif not output:
        watch.say(f"not recorded, because these are not the claim's own parameters (--output={record.FOLDER} does)")
    return 0


def refresh(*, check: bool = False, draw: bool = False) -> int:
    """Judges what is recorded by the claims as they stand now, and writes docs/claims.md; nothing is measured.

    Pictures are drawn where a record changed, where there is none, and with `draw`. `check` writes nothing, and the
    status says whether anything would change.
    """
    watch, changed, outdated = Watch(), [], False
    for before in record.load_all():
        if before.slug not in claims.names():
            raise EvaluationError(f"{record.FOLDER}/{before.slug}.json is of a claim that there is not: remove it")
        claim, now = claims.get(before.slug), before
        try:
            now = record.judged(before, claim)
        except EvaluationError as error:  # Of another version: it stays as it was until it is measured again.
            watch.say(f"out of date: {error}")
            outdated = True
        picture, rewritten = record.FOLDER / f"{before.slug}.svg", now.json() != before.json()
        redrawn = rewritten or not picture.is_file() or (draw and not check)
        changed += [f"{record.FOLDER}/{before.slug}.json"] * rewritten + [str(picture)] * redrawn
        if now.verdict is not before.verdict:
            watch.say(f"{before.slug}: {now.verdict}; it was recorded as: {before.verdict}")
        if rewritten and not check:
            now.write(record.FOLDER)
        if redrawn and not check:
            _draw(now, claim, record.FOLDER)
    if page.stale():
        changed.append(str(page.PATH))
    if not check:
        _write_page()
    for each in changed:
        watch.say(f"{'not up to date' if check else 'written'}: {each}")
    return int(check and (outdated or bool(changed)))


def listing(console: Console) -> None:
    """Every claim: its title and paper, its parameters, and what was recorded of it."""
    for slug in claims.names():
        claim = claims.get(slug)
        paper = f" (arXiv {claim.paper})" if claim.paper else ""
        path = record.FOLDER / f"{slug}.json"
        verdict = str(record.load(path).verdict) if path.is_file() else "not measured"
        shown = ", ".join(f"{name}={value}" for name, value in claim.defaults.items())
        console.print(f"[bold]{slug:<18}[/bold]{escape(claim.title + paper)}: {verdict}")
        console.print(f"{'':<18}[dim]{escape(shown)}[/dim]")
    if not claims.names():
        console.print("no claims")


def _show(found: Record) -> None:
    table = Table(box=box.SIMPLE_HEAD, title=f"{found.title}: {found.verdict}", title_justify="left", pad_edge=False)
    for heading in ("Check", "Comparison", "Margin", "Verdict"):
        table.add_column(heading)
    for check in found.checks:
        for place, finding in enumerate(check.findings):
            head = check.name if place == 0 else ""
            table.add_row(head, escape(finding.statement), page.differences(finding), str(finding.verdict))
    Console(highlight=False).print(table)


def _draw(found: Record, claim: Claim, folder: pathlib.Path) -> None:
    figure = (claim.draw or drawing.points)(found)
    results.write_atomic(folder / f"{found.slug}.svg", drawing.standalone(figure, f"{found.title}: {found.verdict}"))


def _write_page() -> None:
    page.PATH.parent.mkdir(parents=True, exist_ok=True)
    results.write_atomic(page.PATH, page.render(record.load_all()))
