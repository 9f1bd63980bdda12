"""What `models/serving_cost.py` predicts: a table, a results file and pictures. Nothing is measured; no accelerator.

    python benchmarks/serving_cost.py              a few seconds

Prints, for 32K cached tokens per request, each scheme's throughput over that of tensor-parallel MLA, each at the
largest batch that fits, and what the model says beside the speed-ups that the TPLA paper measured. Everything goes to
benchmarks/results/serving_cost.json, the pictures to docs/pictures/. `docs/serving-cost.md` reads them.
"""

import argparse
import dataclasses
import io
import json
import pathlib
import re
import sys
from typing import Any

ROOT = pathlib.Path(__file__).parents[1]
sys.path[:0] = [str(ROOT)]

from models.serving_cost import CHIPS, SHAPES, Chip, Scheme, Shape, decode_cost, max_batch, throughput  # noqa: E402

BASELINE, PAPER = Scheme("mla_tp"), Scheme("tpla", slices=2)
SCHEMES = (
    BASELINE,
    PAPER,
    Scheme("tpla", slices=2, output="scatter_heads"),
    Scheme("sequence"),
    Scheme("data_parallel"),
    Scheme("gla", slices=2),
)
SERVING = SCHEMES[:-1]  # A checkpoint of MLA cannot be served as GLA.
DEVICES, CONTEXTS, BATCHES = (2, 8), tuple(2**n for n in range(10, 18)), tuple(2**n for n in range(9))
MEASURED = {
    "deepseek-v3": 1.79,
    "kimi-k2": 1.93,
}  # arXiv 2508.15881: two H800, bfloat16, 32K, maximum batch, no experts.
SHOWN_CHIPS = ("h100", "h200", "v5p", "v6e")

COLOURS = dict(
    zip([s.name for s in SCHEMES], ("#8a93a0", "#d1603d", "#c9952b", "#2f6fb7", "#2a9d78", "#8b5fbf"), strict=True)
)
STYLE: Any = {
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 9,
    "text.color": "#1b1f24",
    "axes.edgecolor": "#c8ced6",
    "axes.labelcolor": "#4d5560",
    "xtick.labelcolor": "#4d5560",
    "ytick.labelcolor": "#4d5560",
    "grid.color": "#e4e8ec",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "svg.fonttype": "none",
    "svg.hashsalt": "tessera",
}
MARGINS = {"left": 0.06, "right": 0.99, "top": 0.91, "bottom": 0.12, "wspace": 0.06, "hspace": 0.2}
TITLES = {"deepseek-v2": "DeepSeek-V2", "deepseek-v3": "DeepSeek-V3", "kimi-k2": "Kimi-K2"} | {
    name: name.upper() if name.startswith("h") else name for name in CHIPS
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=pathlib.Path, default=ROOT / "benchmarks/results/serving_cost.json")
    parser.add_argument("--pictures", type=pathlib.Path, default=ROOT / "docs/pictures")
    options = parser.parse_args()
    results = predict()
    for line in lines(results):
        print(line)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(as_json(results))
    draw(results, options.pictures)


def predict() -> dict[str, Any]:
    """Everything that is printed or drawn, as plain numbers; the same on every machine."""
    return {
        "device": "none: predicted",
        "command": "python benchmarks/serving_cost.py",
        "chips": [dataclasses.asdict(chip) for chip in CHIPS.values()],
        "paper": [beside_the_paper(SHAPES[name], measured) for name, measured in MEASURED.items()],
        "maximum_batch": [
            at_maximum_batch(shape, chip, devices)
            for devices in DEVICES
            for shape in SHAPES.values()
            for chip in CHIPS.values()
        ],
        "fastest": [
            fastest(shape, CHIPS[chip], devices)
            for devices in DEVICES
            for shape in (SHAPES["deepseek-v3"], SHAPES["kimi-k2"])
            for chip in SHOWN_CHIPS
        ],
    }


def at_maximum_batch(shape: Shape, chip: Chip, devices: int) -> dict[str, Any]:
    """By scheme and context, the largest batch and the throughput over the baseline's at its own largest; None where
    not one request fits."""
    batches, ratios = {}, {}
    for scheme in SCHEMES:
        at = [{"devices": devices, "context": context} for context in CONTEXTS]
        batches[scheme.name] = [max_batch(shape, chip, scheme, **place) for place in at]
        ratios[scheme.name] = [
            round(throughput(shape, chip, scheme, **place) / throughput(shape, chip, BASELINE, **place), 3)
            if batch and base
            else None
            for place, batch, base in zip(at, batches[scheme.name], batches[BASELINE.name], strict=True)
        ]
    where = {"devices": devices, "model": shape.name, "chip": chip.name}
    return {**where, "contexts": CONTEXTS, "batch": batches, "throughput_ratio": ratios}


