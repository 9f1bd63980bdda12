"""One self-contained HTML page about one run or many: quality, speed and cost side by side, samples, differences.

evaluation.report.write(["runs/gqa", "runs/mla"], "report.html")
"""

import math
import pathlib
from collections.abc import Sequence

import numpy as np

from evaluation import results, runs, sections, statistics
from evaluation.compared import Compared, Cost, cost
from evaluation.page import Html, dot, element, facts, page, section, table, text
from evaluation.words import NONE, count, interval, number, size, span, with_error

__all__ = ["Cost", "cost", "render", "write"]


def write(folders: Sequence[str | pathlib.Path], path: str | pathlib.Path, *, command: str = "") -> pathlib.Path:
    """Writes the report of the runs in `folders`, in that order, to `path`; returns the path.

    The first run is the one the others are compared with. `command` is shown as the way to repeat it all. Raises
    EvaluationError for a folder that is no run.
    """
    path, content = pathlib.Path(path), render(runs.read(folders), command=command)
    path.parent.mkdir(parents=True, exist_ok=True)
    results.write_atomic(path, content)
    return path


def render(found: Sequence[runs.Run], *, command: str = "") -> str:
    """The page as text."""
    compared = Compared(found)
    parts = [
        _header(compared),
        _seeds(compared),
        _summary(compared),
        sections.learning(compared),
        sections.quality(compared),
        sections.tradeoff(compared),
        sections.visibility(compared),
        sections.tasks(compared),
        sections.samples(compared),
        sections.differences(compared),
        sections.repeat(compared, command),
    ]
    return page(f"{_title(compared)} · Tessera", *(part for part in parts if part))


def _title(compared: Compared) -> str:
    names = ", ".join(variant.name for variant in compared.variants)
    if len(names) <= 60:
        return names
    return f"{len(compared.variants)} variants compared" if compared.seeded else f"{len(compared.runs)} runs compared"


def _header(compared: Compared) -> Html:
    found = compared.runs
    described = next((run.described for run in found if run.described), {})
    corpora = {run.described["corpus"]["hash"]: run.described["corpus"] for run in found if run.described.get("corpus")}
    pairs: list[tuple[str, object]] = []
    if described:
        devices, cores = described.get("devices", 1), described.get("cpu_cores")
        device = f"{described.get('device_kind', '?')}{f' × {devices}' if devices > 1 else ''}"
        pairs.append(("Device", f"{device}, {cores} cores" if described.get("platform") == "cpu" and cores else device))
        versions = f"jax {described.get('jax')}, flax {described.get('flax')}, Python {described.get('python')}"
        pairs.append(("Software", versions))
    if len(corpora) == 1:
        (corpus,) = corpora.values()
        pairs.append(("Corpus", f"{corpus['files']:,} files, {size(corpus['bytes'])}, sha256 {corpus['hash'][:12]}"))
    elif corpora:
        pairs.append(("Corpus", f"differs between runs: {', '.join(sorted(name[:8] for name in corpora))}"))
    steps = sorted({run.config.train.steps for run in found})
    tokens = sorted({run.config.train.steps * run.config.data.batch_size * run.config.data.length for run in found})
    pairs.append(("Training", f"{span(steps)} steps, {span(tokens, count)} tokens"))
    seeds = sorted({run.config.seed for run in found})
    pairs.append(("Seeds" if len(seeds) > 1 else "Seed", ", ".join(map(str, seeds))))
    return element(
        "header",
        element("p", "Tessera", kind="mark"),
        element("h1", _title(compared)),
        element("p", _headline_over_seeds(compared) if compared.seeded else _headline(compared), kind="lead"),
        facts(pairs),
    )


def _headline(compared: Compared) -> str:
    """The finding in a sentence or two, no stronger than its errors."""
    scored = [(metric[0], index) for index in range(len(compared.runs)) if (metric := compared.heldout(index))]
    if not scored:
        return "Held-out text has not been evaluated yet."
    order = [index for _, index in sorted(scored)]
    best = compared.runs[order[0]]
    value, error = compared.heldout(order[0])
    shown = f"{number(value)}{interval(error)} bits per byte"
    if len(order) == 1:
        return f"{best.name} reaches {shown} on held-out text."
    second = compared.runs[order[1]]
    gap = results.compare([best.evaluation, second.evaluation], "heldout")[0]
    sentence = f"{best.name} is lowest on held-out text with {shown}"
    if gap is None or gap.p_value is None:
        return f"{sentence}, before {second.name} with {number(compared.heldout(order[1])[0])}."
    distance = f"{number(gap.value)}{interval(gap.stderr)} below {second.name} on the same documents"
    if gap.p_value < 0.05 / (len(order) - 1):
        return f"{sentence}, {distance}."
    return f"{sentence}, but the next is not distinguishable from it: {distance}."


