"""Numbers as a reader wants them."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from evaluation.page import Html

NONE = "–"


def with_error(metric: tuple[float, float | None] | None, *, signed: bool = False) -> Html | str:
    """`2.113 ± 0.021`, the error in a quieter colour."""
    if metric is None:
        return NONE
    value, error = metric
    shown = number(value, signed=signed)
    return Html(shown) if error is None else Html(f'{shown} <span class="error">± {number(error)}</span>')


def number(value: float, *, signed: bool = False) -> str:
    """Three decimals below 1,000, none above; a true minus sign."""
    shown = f"{value:{'+' if signed else ''}.3f}" if abs(value) < 1000 else f"{value:{'+' if signed else ''},.0f}"
    return shown.replace("-", "−")


def interval(error: float | None) -> str:
    """` ± 0.021`, or nothing."""
    return "" if error is None else f" ± {number(error)}"


def count(value: float | None) -> str:
    """Three digits and a unit: 950, 1.23 k, 45.6 M."""
    if value is None:
        return NONE
    for limit, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= limit:
            return f"{value / limit:.3g} {unit}" if abs(value) / limit < 999.5 else f"{value / limit:,.0f} {unit}"
    return f"{value:.3g}"


def size(value: float) -> str:
    """Bytes."""
    return f"{value / 1e6:,.1f} MB" if value >= 1e6 else f"{value / 1e3:,.1f} kB"


def span(values: Sequence[Any], shown: Callable[[Any], str] = lambda value: f"{value:,}") -> str:
    """`500`, or `500 to 2,000`; `values` are sorted."""
    return shown(values[0]) if len(values) == 1 else f"{shown(values[0])} to {shown(values[-1])}"


def short(value: Any, limit: int = 60) -> str:
    """One line of at most `limit` characters."""
    line = str(value)
    return line if len(line) <= limit else line[: limit - 1] + "…"


def mesh(shape: Mapping[str, int]) -> str:
    """`data 4 × model 2`."""
    return " × ".join(f"{axis} {length}" for axis, length in shape.items())


def ranges(numbers: Sequence[int]) -> str:
    """`layers 0–2, 5` for (0, 1, 2, 5)."""
    parts: list[list[int]] = []
    for each in numbers:
        if parts and each == parts[-1][-1] + 1:
            parts[-1].append(each)
        else:
            parts.append([each])
    named = ", ".join(str(part[0]) if len(part) == 1 else f"{part[0]}–{part[-1]}" for part in parts)
    return f"layer{'s' if len(numbers) > 1 else ''} {named}"
