"""From a model's config to what each of its layers is, and which runs of layers can share one scan."""

from collections.abc import Mapping, Sequence
from typing import Any

Spec = dict[str, Any]
PARTS = ("attention", "mlp", "norm", "residual")


def layer_specs(config: Mapping[str, Any]) -> list[Spec]:
    """One `{"attention": {...}, "mlp": {...}, "norm": {...}, "residual": {...}}` per layer, from `config.model`.

    `per_layer` gives exceptions: a Python slice over the layers ("0", "-1", ":4", "1::2") and the fields it changes,
    dotted; "attention" alone takes a whole mapping (another variant). A field that holds a tuple gives one value per
    layer, its last value repeating.

    Raises:
        ValueError: a slice or a field that does not exist.
    """
    depth = config["depth"]
    specs = [{part: _plain(config[part]) for part in PARTS} for _ in range(depth)]
    for selector, changes in config["per_layer"]:
        for index in _selected(selector, depth):
            for field, value in dict(changes).items():
                _set(specs[index], field, _plain(value))
    return [_at_layer(spec, index) for index, spec in enumerate(specs)]


def segments(specs: Sequence[Spec], longest_period: int = 8) -> list[tuple[list[Spec], int]]:
    """Cuts the layers into (pattern, repeats): equal neighbours, or a pattern of a few layers that comes again."""
    result, start = [], 0
    while start < len(specs):
        best_period, best_repeats = 1, 1
        for period in range(1, min(longest_period, len(specs) - start) + 1):
            pattern, repeats = specs[start : start + period], 1
            while specs[start + repeats * period : start + (repeats + 1) * period] == pattern:
                repeats += 1
            if repeats > 1 and period * repeats > best_period * best_repeats:
                best_period, best_repeats = period, repeats
        result.append((list(specs[start : start + best_period]), best_repeats))
        start += best_period * best_repeats
    return result


def _plain(value: Any) -> Any:
    return {name: _plain(item) for name, item in value.items()} if hasattr(value, "items") else value


def _selected(selector: str, depth: int) -> range:
    try:
        numbers = [int(part) if part else None for part in str(selector).split(":")]
        if len(numbers) == 1:
            first = range(depth)[numbers[0]]
            return range(first, first + 1)
        return range(depth)[slice(*numbers)]
    except (ValueError, IndexError, TypeError):
        raise ValueError(
            f"per_layer {selector!r} selects no layers of {depth}: write a slice such as 0, :4 or 1::2"
        ) from None


def _set(spec: Spec, field: str, value: Any) -> None:
    *path, last = field.split(".")
    for name in path:
        if not isinstance(spec.get(name), dict):
            raise ValueError(f"per_layer sets {field!r}, but a layer has no {name!r}: it has {', '.join(spec)}")
        spec = spec[name]
    if last not in spec:
        raise ValueError(f"per_layer sets {field!r}, but there is no {last!r}: known are {', '.join(spec)}")
    spec[last] = value


def _at_layer(value: Any, index: int) -> Any:
    if isinstance(value, dict):
        return {name: _at_layer(item, index) for name, item in value.items()}
    return value[min(index, len(value) - 1)] if isinstance(value, (tuple, list)) and value else value
