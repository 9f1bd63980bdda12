"""What differs from block to block, spelled out: `config.model.per_layer`, and fields that hold one value per block."""

from collections.abc import Mapping
from typing import Any

import ml_collections

from configs.errors import ConfigError
from configs.fields import apply

PARTS = ("attention", "mlp", "norm", "residual")


def expand(model: ml_collections.ConfigDict) -> list[ml_collections.ConfigDict]:
    """The parts of `config.model` as its blocks see them; equal neighbours are listed once.

    An entry of `per_layer` is (blocks, {dotted field: value}); blocks is a number (`"0"`, `"-1"`) or a slice
    (`"1::2"`), and "attention" alone takes all the options of another variant. A field that holds a tuple gives one
    value per block, its last value repeating. Raises ConfigError for an entry that is malformed, chooses no block, or
    sets a field that does not exist.
    """
    chosen: list[tuple[int, ...]] = [()] * model.depth
    for number, entry in enumerate(model.per_layer):
        name = f"config.model.per_layer[{number}]"
        if not (isinstance(entry, tuple) and len(entry) == 2 and isinstance(entry[1], Mapping)):
            raise ConfigError(f"{name} must be (blocks, {{field: value}}), got {entry!r}")
        for block in _blocks(name, entry[0], model.depth):
            chosen[block] += (number,)
    shared = {entries: _with(model, entries) for entries in dict.fromkeys(chosen)}
    longest = {entries: _longest(config) for entries, config in shared.items()}
    kinds = dict.fromkeys((entries, min(block, longest[entries] - 1)) for block, entries in enumerate(chosen))
    return [_at(shared[entries], block) for entries, block in kinds]


def _with(model: ml_collections.ConfigDict, entries: tuple[int, ...]) -> ml_collections.ConfigDict:
    """The parts of a block after these entries of per_layer, later ones winning."""
    whole = ml_collections.ConfigDict({"model": {part: model[part] for part in PARTS}})
    for number in entries:
        for field, value in model.per_layer[number][1].items():
            name = f"config.model.per_layer[{number}]"
            if not isinstance(field, str) or field.partition(".")[0] not in PARTS:
                raise ConfigError(f"{name} may set fields of {', '.join(PARTS)}, not {field!r}")
            try:
                whole = apply(whole, {f"model.{field}": value})
            except ConfigError as error:
                raise ConfigError(f"{name}: {error}") from error
    return whole.model


def _longest(value: Any) -> int:
    """The length of the longest tuple in a tree of fields, at least 1."""
    if isinstance(value, ml_collections.ConfigDict):
        return max(_longest(item) for item in value.values())
    return max(len(value), 1) if isinstance(value, tuple) else 1


def _at(value: Any, block: int) -> Any:
    """A tree of fields with each tuple replaced by its value for one block."""
    if isinstance(value, ml_collections.ConfigDict):
        return ml_collections.ConfigDict({name: _at(item, block) for name, item in value.items()})
    return value[min(block, len(value) - 1)] if isinstance(value, tuple) and value else value


def _blocks(name: str, blocks: object, depth: int) -> list[int]:
    """The block numbers that `blocks` chooses out of `depth`."""
    try:
        parts = str(blocks).split(":")
        if len(parts) == 1:
            return [range(depth)[int(parts[0])]]
        chosen = list(range(depth))[slice(*(int(part) if part.strip() else None for part in parts))]
    except (ValueError, TypeError, IndexError):
        chosen = []
    if not chosen:
        raise ConfigError(f"{name} chooses no block of {depth}: {blocks!r} must be a number or a slice such as '1::2'")
    return chosen
