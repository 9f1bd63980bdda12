"""Sweeps as plain values: a list of points, each a dict of dotted overrides; pure functions put them together.

    product(param("seed", 0, 1), variants) -> every pair
    zip_(param("model.width", 64, 128), param("model.mlp.width", 176, 352)) -> side by side
    chain(small, large) -> one after the other
    overlay(sweep, {"train.steps": 100}) -> the same fields on every point

Nothing heavy is imported, so a sweep file costs nothing to read.
"""

import itertools
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from configs.errors import ConfigError

Point = dict[str, Any]
Sweep = list[Point]

_FIELD = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*")


def param(field: str, *values: Any) -> Sweep:
    """One point per value of a dotted field."""
    _check(field)
    if not values:
        raise ConfigError(f"param({field!r}) needs at least one value")
    return [{field: value} for value in values]


def product(*sweeps: Sequence[Point]) -> Sweep:
    """Every combination, the last sweep moving fastest; `ConfigError` if two sweeps set the same field."""
    return [_merge(points) for points in itertools.product(*sweeps)]


def zip_(*sweeps: Sequence[Point]) -> Sweep:
    """Points side by side; `ConfigError` unless all sweeps are equally long."""
    lengths = [len(sweep) for sweep in sweeps]
    if len(set(lengths)) > 1:
        raise ConfigError(f"zip_ needs sweeps of equal length, got lengths {', '.join(map(str, lengths))}")
    return [_merge(points) for points in zip(*sweeps, strict=True)]


def chain(*sweeps: Sequence[Point]) -> Sweep:
    """One sweep after the other; a point that comes twice is an error, since it would run twice."""
    points = [dict(point) for sweep in sweeps for point in sweep]
    for index, point in enumerate(points):
        if point in points[:index]:
            raise ConfigError(f"chain holds the same point twice: {point}")
    return points


def overlay(sweep: Sequence[Point], fields: Mapping[str, Any]) -> Sweep:
    """`fields` set on every point, over what the point says."""
    for field in fields:
        _check(field)
    return [{**point, **fields} for point in sweep]


def label(point: Point, sweep: Sequence[Point] | None = None) -> str:
    """A short name for a point, fit for a folder: its `name`, or else the fields that differ within `sweep`.

    `label({"seed": 1, "model.width": 64})` is `seed=1,width=64`. Points of one `name` are told apart by the fields in
    which they differ: `gqa,seed=1`.
    """
    named, others = point.get("name"), list(sweep or ())
    if named is not None:
        others = [other for other in others if other.get("name") == named]
    varying = {field for other in others for field in {**other, **point} if other.get(field) != point.get(field)}
    fields = [field for field in point if field in varying] or ([] if named is not None else list(point))
    last = [field.rsplit(".", 1)[-1] for field in fields]
    shown = [short if last.count(short) == 1 else field for short, field in zip(last, fields, strict=True)]
    parts = [f"{name}={_plain(point[field])}" for name, field in zip(shown, fields, strict=True)]
    return ",".join([_plain(named), *parts] if named is not None else parts) or "default"


def labels(sweep: Sequence[Point]) -> list[str]:
    """One distinct label per point; `ConfigError` naming the points that would share a run folder."""
    names = [label(point, sweep) for point in sweep]
    for index, name in enumerate(names):
        if name in names[:index]:
            raise ConfigError(
                f"two points of the sweep are both called {name!r}: {sweep[names.index(name)]} and {sweep[index]}"
            )
    return names


def _merge(points: Iterable[Point]) -> Point:
    merged: Point = {}
    for point in points:
        twice = merged.keys() & point.keys()
        if twice:
            raise ConfigError(f"two sweeps set {', '.join(sorted(twice))}; use overlay to replace a field")
        merged.update(point)
    return merged


def _check(field: str) -> None:
    if not isinstance(field, str) or not _FIELD.fullmatch(field):
        raise ConfigError(f"{field!r} is no dotted field, such as 'model.width'")


def _plain(value: Any) -> str:
    return re.sub(r"[^\w.+-]+", "-", str(value)).strip("-")