def fastest(shape: Shape, chip: Chip, devices: int) -> dict[str, Any]:
    """By context and batch, the scheme whose step is shortest of those that fit, and its speed-up over the baseline's
    step (as if that fitted)."""
    winners, speedups = [], []
    for context in CONTEXTS:
        fit = {s: max_batch(shape, chip, s, devices=devices, context=context) for s in SERVING}
        names, gains = [], []
        for batch in BATCHES:
            seconds = {
                s: decode_cost(shape, chip, s, devices=devices, batch=batch, context=context).seconds for s in SERVING
            }
            able = [s for s in SERVING if fit[s] >= batch]
            best = min(able, key=lambda s: seconds[s]) if able else None
            names.append(best and best.name)
            gains.append(best and round(seconds[BASELINE] / seconds[best], 3))
        winners.append(names)
        speedups.append(gains)
    where = {"devices": devices, "model": shape.name, "chip": chip.name}
    return {**where, "contexts": CONTEXTS, "batches": BATCHES, "fastest": winners, "speedup": speedups}


def beside_the_paper(shape: Shape, measured: float) -> dict[str, Any]:
    """Two H800 at 32K: of one attention kernel, of a layer at the baseline's batch, and at each scheme's largest."""
    chip, at = CHIPS["h800"], {"devices": 2, "context": 32768}
    scatter = SCHEMES[2]
    batch = max_batch(shape, chip, BASELINE, **at)

    def ratio(scheme: Scheme, shape: Shape = shape, chip: Chip = chip, batch: int | None = None) -> float:
        own, base = (throughput(shape, chip, s, batch=batch, **at) for s in (scheme, BASELINE))
        return round(own / base, 3)

    def kernel(scheme: Scheme, chip: Chip = chip) -> float:
        own, base = (
            decode_cost(shape, chip, s, batch=batch, **at).attention_seconds for s in (scheme, BASELINE)
        )  # fmt: skip
        return round(base / own, 3)

    mla = decode_cost(shape, chip, BASELINE, batch=batch, **at)
    slower = mla.attention_seconds + (measured / ratio(PAPER) - 1) * mla.seconds
    slow = dataclasses.replace(chip, matmul_efficiency=0.3)
    tall = dataclasses.replace(chip, row_tile=128)
    return {
        "model": shape.name,
        "measured": measured,
        "predicted": {
            "attention_kernel": kernel(PAPER),
            "layer_at_equal_batch": ratio(PAPER, batch=batch),
            "layer_at_maximum_batch": ratio(PAPER),
            "layer_at_maximum_batch_scatter_heads": ratio(scatter),
            "model_of_one_layer_at_maximum_batch": ratio(PAPER, dataclasses.replace(shape, layers=1)),
            "attention_kernel_at_30_percent_of_peak": kernel(PAPER, slow),
            "attention_kernel_in_tiles_of_128_rows": kernel(PAPER, tall),
        },
        "tb_per_second_of_mla_that_would_explain_it": round(mla.cache_bytes / slower / 1e12, 2),
        "batch": {s.name: max_batch(shape, chip, s, **at) for s in (BASELINE, PAPER, scatter)},
    }


def lines(results: dict[str, Any]) -> list[str]:
    """The table of 32K cached tokens and the comparison with the paper."""
    names, place = [s.name for s in SCHEMES], CONTEXTS.index(32768)
    text = ["throughput over mla_tp (and batch), each at its largest batch, 32,768 cached tokens per request"]
    text += [f"{'devices, chip, model':25}" + "".join(f"{name:>21}" for name in names)]
    for row in results["maximum_batch"]:
        found = [(row["throughput_ratio"][name][place], row["batch"][name][place]) for name in names]
        cells = [f"{ratio:.2f} ({batch})" if ratio else "does not fit" for ratio, batch in found]
        text += [f"{row['devices']} x {row['chip']:6}{row['model']:15}" + "".join(f"{cell:>21}" for cell in cells)]
    text += ["", "tpla-2 over mla_tp on 2 x h800 at 32,768 tokens, beside what the paper measured"]
    for row in results["paper"]:
        text += [f"{row['model']}: measured {row['measured']}"]
        text += [f"    {name.replace('_', ' '):44}{value:6.2f}" for name, value in row["predicted"].items()]
        text += [
            f"    {'TB/s of MLA that would explain it':44}{row['tb_per_second_of_mla_that_would_explain_it']:6.2f}"
        ]
    return text


def as_json(results: dict[str, Any]) -> str:
    """One line per row."""
    parts = []
    for name, value in results.items():
        rows = ",\n  ".join(json.dumps(row) for row in value) if isinstance(value, list) else ""
        parts.append(f' "{name}": ' + (f"[\n  {rows}\n ]" if rows else json.dumps(value)))
    return "{\n" + ",\n".join(parts) + "\n}\n"


def draw(results: dict[str, Any], folder: pathlib.Path, devices: tuple[int, ...] = DEVICES) -> None:
    """Two pictures per number of devices: throughput against context, and the fastest scheme by batch and context."""
    import matplotlib

    folder.mkdir(parents=True, exist_ok=True)
    with matplotlib.rc_context(STYLE):
        for count in devices:
            for name, picture in (("throughput", _throughput), ("fastest", _fastest)):
                (folder / f"serving-cost-{name}-{count}.svg").write_text(_svg(picture(results, count)))


