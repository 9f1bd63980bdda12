"""Pictures of runs as matplotlib figures, and figures as SVG that follows the page's light or dark colours.

Figures are drawn with stand-in colours. `svg` replaces each by a CSS variable (`var(--ink)`, `var(--series-1)`), so
that one picture serves both colour schemes. Nothing here touches pyplot, hence no global state and no display.
"""

import base64
import dataclasses
import io
import re
from collections.abc import Sequence
from typing import Any

import matplotlib
import numpy as np
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.colors import LinearSegmentedColormap, to_rgb
from matplotlib.figure import Figure
from matplotlib.image import imsave
from matplotlib.ticker import EngFormatter, MaxNLocator

from evaluation.contract import Grid

INK, SOFT, LINE, PAPER = "#1b1f24", "#6b7480", "#dfe3e8", "#ffffff"
# Eight hues apart in lightness as well, distinct under the common colour-vision deficiencies (after Okabe and Ito).
SERIES = ("#2f6fb7", "#d1603d", "#2a9d78", "#8b5fbf", "#c9952b", "#4aa8d8", "#b8476f", "#5e6b75")
_VARIABLES = {INK: "ink", SOFT: "soft", LINE: "line", PAPER: "paper"} | {
    colour: f"series-{index + 1}" for index, colour in enumerate(SERIES)
}
HEAT = LinearSegmentedColormap.from_list("tessera", ["#eef3f8", "#9cc3e4", "#3f86c4", "#1d4f8c", "#0d2a52"])
_STYLE: Any = {
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 9.5,
    "text.color": INK,
    "axes.labelcolor": SOFT,
    "axes.edgecolor": LINE,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "grid.color": LINE,
    "grid.linewidth": 0.7,
    "xtick.color": LINE,
    "ytick.color": LINE,
    "xtick.labelcolor": SOFT,
    "ytick.labelcolor": SOFT,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "svg.fonttype": "none",
    "svg.hashsalt": "tessera",
}


def svg(figure: Figure, title: str) -> str:
    """The figure as an `<svg>` element for a page, with `title` for readers who cannot see it."""
    buffer = io.StringIO()
    with matplotlib.rc_context(_STYLE):
        FigureCanvasSVG(figure).print_svg(
            buffer, metadata={"Date": None, "Creator": None, "Format": None, "Type": None}
        )
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    for colour, name in _VARIABLES.items():
        text = text.replace(colour, f"var(--{name})")
    # Attributes (unlike styles) cannot hold variables; matplotlib writes its colours into styles only.
    text = re.sub(
        r'<svg [^>]*?viewBox="([^"]+)"[^>]*>',
        r'<svg viewBox="\1" role="img" xmlns="http://www.w3.org/2000/svg" '
        r'xmlns:xlink="http://www.w3.org/1999/xlink"><title>TITLE</title>',
        text,
        count=1,
        flags=re.DOTALL,
    )
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    return text.replace("TITLE", _escape(title), 1)


def png(figure: Figure, scale: float = 2.0) -> bytes:
    """The figure as a PNG on white."""
    buffer = io.BytesIO()
    FigureCanvasAgg(figure).print_figure(buffer, format="png", dpi=96 * scale, facecolor="white")
    return buffer.getvalue()


def data_url(image: bytes) -> str:
    """A PNG as a `data:` address."""
    return "data:image/png;base64," + base64.b64encode(image).decode("ascii")


@dataclasses.dataclass(frozen=True)
class Line:
    """Values over steps, in the colour of a series; a line without a name shares that of another."""

    name: str
    series: int
    steps: Sequence[float] | np.ndarray
    values: Sequence[float] | np.ndarray