def _headline_over_seeds(compared: Compared) -> str:
    scored = [(float(np.mean(values)), name, values) for name, values in _by_variant(compared).items() if values]
    if not scored:
        return "Held-out text has not been evaluated yet."
    if len(scored) == 1:
        ((_, name, values),) = scored
        shown = f"{number(scored[0][0])}{interval(statistics.mean(np.array(values))[1])} bits per byte"
        return f"{name} reaches {shown} on held-out text over {len(values)} seeds."
    (value, best, own), (other, second, theirs), *_ = sorted(scored)
    sentence = f"{best} is lowest on held-out text: {number(value)} bits per byte over {len(own)} seeds"
    gap = statistics.welch(np.array(own), np.array(theirs))
    if gap.p_value is None:
        return f"{sentence}, before {second} with {number(other)}."
    distance = f"{number(gap.value)}{interval(gap.stderr)} below {second}"
    if gap.p_value < 0.05 / (len(scored) - 1):
        return f"{sentence}, {distance}."
    return f"{sentence}, but the next is not distinguishable from it over these seeds: {distance}."


def _by_variant(compared: Compared) -> dict[str, list[float]]:
    """Held-out bits per byte of the runs of each variant that were evaluated."""
    return {
        variant.name: [metric[0] for index in variant.members if (metric := compared.heldout(index))]
        for variant in compared.variants
    }


def _seeds(compared: Compared) -> Html:
    if not compared.seeded:
        return Html("")
    rows, means, values = [], [], _by_variant(compared)
    first = values[compared.variants[0].name]
    for variant in compared.variants:
        own = values[variant.name]
        mean, error = statistics.mean(np.array(own)) if own else (math.inf, None)
        means.append(mean)
        gap = statistics.welch(np.array(first), np.array(own)) if own and first and own is not first else None
        price = compared.costs[variant.members[0]]
        rows.append(
            [
                Html(f"{dot(compared.series[variant.members[0]])}{text(variant.name)}"),
                str(len(own)),
                with_error((mean, error)) if own else NONE,
                f"{number(min(own))} to {number(max(own))}" if own else NONE,
                "" if gap is None else with_error((gap.value, gap.stderr), signed=True),
                count(price.parameters),
                count(price.cache_bytes),
            ]
        )
    header = ["Variant", "Seeds", "Held-out bits / byte", "Range", f"Δ to {compared.variants[0].name}"]
    best = [(int(np.argmin(means)), 2)] if min(means) < math.inf else []
    note = "± is one standard error over seeds: what another draw of weights and data order would change."
    return section("Over seeds", table([*header, "Parameters", "Cache bytes / token"], rows, best=best), note=note)


def _summary(compared: Compared) -> Html:
    found, several = compared.runs, len(compared.runs) > 1
    differences = results.compare([run.evaluation for run in found], "heldout") if several else []
    header = ["Run", "Attention", "Parameters", "Held-out bits / byte"]
    header += [f"Δ to {found[0].name}"] if several else []
    header += ["Tokens / s", "Training FLOPs / token", "Cache bytes / token", "Steps"]
    rows, values = [], []
    for index, (run, price) in enumerate(zip(found, compared.costs, strict=True)):
        metric = compared.heldout(index)
        values.append(metric[0] if metric else math.inf)
        row = [
            Html(f"{dot(compared.series[index])}{text(run.name)}"),
            run.config.model.attention.get("layer", ""),
            count(price.parameters),
            with_error(metric),
        ]
        if several:
            gap = differences[index - 1] if index else None
            row.append("" if not index else NONE if gap is None else with_error((gap.value, gap.stderr), signed=True))
        row += [count(price.throughput), count(price.training_flops), count(price.cache_bytes)]
        rows.append([*row, f"{run.metrics[-1]['step']:,}" if run.metrics else NONE])
    best = [(int(np.argmin(values)), 3)] if several and min(values) < math.inf else []
    note = "± is one standard error over held-out documents."
    if several:
        note += " Δ is paired, document by document: what documents have in common cancels, so its error is smaller."
    return section("Every run" if compared.seeded else "At a glance", table(header, rows, left=2, best=best), note=note)