def _svg(figure: Any) -> str:
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", facecolor="white", metadata={"Date": None, "Creator": None})
    text = re.sub(r" <metadata>.*?</metadata>\n", "", buffer.getvalue(), flags=re.DOTALL)  # It says nothing.
    text = re.sub(r' transform="rotate\(-0 [^"]*\)"', "", text)
    return re.sub(r"(\d+\.\d\d)\d+", r"\1", text)  # Hundredths of a point are enough, and half the size.


def _throughput(results: dict[str, Any], devices: int) -> Any:
    from matplotlib.figure import Figure

    rows = [row for row in results["maximum_batch"] if row["devices"] == devices and row["chip"] in SHOWN_CHIPS]
    figure = Figure(figsize=(10.4, 7.4))
    grid = figure.subplots(len(SHAPES), len(SHOWN_CHIPS), sharex=True, sharey=True, gridspec_kw=MARGINS)
    for axes, row in zip(grid.flat, rows, strict=True):
        for scheme in SCHEMES:
            ratios = [float("nan") if r is None else r for r in row["throughput_ratio"][scheme.name]]
            dashes = (0, (3, 2)) if scheme.kind == "gla" else "-"
            colour = COLOURS[scheme.name]
            axes.plot(CONTEXTS, ratios, color=colour, linestyle=dashes, label=scheme.name)
        axes.set_title(f"{TITLES[row['model']]}, {TITLES[row['chip']]}", loc="left", fontsize=9)
        axes.set_xscale("log", base=2)
        axes.set_xticks(CONTEXTS[::2], [f"{context // 1024}K" for context in CONTEXTS[::2]])
        axes.minorticks_off()
        axes.grid(True, linewidth=0.7)
        axes.set_axisbelow(True)
        axes.tick_params(length=0)
    most = max(r or 0 for row in rows for ratios in row["throughput_ratio"].values() for r in ratios)
    grid[0, 0].set_ylim(0, 1.05 * most)
    for axes in grid[-1]:
        axes.set_xlabel("cached tokens per request")
    for axes in grid[:, 0]:
        axes.set_ylabel("throughput over mla_tp")
    _legend(figure, grid.flat[0].get_legend_handles_labels())
    figure.suptitle(f"Predicted: {devices} devices, attention alone, each scheme at its own largest batch", fontsize=10)
    return figure


def _fastest(results: dict[str, Any], devices: int) -> Any:
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    panels = [row for row in results["fastest"] if row["devices"] == devices]
    names = [s.name for s in SERVING]
    figure = Figure(figsize=(13.6, 6.6))
    grid = figure.subplots(2, len(SHOWN_CHIPS), sharex=True, sharey=True, gridspec_kw=MARGINS)
    for axes, panel in zip(grid.flat, panels, strict=True):
        cells = [(i, j) for i in range(len(CONTEXTS)) for j in range(len(BATCHES))]
        for name in names:
            mine = [(i, j) for i, j in cells if panel["fastest"][i][j] == name]
            for i in {i for i, _ in mine}:
                columns = [(j, 1) for row, j in mine if row == i]
                axes.broken_barh(columns, (i, 1), color=COLOURS[name], edgecolor="white", linewidth=0.5)
        for i, j in cells:
            if panel["fastest"][i][j] not in (None, BASELINE.name):
                gain = f"{panel['speedup'][i][j]:.1f}"
                axes.text(j + 0.5, i + 0.47, gain, ha="center", va="center", fontsize=7.5, color="white")
        axes.set_title(f"{TITLES[panel['model']]}, {TITLES[panel['chip']]}", loc="left", fontsize=9)
        axes.set_xticks([j + 0.5 for j in range(len(BATCHES))], BATCHES)
        axes.set_yticks([i + 0.5 for i in range(len(CONTEXTS))], [f"{context // 1024}K" for context in CONTEXTS])
        axes.set_xlim(0, len(BATCHES))
        axes.set_ylim(0, len(CONTEXTS))
        axes.tick_params(length=0)
        axes.spines[["left", "bottom"]].set_visible(False)
    for axes in grid[-1]:
        axes.set_xlabel("requests")
    for axes in grid[:, 0]:
        axes.set_ylabel("cached tokens per request")
    _legend(figure, ([Patch(color=COLOURS[name]) for name in names], names))
    figure.suptitle(
        f"Predicted: {devices} devices, the scheme with the shortest step and its speed-up over mla_tp; "
        "white: nothing fits",
        fontsize=10,
    )
    return figure


def _legend(figure: Any, entries: tuple[list[Any], list[str]]) -> None:
    figure.legend(*entries, loc="lower center", ncols=len(entries[1]), frameon=False)


if __name__ == "__main__":
    main()