def curves(lines: Sequence[Line], *, ylabel: str, smooth: bool = True) -> Figure:
    """Lines over steps, named at their right ends; behind a smoothed line its raw one, faint."""
    figure, axes = _axes(10.4, 4.1)
    ends, lows, highs = [], [], []
    for line in lines:
        colour = colour_of(line.series)
        steps, values = np.asarray(line.steps, float), np.asarray(line.values, float)
        if not len(steps):
            continue
        shown = smoothed(values) if smooth and len(values) > 30 else values
        if shown is not values:
            axes.plot(steps, values, color=colour, linewidth=0.7, alpha=0.28)
        axes.plot(
            steps, shown, color=colour, linewidth=1.8, solid_capstyle="round", marker="o" if len(values) == 1 else None
        )
        if line.name:
            ends.append((line.name, colour, steps[-1], shown[-1]))
        good = shown[np.isfinite(shown)]
        if good.size:
            lows.append(good.min())
            highs.append(np.quantile(good[max(1, len(good) // 50) :], 0.99) if good.size > 3 else good.max())
    if lows:  # The first steps would squeeze everything else into a line.
        span = max(max(highs) - min(lows), 1e-9)
        axes.set_ylim(min(lows) - 0.06 * span, max(highs) + 0.12 * span)
    axes.set_xlabel("step")
    axes.set_ylabel(ylabel)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.margins(x=0.01)
    _name_ends(axes, ends)
    return figure


def bars(
    names: Sequence[str],
    values: Sequence[float],
    errors: Sequence[float | None],
    *,
    xlabel: str,
    zero: bool = False,
    series: Sequence[int] | None = None,
) -> Figure:
    """Horizontal points with 95 % intervals (or, with `zero`, bars from zero), one row per run, in the given order.

    `series` numbers the colours; None counts from 0.
    """
    figure, axes = _axes(5.1, 0.85 + 0.4 * len(names))
    rows = np.arange(len(names))[::-1]
    for row, value, error, index in zip(rows, values, errors, series or range(len(names)), strict=True):
        colour = colour_of(index)
        if zero:
            axes.barh(row, value, height=0.5, color=colour)
        else:
            axes.plot([value], [row], "o", color=colour, markersize=7)
        if error is not None:
            axes.errorbar(
                [value], [row], xerr=[1.96 * error], color=INK if zero else colour, capsize=3, linewidth=1.6, fmt="none"
            )
        axes.annotate(
            f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3f}",
            (value + (1.96 * error if error else 0), row),
            xytext=(8, 0),
            textcoords="offset points",
            va="center",
            color=INK,
        )
    axes.set_yticks(rows, names)
    axes.tick_params(axis="y", labelcolor=INK, length=0)
    axes.set_ylim(-0.6, len(names) - 0.4)
    axes.grid(False, axis="y")
    if zero:
        axes.set_xlim(0, 1.18 * max(values))
    else:
        reach = [(v - 2.2 * (e or 0), v + 2.2 * (e or 0)) for v, e in zip(values, errors, strict=True)]
        low, high = min(r[0] for r in reach), max(r[1] for r in reach)
        span = max(high - low, 0.02 * abs(high), 1e-9)
        axes.set_xlim(low - 0.12 * span, high + 0.22 * span)
    axes.set_xlabel(xlabel)
    axes.xaxis.set_major_locator(MaxNLocator(5))
    if zero:
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    return figure


def scatter(points: Sequence[tuple[int, float, float, float | None]], *, xlabel: str, ylabel: str) -> Figure:
    """Quality against cost: (series, cost, quality, error of the quality) per run.

    Costs that span more than a factor of three are on a logarithmic axis.
    """
    figure, axes = _axes(3.4, 2.9)
    known: list[Any] = [(colour_of(series), *point) for series, *point in points]
    for colour, x, y, error in known:
        bar = None if error is None else [1.96 * error]
        axes.errorbar([x], [y], yerr=bar, color=colour, capsize=3, fmt="o", markersize=7, linewidth=1.4)
    costs = [x for _, x, _, _ in known]
    if min(costs) > 0 and max(costs) > 3 * min(costs):
        axes.set_xscale("log")
        axes.set_xlim(min(costs) / 1.5, max(costs) * 1.5)
        axes.xaxis.set_minor_formatter("")
    else:
        span = max(max(costs) - min(costs), 0.05 * max(costs), 1e-9)
        axes.set_xlim(min(costs) - 0.2 * span, max(costs) + 0.2 * span)
        axes.xaxis.set_major_locator(MaxNLocator(4))
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    low = min(y - 1.96 * (error or 0) for _, _, y, error in known)
    high = max(y + 1.96 * (error or 0) for _, _, y, error in known)
    span = max(high - low, 1e-6)
    axes.set_ylim(low - 0.1 * span, high + 0.1 * span)
    axes.set_xlabel(xlabel)
    axes.set_ylabel(ylabel)
    return figure


def heat_map(grid: Grid) -> Figure:
    """A grid of results as a heat map, each cell with its number where there is room."""
    values = np.asarray(grid.values, float)
    rows, columns = values.shape
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(max(3.2, 1.6 + 0.52 * columns), max(1.8, 1.1 + 0.36 * rows)), layout="constrained")
        axes = figure.add_subplot()
        low, high = grid.limits or (float(np.nanmin(values)), float(np.nanmax(values)))
        image = axes.imshow(values, cmap=HEAT, vmin=low, vmax=max(high, low + 1e-9), aspect="auto")
        axes.grid(False)
        axes.set_xticks(range(columns), grid.columns)
        axes.set_yticks(range(rows), grid.rows)
        axes.tick_params(length=0)
        for spine in axes.spines.values():
            spine.set_visible(False)
        axes.set_xlabel(grid.column_name)
        axes.set_ylabel(grid.row_name)
        axes.set_title(grid.title, loc="left", fontsize=10, color=INK)
        if columns <= 16:
            for row in range(rows):
                for column in range(columns):
                    share = (values[row, column] - low) / max(high - low, 1e-9)
                    text = (
                        f"{values[row, column]:.2f}".replace("0.", ".", 1)
                        if abs(values[row, column]) < 1
                        else f"{values[row, column]:.3g}"
                    )
                    axes.text(
                        column,
                        row,
                        text,
                        ha="center",
                        va="center",
                        fontsize=8,
                        color="#fdfdfd" if share > 0.5 else "#1b1f25",
                    )
        else:
            figure.colorbar(image, ax=axes, fraction=0.04, pad=0.02).outline.set_visible(False)
    return figure


def mask(strength: Float[np.ndarray, "T S"], series: int = 0) -> bytes:
    """A PNG of who sees whom, rows the queries, in the colour of a run; the less is seen, the more transparent."""
    strength = np.clip(strength, 0.0, 1.0)
    colour = np.broadcast_to(to_rgb(colour_of(series)), (*strength.shape, 3))
    image = np.concatenate([colour, strength[..., None]], axis=-1)
    times = max(1, 384 // max(strength.shape))
    image = np.kron(image, np.ones((times, times, 1)))
    buffer = io.BytesIO()
    imsave(buffer, image, format="png")
    return buffer.getvalue()


def colour_of(index: int) -> str:
    """The colour of the run at `index`; after eight runs colours repeat."""
    return SERIES[index % len(SERIES)]


def smoothed(values: Float[np.ndarray, " n"], share: float = 0.012) -> Float[np.ndarray, " n"]:
    """Gaussian average around each point, its deviation a share of the length; centred, so that it does not lag."""
    n = len(values)
    radius = max(1, int(3 * share * n))
    kernel = np.exp(-0.5 * np.square(np.arange(-radius, radius + 1) / max(share * n, 0.5)))
    good = np.isfinite(values)
    total = np.convolve(np.pad(np.where(good, values, 0.0), radius), kernel, "valid")
    weight = np.convolve(np.pad(good.astype(float), radius), kernel, "valid")
    return np.divide(total, weight, out=np.full(n, np.nan), where=weight > 1e-12)


def _axes(width: float, height: float) -> tuple[Figure, Axes]:
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(width, height), layout="constrained")
        return figure, figure.add_subplot()


def _name_ends(axes: Axes, ends: Sequence[tuple[str, str, float, float]]) -> None:
    """Names at the right ends of lines, moved apart where they would overlap."""
    low, high = axes.get_ylim()
    step = (high - low) * 0.058
    placed: list[float] = []
    order = sorted(range(len(ends)), key=lambda index: ends[index][3])
    for index in order:
        placed.append(max(ends[index][3], placed[-1] + step) if placed else max(ends[index][3], low))
    overflow = placed[-1] - high if placed else 0.0
    for index, height in zip(order, placed, strict=True):
        name, colour, x, _ = ends[index]
        height -= max(overflow, 0.0)
        axes.annotate(
            name,
            (1.0, height),
            xycoords=("axes fraction", "data"),
            xytext=(8, 0),
            textcoords="offset points",
            color=colour,
            va="center",
            fontsize=9.5,
            annotation_clip=False,
        )


def _escape(text: str) -> str:
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
