"""The sections of a report that are pictures, samples and configs; each is empty where there is nothing to show."""

from collections.abc import Mapping, Sequence
from typing import Any

from configs import fields
from evaluation import plots
from evaluation.compared import PLAIN, Compared
from evaluation.contract import Grid
from evaluation.page import Html, dot, element, figure, image, section, table, text
from evaluation.words import NONE, mesh, ranges, short, with_error

_SHOWN_SAMPLES = 6
_WIDE = 5  # Tables with more runs than this have a row per run instead of a column.


def learning(compared: Compared) -> Html:
    """Training loss of all runs in one plot, and held-out bits per byte by step where it was followed."""
    drawn = []
    loss = _lines(compared, "loss")
    if any(len(line.steps) for line in loss):
        curves = plots.curves(loss, ylabel="training loss, nats per token")
        drawn.append(figure(plots.svg(curves, "training loss by step")))
    held = _lines(compared, "eval/heldout/bits_per_byte")
    if any(len(line.steps) > 2 for line in held):
        curves = plots.curves(held, ylabel="held-out bits per byte", smooth=False)
        drawn.append(figure(plots.svg(curves, "held-out bits per byte by step")))
    return section("Learning", *drawn) if drawn else Html("")


def quality(compared: Compared) -> Html:
    """Held-out bits per byte with intervals, and throughput; for one run the table says it all."""
    if len(compared.runs) < 2:
        return Html("")
    children = []
    scored = [(index, *metric) for index in range(len(compared.runs)) if (metric := compared.heldout(index))]
    if scored:
        indices, values, errors = zip(*scored, strict=True)
        label = "bits per byte, 95 % interval over documents"
        children.append(_bars(compared, "Held-out bits per byte", indices, values, errors, label, zero=False))
    fast = [(index, price.throughput) for index, price in enumerate(compared.costs) if price.throughput]
    if fast:
        indices, values = zip(*fast, strict=True)
        label = "tokens per second, median"
        children.append(_bars(compared, "Training throughput", indices, values, [None] * len(values), label, zero=True))
    return section("Quality and speed", element("div", *children, kind="columns")) if children else Html("")


def tradeoff(compared: Compared) -> Html:
    """Quality against each kind of cost, for two runs or more."""
    axes = (
        ("training_flops", "training FLOPs per token"),
        ("cache_bytes", "cache bytes per token"),
        ("throughput", "training tokens per second"),
    )
    pictures = []
    for key, label in axes:
        points = []
        for index, price in enumerate(compared.costs):
            metric, amount = compared.heldout(index), getattr(price, key)
            if metric is not None and amount is not None:
                points.append((compared.series[index], amount, *metric))
        if len(points) > 1:
            drawn = plots.scatter(points, xlabel=label, ylabel="held-out bits per byte")
            pictures.append(figure(plots.svg(drawn, f"quality against {label}")))
    if not pictures:
        return Html("")
    names = (element("span", Html(f"{dot(i)}{text(v.name)}")) for i, v in enumerate(compared.variants))
    note = "Lower is better on the vertical axis; bars are 95 % intervals of each run by itself."
    return section(
        "Quality against cost", element("div", *names, kind="key"), element("div", *pictures, kind="columns"), note=note
    )


def visibility(compared: Compared) -> Html:
    """What a token sees, per kind of attention."""
    from evaluation import visibility as seen

    cards, known = [], set()
    for number, variant in enumerate(compared.variants):
        run = compared.runs[variant.members[0]]
        key = str(fields.plain(run.config.model.attention)) + str(run.config.model.per_layer)
        if key in known:
            continue
        known.add(key)
        for view in seen.views(run.config.model, run.config.data.length):
            side = len(view.strength)
            address = plots.data_url(plots.mask(view.strength, number))
            which = "every layer" if len(view.layers) == run.config.model.depth else ranges(view.layers)
            if view.measured:
                place = f" in layer {view.layers[0]}" if len(view.layers) > 1 else ""
                said = f"{which}; influence measured{place}, {side} tokens"
            else:
                said = f"{which}; {view.strength.mean():.0%} of {side} × {side} pairs"
            caption = element("figcaption", Html(f"{dot(number)}<b>{text(variant.name)}</b><br>{text(said)}"))
            picture = image(address, f"what each of {side} tokens sees in {variant.name}")
            cards.append(element("figure", element("div", picture, kind="mask"), caption))
    note = (
        "Rows are queries from top to bottom, columns the tokens they may look at. A layer without a mask is measured: "
        "how far its output moves, at random weights, when that token is exchanged, relative to the most in the row."
    )
    return section("What a token sees", element("div", *cards, kind="small"), note=note) if cards else Html("")


