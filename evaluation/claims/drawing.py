"""Pictures of claims: the ordinary one, axes for others, and a figure as an SVG file that stands alone."""

import dataclasses
import re

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator, NullLocator, StrMethodFormatter

from evaluation import plots
from evaluation.claims.record import Record

_COLOURS = {"ink": plots.INK, "soft": plots.SOFT, "line": plots.LINE} | {
    f"series-{index}": colour for index, colour in enumerate(plots.SERIES, 1)
}


def axes(width: float, height: float) -> tuple[Figure, Axes]:
    """A figure of so many inches with one pair of axes, in the manner of the reports."""
    figure = Figure(figsize=(width, height), layout="constrained", facecolor="none")
    return figure, styled(figure.add_subplot())


def styled(found: Axes) -> Axes:
    """Axes in the manner of the reports."""
    found.set_facecolor("none")
    found.set_axisbelow(True)
    found.grid(color=plots.LINE, linewidth=0.7)
    found.spines[["top", "right"]].set_visible(False)
    found.spines[["left", "bottom"]].set_color(plots.LINE)
    found.tick_params(color=plots.LINE, labelcolor=plots.SOFT, labelsize=9.5)
    return found


def points(record: Record) -> Figure:
    """The first table: a line of points per row, a colour per column; means with the deviation over seeds, and seeds.

    Without a table, every measurement is a row. Values that are not finite are left out.
    """
    if record.tables:
        table = record.tables[0]
        # One axis is for one measure: of a table with several, the first.
        label = table.measures if isinstance(table.measures, str) else table.measures[0]
        rows, columns, cells = record.table(dataclasses.replace(table, measures=label))
    else:
        rows, columns, label = [str(each.key) for each in record.measurements], [""], ""
        cells = {(str(each.key), ""): each for each in record.measurements}
    figure, drawn = axes(7.6, 1.1 + 0.22 * max(2, len(columns)) * len(rows))
    finite = []
    for (row, column), measurement in cells.items():
        place = columns.index(column)
        height = -rows.index(row) - (place - (len(columns) - 1) / 2) * 0.7 / len(columns)
        colour = plots.colour_of(place)
        values = [value for value in measurement.values if np.isfinite(value)]
        drawn.plot(values, [height] * len(values), "o", color=colour, markersize=3, alpha=0.4)
        if len(values) == len(measurement.values):
            drawn.errorbar(
                [measurement.mean], [height], xerr=[measurement.deviation or 0.0], color=colour, capsize=2.5, fmt="D",
                markersize=5, linewidth=1.4,
            )  # fmt: skip
        finite += values
    if finite and min(finite) > 0 and max(finite) > 10 * min(finite):
        drawn.set_xscale("log")
        drawn.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        drawn.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        drawn.xaxis.set_minor_locator(NullLocator())
    drawn.set_yticks([-float(place) for place in range(len(rows))], rows)
    drawn.tick_params(axis="y", labelcolor=plots.INK, length=0)
    drawn.set_ylim(0.5 - len(rows), 0.5)
    drawn.grid(False, axis="y")
    units = {measurement.unit for measurement in cells.values()}
    unit = units.pop() if len(units) == 1 else ""
    drawn.set_xlabel(f"{label}, {unit}" if label and unit else label or unit, color=plots.SOFT)
    if len(columns) > 1:
        handles = [Line2D([], [], marker="D", linestyle="", color=plots.colour_of(i)) for i in range(len(columns))]
        key = drawn.legend(
            handles, columns, loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False, fontsize=9.5,
            title=table.columns or None, labelcolor=plots.INK,
        )  # fmt: skip
        key.get_title().set_color(plots.SOFT)
        key.get_title().set_fontsize(9.5)
    return figure


def standalone(figure: Figure, title: str) -> str:
    """The figure as the text of an .svg file: dark on white wherever it is shown, with a size of its own."""
    text = plots.svg(figure, title)
    width, height = (float(each) for each in re.search(r'viewBox="0 0 ([\d.]+) ([\d.]+)"', text).groups())
    colours = " ".join(f"--{name}: {value};" for name, value in _COLOURS.items())
    style = f"<style>svg {{ background: {plots.PAPER}; {colours} }}</style>"
    text = text.replace("<svg ", f'<svg width="{width * 4 / 3:.0f}" height="{height * 4 / 3:.0f}" ', 1)
    return '<?xml version="1.0" encoding="utf-8"?>\n' + text.replace("</title>", f"</title>{style}", 1)
