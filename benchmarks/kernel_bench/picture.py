"""The picture of a results file: how near each implementation comes to what the device can do at best."""

import itertools
import pathlib
from typing import Any


def draw(results: dict[str, Any], path: pathlib.Path) -> None:
    """Bars of the achieved share of the roofline, one panel per op and direction, one group per shape."""
    from matplotlib.figure import Figure

    rows = results["rows"]
    ops, directions = (list(dict.fromkeys(row[key] for row in rows)) for key in ("op", "direction"))
    names = list(dict.fromkeys(name for row in rows for name in row["rivals"]))
    colors = dict(zip(names, _colors(len(names)), strict=True))
    most = max(sum(_key(row) == (op, d) for row in rows) for op in ops for d in directions)
    figure = Figure(figsize=(len(directions) * (1.5 + 1.7 * most), 0.8 + 2.5 * len(ops)))
    figure.set_layout_engine("constrained")
    axes = figure.subplots(len(ops), len(directions), squeeze=False)
    for (i, op), (j, direction) in itertools.product(enumerate(ops), enumerate(directions)):
        axis, panel = axes[i, j], (op, direction)
        shown = [row for row in rows if _key(row) == panel]
        for n, row in enumerate(shown):
            width = 0.8 / max(len(row["rivals"]), 1)
            for place, (name, found) in enumerate(row["rivals"].items()):
                at, share = n - 0.4 + (place + 0.5) * width, 100 * found["share_of_roofline"]
                low, high = (100 * row["least_seconds"] / found[q] for q in ("upper_quartile", "lower_quartile"))
                axis.bar(
                    at, share, width * 0.92, color=colors[name], yerr=[[max(share - low, 0)], [max(high - share, 0)]]
                )
                axis.annotate(f"{share:.0f}", (at, high), ha="center", va="bottom", fontsize=7)
        if not shown:
            axis.set_axis_off()
            continue
        axis.set_xticks(range(len(shown)), [row["shape"] for row in shown], fontsize=8)
        axis.set_title(f"{panel[0]}, {panel[1]}", fontsize=10, loc="left")
        axis.set_ylabel("% of roofline")
        axis.spines[["top", "right"]].set_visible(False)
    handles = [axes[0, 0].bar(0, 0, color=colors[name], label=name) for name in names]
    figure.legend(handles=handles, loc="outside lower center", ncols=min(len(names), 4), frameon=False, fontsize=8)
    figure.suptitle(f"{results['device']}, {results['dtype']}", fontsize=10)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=140)


def _key(row: dict[str, Any]) -> tuple[str, str]:
    return row["op"], row["direction"]


def _colors(count: int) -> list[str]:
    palette = ["#3b6fb6", "#d9822b", "#5a9e6f", "#b5495b", "#7a68a6", "#8c7b6b", "#4aa3a2", "#9aa0a6", "#c3a93b"]
    return [palette[n % len(palette)] for n in range(count)]
