"""One self-contained HTML page about one run or many: quality, speed and cost side by side, samples, differences.

evaluation.report.write(["runs/gqa", "runs/mla"], "report.html")
"""

import dataclasses
import datetime
import math
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from configs import fields
from evaluation import plots, results, runs
from evaluation.contract import Grid
from evaluation.page import Html, dot, element, facts, figure, image, page, section, table, text
from evaluation.runs import Run

_PLAIN = ("name", "run_dir")  # Fields that always differ and say nothing.
_SHOWN_SAMPLES = 6


@dataclasses.dataclass(frozen=True)
class Cost:
    """What a run's model costs; None where it cannot be told."""

    parameters: float | None = None
    training_flops: float | None = None
    forward_flops: float | None = None
    cache_bytes: float | None = None
    throughput: float | None = None


def write(folders: Sequence[str | pathlib.Path], path: str | pathlib.Path, *, command: str = "") -> pathlib.Path:
    """Writes the report of the runs in `folders`, in that order, to `path`; returns the path.

    The first run is the one the others are compared with. Raises EvaluationError for a folder that is no run.
    """
    path = pathlib.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    results.write_atomic(path, render(runs.read(folders), command=command))
    return path


def render(found: Sequence[Run], *, command: str = "") -> str:
    """The page as text."""
    costs = [cost(run) for run in found]
    parts = [
        _header(found),
        _summary(found, costs),
        _curves(found),
        _quality(found, costs),
        _tradeoff(found, costs),
        _visibility(found),
        _tasks(found),
        _samples(found),
        _differences(found),
        _reproduce(found, command),
    ]
    return page(f"{_title(found)} · Tessera", *(part for part in parts if part))