def tasks(compared: Compared) -> Html:
    """All metrics of all tasks, and the heat maps."""
    names = _metrics(compared)
    if not names:
        return Html("")
    if len(compared.runs) > _WIDE:
        header = ["Run", *(Html(f"{text(task)}<br>{text(key)}") for task, key in names)]
        rows = [
            [_marked(compared, index), *(with_error(run.metric(task, key)) for task, key in names)]
            for index, run in enumerate(compared.runs)
        ]
        shown = table(header, rows)
    else:
        rows = [[task, key, *(with_error(run.metric(task, key)) for run in compared.runs)] for task, key in names]
        for previous, row in reversed(list(zip(rows, rows[1:], strict=False))):
            row[0] = "" if row[0] == previous[0] else row[0]
        marked = (_marked(compared, index) for index in range(len(compared.runs)))
        shown = table(["Task", "Metric", *marked], rows, left=2)
    pictures = []
    for run in compared.runs:
        for task, grids in run.evaluation.get("grids", {}).items():
            for grid in grids.values():
                drawn = plots.data_url(plots.png(plots.heat_map(Grid(**grid)), scale=1.5))
                picture = element("div", image(drawn, f"{task} of {run.name}"), kind="heat")
                pictures.append(figure(picture, f"{run.name}: {task}"))
    maps = [element("div", *pictures, kind="columns", style="margin-top: 22px")] if pictures else []
    return section("Tasks", shown, *maps)


def samples(compared: Compared) -> Html:
    """Continuations by the first run of each variant."""
    cards = []
    for index in compared.first_of_each:
        rows = [row for row in compared.runs[index].samples if "text" in row][:_SHOWN_SAMPLES]
        if not rows:
            continue
        blocks = [
            element("pre", Html(f'<span class="prompt">{text(row.get("prompt", ""))}</span>{text(row["text"])}'))
            for row in rows
        ]
        more = [element("details", element("summary", f"{len(blocks) - 3} more"), *blocks[3:])] if blocks[3:] else []
        cards.append(element("div", element("h3", _marked(compared, index)), *blocks[:3], *more))
    note = "Continuations by each model of the prompts in grey."
    return section("Samples", element("div", *cards, kind="columns narrow"), note=note) if cards else Html("")


def differences(compared: Compared) -> Html:
    """The fields in which the configs of the variants differ."""
    if len(compared.runs) < 2:
        return Html("")
    chosen = compared.first_of_each
    flat = [fields.flat(compared.runs[index].config) for index in chosen]
    shared, partial = [], []
    for name in dict.fromkeys(name for config in flat for name in config):
        values = [config.get(name, NONE) for config in flat]
        if name not in PLAIN and len({str(value) for value in values}) > 1:
            rows = shared if all(name in config for config in flat) else partial
            rows.append([name, *(short(value) for value in values)])
    header = ["Field", *(Html(f"{dot(i)}{text(v.name)}") for i, v in enumerate(compared.variants))]
    body = [table(header, shared)] if shared else []
    if partial:
        said = f"{len(partial)} field{'s' if len(partial) > 1 else ''} that only some of them have"
        body.append(element("details", element("summary", said), table(header, partial)))
    return section("Where the configs differ", *(body or [element("p", "Nowhere but in name and seed.", kind="note")]))


def repeat(compared: Compared, command: str) -> Html:
    """Where everything lies and with what it was made."""
    rows = []
    for index, run in enumerate(compared.runs):
        described = run.described
        rows.append(
            [
                _marked(compared, index),
                str(run.folder),
                mesh(described["mesh"]) if described.get("mesh") else NONE,
                run.config.model.compute_dtype,
                described.get("kernel", NONE),
                (described.get("weights") or NONE)[:12],
                run.evaluation.get("git_hash") or NONE,
            ]
        )
    body: list[object] = [table(["Run", "Folder", "Mesh", "Dtype", "Kernel", "Weights", "Code"], rows, left=7)]
    if command:
        body.append(element("pre", command))
    for variant, index in zip(compared.variants, compared.first_of_each, strict=True):
        flat = fields.flat(compared.runs[index].config)
        plain = "\n".join(f"{name} = {short(value, 200)}" for name, value in flat.items())
        body.append(element("details", element("summary", f"Config of {variant.name}"), element("pre", plain)))
    notes = [note for run in compared.runs for note in run.notes]
    if notes:
        body += [element("h3", "Could not be read"), element("pre", "\n".join(notes))]
    return section("To repeat this", *body)


def _marked(compared: Compared, index: int) -> Html:
    return Html(f"{dot(compared.series[index])}{text(compared.runs[index].name)}")


def _lines(compared: Compared, key: str) -> list[plots.Line]:
    named = set(compared.first_of_each)
    lines = []
    for index, run in enumerate(compared.runs):
        name = compared.variants[compared.series[index]].name if index in named else ""
        lines.append(plots.Line(name, compared.series[index], *run.series(key)))
    return lines


def _bars(
    compared: Compared,
    title: str,
    indices: Sequence[int],
    values: Sequence[float],
    errors: Sequence[float | None],
    label: str,
    *,
    zero: bool,
) -> Html:
    names, series = [compared.runs[index].name for index in indices], [compared.series[index] for index in indices]
    drawn = plots.bars(names, values, errors, xlabel=label, zero=zero, series=series)
    return element("div", element("h3", title), figure(plots.svg(drawn, title)))


def _metrics(compared: Compared) -> list[tuple[str, str]]:
    """(task, metric) pairs that some run has, without the one that the summary shows."""
    found: dict[tuple[str, str], Any] = {}
    for run in compared.runs:
        results: Mapping[str, Mapping[str, Any]] = run.evaluation.get("results", {})
        for task, entry in results.items():
            for key in entry:
                if key.endswith(",none") and "_stderr" not in key:
                    found[(task, key.removesuffix(",none"))] = None
    return [pair for pair in found if pair != ("heldout", "bits_per_byte")]