def cost(run: Run) -> Cost:
    """Parameters, FLOPs and cache by the model's own account, and the measured tokens per second."""
    import models

    speed = run.series("tokens_per_second")[1]
    speed = speed[len(speed) // 5 :]  # The first fifth holds compilation.
    throughput = float(np.median(speed)) if len(speed) else None
    vocabulary = _vocabulary(run)
    if vocabulary is None:
        return Cost(parameters=run.described.get("parameters"), throughput=throughput)
    account = models.account(run.config.model, vocabulary, length=run.config.data.length)
    return Cost(
        parameters=account.parameters,
        training_flops=account.training_flops_per_token,
        forward_flops=account.forward_flops_per_token,
        cache_bytes=account.cache_bytes_per_token,
        throughput=throughput,
    )


def _vocabulary(run: Run) -> int | None:
    if run.config.model.vocab_size:
        return run.config.model.vocab_size
    if run.described.get("vocab_size"):
        return run.described["vocab_size"]
    if (run.folder / "tokenizer").exists():
        import data

        return data.load_tokenizer(str(run.folder / "tokenizer")).vocab_size
    return None


def _title(found: Sequence[Run]) -> str:
    return found[0].name if len(found) == 1 else f"{len(found)} runs compared"


def _header(found: Sequence[Run]) -> Html:
    described = next((run.described for run in found if run.described), {})
    corpora = {run.described.get("corpus", {}).get("hash") for run in found} - {None}
    pairs: list[tuple[str, object]] = []
    if described:
        count = described.get("devices", 1)
        device = f"{described.get('device_kind', '?')}{f' × {count}' if count > 1 else ''}"
        cores = described.get("cpu_cores")
        pairs.append(("Device", f"{device}, {cores} cores" if described.get("platform") == "cpu" and cores else device))
        pairs.append(
            ("Software", f"jax {described.get('jax')}, flax {described.get('flax')}, Python {described.get('python')}")
        )
    if len(corpora) == 1:
        corpus = next(run.described["corpus"] for run in found if run.described.get("corpus"))
        pairs.append(("Corpus", f"{corpus['files']:,} files, {_bytes(corpus['bytes'])}, sha256 {corpus['hash'][:12]}"))
    elif corpora:
        pairs.append(("Corpus", f"differs between runs: {', '.join(sorted(hash_[:8] for hash_ in corpora))}"))
    steps = sorted({run.config.train.steps for run in found})
    tokens = sorted({run.config.train.steps * run.config.data.batch_size * run.config.data.length for run in found})
    pairs.append(("Training", f"{_span(steps)} steps, {_span(tokens, _count)} tokens"))
    pairs.append(("Seeds", ", ".join(map(str, sorted({run.config.seed for run in found})))))
    return element(
        "header",
        element("p", "Tessera", kind="mark"),
        element("h1", _title(found)),
        element("p", _headline(found), kind="lead"),
        facts(pairs),
    )


def _headline(found: Sequence[Run]) -> str:
    """The finding in a sentence or two, no stronger than its errors."""
    scored = [(run, run.metric("heldout", "bits_per_byte")) for run in found]
    scored = [(run, value) for run, value in scored if value is not None]
    if not scored:
        return "Held-out text has not been evaluated yet."
    best, (value, error) = min(scored, key=lambda item: item[1][0])
    shown = f"{value:.3f}{_interval(error)} bits per byte"
    if len(scored) == 1:
        return f"{best.name} reaches {shown} on held-out text."
    rest = sorted((item for item in scored if item[0] is not best), key=lambda item: item[1][0])
    second = rest[0][0]
    gap = results.compare([best.evaluation, second.evaluation], "heldout")[0]
    sentence = f"{best.name} is lowest on held-out text with {shown}"
    if gap is None or gap.stderr is None:
        return f"{sentence}, before {second.name} with {rest[0][1][0]:.3f}."
    clear = gap.p_value is not None and gap.p_value < 0.05 / max(1, len(scored) - 1)
    verdict = f"{gap.value:.3f}{_interval(gap.stderr)} below {second.name} on the same documents"
    if clear:
        return f"{sentence}, {verdict}."
    return f"{sentence}, but the next, {second.name}, is not distinguishable: {verdict}."


def _summary(found: Sequence[Run], costs: Sequence[Cost]) -> Html:
    compared = len(found) > 1
    differences = results.compare([run.evaluation for run in found], "heldout") if compared else []
    header = ["Run", "Attention", "Parameters", "Held-out bits / byte"]
    header += [f"Δ to {found[0].name}"] if compared else []
    header += ["Tokens / s", "Training FLOPs / token", "Cache bytes / token", "Steps"]
    rows, values = [], []
    for index, (run, price) in enumerate(zip(found, costs, strict=True)):
        metric = run.metric("heldout", "bits_per_byte")
        values.append(metric[0] if metric else math.inf)
        row = [
            Html(f"{dot(index)}{text(run.name)}"),
            run.config.model.attention.get("layer", ""),
            _count(price.parameters),
            _with_error(metric),
        ]
        if compared:
            difference = differences[index - 1] if index else None
            row.append(
                ""
                if not index
                else "–"
                if difference is None
                else _with_error((difference.value, difference.stderr), signed=True)
            )
        row += [
            _count(price.throughput),
            _count(price.training_flops),
            _count(price.cache_bytes),
            run.metrics[-1]["step"] if run.metrics else "–",
        ]
        rows.append(row)
    best = [(int(np.argmin(values)), 3)] if compared and min(values) < math.inf else []
    note = "± is one standard error over held-out documents."
    if compared:
        note += " Δ is paired, document by document: what documents have in common cancels, so its error is smaller."
    return section("At a glance", table(header, rows, left=2, best=best), note=note)


def _curves(found: Sequence[Run]) -> Html:
    loss = {run.name: run.series("loss") for run in found}
    drawn = {name: series for name, series in loss.items() if len(series[0])}
    if not drawn:
        return Html("")
    named = {run.name: run.series("loss") for run in found}
    picture = plots.svg(plots.curves(named, ylabel="training loss, nats per token"), "training loss by step")
    held = {run.name: run.series("eval/heldout/bits_per_byte") for run in found}
    if any(len(steps) > 2 for steps, _ in held.values()):
        second = plots.curves(held, ylabel="held-out bits per byte", smooth=False)
        return section("Learning", figure(picture), figure(plots.svg(second, "held-out bits per byte by step")))
    return section("Learning", figure(picture))


def _quality(found: Sequence[Run], costs: Sequence[Cost]) -> Html:
    scored = [(run, run.metric("heldout", "bits_per_byte")) for run in found]
    known = [(run.name, *metric) for run, metric in scored if metric is not None]
    children = []
    order = {run.name: index for index, run in enumerate(found)}
    if known:
        names, values, errors = zip(*known, strict=True)
        drawn = plots.bars(
            names,
            values,
            errors,
            xlabel="bits per byte, 95 % interval over documents",
            series=[order[n] for n in names],
        )
        children.append(
            element("div", element("h3", "Held-out bits per byte"), figure(plots.svg(drawn, "held-out bits per byte")))
        )
    fast = [(run.name, price.throughput) for run, price in zip(found, costs, strict=True) if price.throughput]
    if fast:
        names, values = zip(*fast, strict=True)
        drawn = plots.bars(
            names,
            values,
            [None] * len(names),
            xlabel="tokens per second, median",
            zero=True,
            series=[order[n] for n in names],
        )
        children.append(
            element("div", element("h3", "Training throughput"), figure(plots.svg(drawn, "tokens per second")))
        )
    return section("Quality and speed", element("div", *children, kind="columns")) if children else Html("")


def _tradeoff(found: Sequence[Run], costs: Sequence[Cost]) -> Html:
    axes = (
        ("training_flops", "training FLOPs per token"),
        ("cache_bytes", "cache bytes per token"),
        ("throughput", "training tokens per second"),
    )
    pictures = []
    for key, label in axes:
        points = {}
        for run, price in zip(found, costs, strict=True):
            metric, x = run.metric("heldout", "bits_per_byte"), getattr(price, key)
            points[run.name] = None if metric is None or x is None else (x, *metric)
        if sum(point is not None for point in points.values()) > 1:
            pictures.append(
                figure(
                    plots.svg(
                        plots.scatter(points, xlabel=label, ylabel="held-out bits per byte"), f"quality against {label}"
                    )
                )
            )
    if not pictures:
        return Html("")
    key = element(
        "div", *(element("span", Html(f"{dot(i)}{text(run.name)}")) for i, run in enumerate(found)), kind="key"
    )
    note = "Lower is better on the vertical axis; bars are 95 % intervals of each run by itself."
    return section("Quality against cost", key, element("div", *pictures, kind="columns"), note=note)


def _visibility(found: Sequence[Run]) -> Html:
    from evaluation import visibility

    cards, seen = [], {}
    for index, run in enumerate(found):
        key = str(fields.plain(run.config.model.attention)) + str(run.config.model.per_layer)
        if key in seen:
            continue
        seen[key] = run.name
        for view in visibility.views(run.config.model, run.config.data.length):
            side = len(view.strength)
            picture = image(
                plots.data_url(plots.mask(view.strength, index)), f"what each of {side} tokens sees in {run.name}"
            )
            which = "every layer" if len(view.layers) == run.config.model.depth else f"layers {_ranges(view.layers)}"
            if view.measured:
                said = f"{which}; influence, layer {view.layers[0]}, {side} tokens"
            else:
                said = f"{which}; {view.strength.mean():.0%} of {side} × {side} pairs"
            caption = element("figcaption", Html(f"{dot(index)}<b>{text(run.name)}</b><br>{text(said)}"))
            cards.append(element("figure", element("div", picture, kind="mask"), caption))
    note = (
        "Rows are queries from top to bottom, columns the tokens they may look at. A layer without a mask is measured: "
        "how strongly each earlier token moves the output at random weights, relative to the strongest in its row."
    )
    return section("What a token sees", element("div", *cards, kind="small"), note=note) if cards else Html("")


def _tasks(found: Sequence[Run]) -> Html:
    names = sorted(
        {
            (task, key.removesuffix(",none"))
            for run in found
            for task, entry in run.evaluation.get("results", {}).items()
            for key in entry
            if key.endswith(",none") and "_stderr" not in key
        }
    )
    names = [(task, key) for task, key in names if not (task == "heldout" and key == "bits_per_byte")]
    if not names:
        return Html("")
    rows = [[task, key, *(_with_error(run.metric(task, key)) for run in found)] for task, key in names]
    for previous, row in reversed(list(zip(rows, rows[1:], strict=False))):
        row[0] = "" if row[0] == previous[0] else row[0]
    header = ["Task", "Metric", *(Html(f"{dot(i)}{text(run.name)}") for i, run in enumerate(found))]
    pictures = []
    for run in found:
        for task, grids in run.evaluation.get("grids", {}).items():
            for grid in grids.values():
                drawn = plots.png(plots.heat_map(Grid(**grid)), scale=1.5)
                picture = element("div", image(plots.data_url(drawn), f"{task} of {run.name}"), kind="heat")
                pictures.append(figure(picture, f"{run.name}: {task}"))
    shown = [element("div", *pictures, kind="columns", style="margin-top: 22px")] if pictures else []
    return section("Tasks", table(header, rows, left=2), *shown)


def _samples(found: Sequence[Run]) -> Html:
    cards = []
    for index, run in enumerate(found):
        rows = [row for row in run.samples if "text" in row][:_SHOWN_SAMPLES]
        if not rows:
            continue
        blocks = [
            element("pre", Html(f'<span class="prompt">{text(row.get("prompt", ""))}</span>{text(_after(row))}'))
            for row in rows
        ]
        shown = blocks[:3] + (
            [element("details", element("summary", f"{len(blocks) - 3} more"), *blocks[3:])] if blocks[3:] else []
        )
        cards.append(element("div", element("h3", Html(f"{dot(index)}{text(run.name)}")), *shown))
    note = "Continuations by each model of the prompts in grey."
    return section("Samples", element("div", *cards, kind="columns narrow"), note=note) if cards else Html("")


def _after(row: Mapping[str, Any]) -> str:
    """The continuation, whether or not the sample's text repeats its prompt."""
    prompt = row.get("prompt", "")
    return row["text"].removeprefix(prompt) if prompt else row["text"]


def _differences(found: Sequence[Run]) -> Html:
    if len(found) < 2:
        return Html("")
    flat = [fields.flat(run.config) for run in found]
    rows = []
    for name in dict.fromkeys(name for config in flat for name in config):
        values = [config.get(name, "–") for config in flat]
        if name not in _PLAIN and len({str(value) for value in values}) > 1:
            rows.append([name, *(_short(value) for value in values)])
    header = ["Field", *(Html(f"{dot(i)}{text(run.name)}") for i, run in enumerate(found))]
    body = table(header, rows) if rows else element("p", "None: the runs share one config.", kind="note")
    return section("Where the configs differ", body)


def _reproduce(found: Sequence[Run], command: str) -> Html:
    rows = []
    for index, run in enumerate(found):
        described = run.described
        rows.append(
            [
                Html(f"{dot(index)}{text(run.name)}"),
                str(run.folder),
                described.get("mesh") and _mesh(described["mesh"]) or "–",
                run.config.model.compute_dtype,
                described.get("kernel", "–"),
                (described.get("weights") or "–")[:12],
                run.evaluation.get("git_hash") or "–",
            ]
        )
    body = [table(["Run", "Folder", "Mesh", "Dtype", "Kernel", "Weights", "Code"], rows, left=7)]
    if command:
        body.append(element("pre", command))
    for run in found:
        plain = "\n".join(f"{name} = {_short(value, 200)}" for name, value in fields.flat(run.config).items())
        body.append(element("details", element("summary", f"Config of {run.name}"), element("pre", plain)))
    notes = [note for run in found for note in run.notes]
    if notes:
        body.append(element("h3", "Could not be read"))
        body.append(element("pre", "\n".join(notes)))
    when = datetime.datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z")
    body.append(element("footer", f"Written {when}."))
    return section("To repeat this", *body)


def _with_error(metric: tuple[float, float | None] | None, signed: bool = False) -> Html | str:
    if metric is None:
        return "–"
    value, error = metric
    shown = f"{value:+.3f}".replace("-", "−") if signed else f"{value:.3f}" if abs(value) < 1000 else f"{value:,.0f}"
    return Html(shown) if error is None else Html(f'{shown} <span class="error">± {error:.3f}</span>')


def _interval(error: float | None) -> str:
    return "" if error is None else f" ± {error:.3f}"


def _count(value: float | None) -> str:
    """`value` with three digits and a unit: 950, 1.23 k, 45.6 M."""
    if value is None:
        return "–"
    for limit, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= limit:
            return f"{value / limit:.3g} {unit}" if abs(value) / limit < 999.5 else f"{value / limit:,.0f} {unit}"
    return f"{value:.3g}"


def _bytes(value: float) -> str:
    return f"{value / 1e6:,.1f} MB" if value >= 1e6 else f"{value / 1e3:,.1f} kB"


def _span(values: Sequence[Any], shown: Any = lambda value: f"{value:,}") -> str:
    return shown(values[0]) if len(values) == 1 else f"{shown(values[0])} to {shown(values[-1])}"


def _short(value: Any, limit: int = 60) -> str:
    line = str(value)
    return line if len(line) <= limit else line[: limit - 1] + "…"


def _mesh(shape: Mapping[str, int]) -> str:
    return " × ".join(f"{axis} {size}" for axis, size in shape.items())


def _ranges(numbers: Sequence[int]) -> str:
    """`0-2, 5` for (0, 1, 2, 5)."""
    parts: list[list[int]] = []
    for number in numbers:
        if parts and number == parts[-1][-1] + 1:
            parts[-1].append(number)
        else:
            parts.append([number])
    return ", ".join(str(part[0]) if len(part) == 1 else f"{part[0]}–{part[-1]}" for part in parts)
