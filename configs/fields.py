"""The fields of a config by their dotted names: set, converted, listed, and turned into JSON and back.

Every value is checked against the type that the field has in its config file, and every mistake is a `ConfigError` of
one line that names the field, whether the value came from a command line, a sweep or a notebook.
"""

import ast
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import ml_collections

from configs import attention
from configs.errors import ConfigError, nearest

# Groups of fields that are replaced as a whole when their name is given instead of one of their fields.
PRESETS: dict[str, Callable[[str], ml_collections.ConfigDict]] = {"model.attention": attention.get}

# Fields under these may hold a tuple, one value per block.
_PER_BLOCK = ("model.attention.", "model.mlp.", "model.norm.", "model.residual.")

_KINDS = {bool: "true or false", int: "a whole number", float: "a number", str: "a text", tuple: "a tuple"}

_NOT_A_LITERAL = (ValueError, SyntaxError, TypeError, MemoryError, RecursionError)  # What ast.literal_eval may raise.


def apply(config: ml_collections.ConfigDict, overrides: Mapping[str, Any]) -> ml_collections.ConfigDict:
    """A locked copy of `config` with dotted fields set, as in `{"model.width": 512, "model.attention": "mla"}`.

    Values may be texts, as from a command line, or Python values. Presets are taken first, so that
    `model.attention.heads` may stand before or after `model.attention`. Raises ConfigError for an unknown field and
    for a value of another type; whether the values fit together is `configs.validate.check`'s question.
    """
    config = ml_collections.ConfigDict(config.copy_and_resolve_references())
    for path in sorted(overrides, key=lambda path: path not in PRESETS):
        holder, leaf = _find(config, path)
        value, field = overrides[path], f"config.{path}"
        if path in PRESETS:
            holder[leaf] = _preset(path, value)
        elif isinstance(holder[leaf], ml_collections.ConfigDict):
            fields = ", ".join(f"{path}.{name}" for name in holder[leaf])
            raise ConfigError(f"{field} is a group of fields, set one of them: {fields}")
        else:
            with holder.ignore_type():
                holder[leaf] = _value(path, value, holder[leaf])
    return config.lock()


def convert(name: str, value: Any, like: Any) -> Any:
    """`value`, a text or a Python value, in the type of `like`; ConfigError saying what was expected and what came.

    Where `like` is a tuple of texts, so is the result: `--config.data.sources=123` is a folder, not a number.
    """
    kind = type(like)
    if kind is str and isinstance(value, str):
        return str(value)
    if isinstance(value, str):
        value = _from_text(name, value, like)
    if kind is float and type(value) is int:
        try:
            value = float(value)
        except OverflowError:
            value = math.inf
    if kind is tuple and isinstance(value, list | tuple):
        value = _frozen(value)
    if type(value) is not kind:
        raise _mismatch(name, value, kind)
    if kind is float and not math.isfinite(value):
        raise ConfigError(f"{name} must be a finite number, got {value}")
    if _texts(like):
        wrong = [item for item in value if not isinstance(item, str)]
        if wrong:
            raise ConfigError(f"{name} must be a tuple of texts, got {wrong[0]!r} ({type(wrong[0]).__name__}) in it")
    return value


def _value(path: str, value: Any, like: Any) -> Any:
    """`value` for the field `path`, which holds `like` now; what may differ from block to block may be a tuple."""
    field = f"config.{path}"
    if path == "model.per_layer":
        return tuple(
            _per_layer(f"{field}[{number}]", entry) for number, entry in enumerate(convert(field, value, like))
        )
    if not path.startswith(_PER_BLOCK):
        return convert(field, value, like)
    like = like[0] if isinstance(like, tuple) else like
    several = isinstance(value, list | tuple) or (isinstance(value, str) and value.strip()[:1] in ("(", "["))
    if not several or not (items := convert(field, value, ())):
        return convert(field, value, like)
    return tuple(convert(f"{field}[{number}]", item, like) for number, item in enumerate(items))


def _per_layer(name: str, entry: Any) -> Any:
    """An entry of per_layer, with the name of an attention preset replaced by the preset's options."""
    if not (isinstance(entry, tuple) and len(entry) == 2 and isinstance(entry[1], Mapping)):
        raise ConfigError(f"{name} must be (blocks, {{field: value}}), got {entry!r}")
    blocks, fields = entry
    fields = {
        field: _frozen(_preset(f"model.{field}", value).to_dict()) if f"model.{field}" in PRESETS else value
        for field, value in fields.items()
    }
    return blocks, fields


class Repeated(str):
    """The texts of a flag that was given several times: the last one counts, and a tuple takes them all."""

    texts: tuple[str, ...]

    def __new__(cls, texts: Sequence[str]) -> "Repeated":
        self = super().__new__(cls, texts[-1])
        self.texts = tuple(texts)
        return self


def flat(config: ml_collections.ConfigDict) -> dict[str, Any]:
    """Every field by its dotted name."""
    fields: dict[str, Any] = {}
    for name, value in config.items():
        if isinstance(value, ml_collections.ConfigDict):
            fields |= {f"{name}.{below}": leaf for below, leaf in flat(value).items()}
        else:
            fields[name] = value
    return fields


def plain(config: ml_collections.ConfigDict) -> dict[str, Any]:
    """The config as what JSON can hold: nested dicts, with lists for tuples. `from_plain` undoes it."""
    return {name: _thawed(value) for name, value in config.items()}


def from_plain(tree: Mapping[str, Any]) -> ml_collections.ConfigDict:
    """The locked config that `plain` described, also after a trip through JSON."""
    config = ml_collections.ConfigDict()
    for name, value in tree.items():
        config[name] = from_plain(value) if isinstance(value, Mapping) else _frozen(value)
    return config.lock()


def split(text: str) -> list[str]:
    """The parts of `text` between commas that stand outside brackets."""
    parts, depth, current = [], 0, ""
    for character in text:
        depth += (character in "([{") - (character in ")]}")
        if character == "," and depth == 0:
            parts.append(current)
            current = ""
        else:
            current += character
    return [part for part in (*parts, current) if part.strip()]


def _find(config: ml_collections.ConfigDict, path: str) -> tuple[ml_collections.ConfigDict, str]:
    """The group that holds the field `path`, and the field's name in it."""
    group, names = config, path.split(".")
    for depth, name in enumerate(names):
        if not isinstance(group, ml_collections.ConfigDict):
            raise ConfigError(f"config.{'.'.join(names[:depth])} has no fields: it is {_kind(type(group))}")
        if name not in group:
            raise ConfigError(_unknown_field(config, path, ".".join(names[:depth])))
        if depth < len(names) - 1:
            group = group[name]
    return group, names[-1]


def _unknown_field(config: ml_collections.ConfigDict, path: str, parent: str) -> str:
    """Names the nearest fields: alike in the same group, of the same name elsewhere, alike as a whole."""
    fields = flat(config)
    group = config
    for name in parent.split(".") if parent else ():
        group = group[name]
    prefix = f"{parent}." if parent else ""
    leaf = path.rpartition(".")[2]
    near = [prefix + name for name in nearest(path.removeprefix(prefix), group)]
    near += [name for name in fields if name.rpartition(".")[2] == leaf]
    below = {name.rpartition(".")[2]: name for name in reversed(fields) if name.startswith(prefix)}
    near += [] if near else [below[name] for name in nearest(leaf, below)]
    near = list(dict.fromkeys(near or nearest(path, fields)))[:3]
    if near:
        return f"unknown field config.{path}: did you mean {' or '.join(f'config.{name}' for name in near)}?"
    return f"unknown field config.{path}: {f'config.{parent}' if parent else 'config'} has {', '.join(group)}"


def _preset(path: str, value: Any) -> ml_collections.ConfigDict:
    if isinstance(value, ml_collections.ConfigDict | Mapping):
        return ml_collections.ConfigDict(value)
    if not isinstance(value, str):
        raise ConfigError(f"config.{path} must be the name of a preset, got {value!r}")
    try:
        return PRESETS[path](value)
    except ConfigError as error:
        raise ConfigError(f"config.{path}: {error}") from error


def _from_text(name: str, text: str, like: Any) -> Any:
    kind = type(like)
    if kind is bool:
        if text.lower() in ("true", "1", "yes", "on"):
            return True
        if text.lower() in ("false", "0", "no", "off"):
            return False
        raise _mismatch(name, text, kind)
    if kind is int or kind is float:
        try:
            return kind(text)
        except ValueError:
            raise _mismatch(name, text, kind) from None
    if kind is tuple:
        return _tuple(name, text, _texts(like))
    raise ConfigError(f"{name} cannot be set from a text: it is {_kind(kind)}")


def _texts(like: Any) -> bool:
    """Whether `like` is a tuple of texts."""
    return isinstance(like, tuple) and bool(like) and all(isinstance(item, str) for item in like)


def _tuple(name: str, text: str, texts: bool) -> tuple[Any, ...]:
    """`(1, "a")`, `[1, 2]`, `a,b` and a single element alike; elements that are no Python literals are texts."""
    if isinstance(text, Repeated):
        return tuple(element for part in text.texts for element in _tuple(name, part, texts))
    if not text.strip():
        return ()
    if text.strip()[0] in "([":
        try:
            value = ast.literal_eval(text.strip())
        except _NOT_A_LITERAL:
            raise ConfigError(f"{name} must be a tuple such as (1, 2) or ('a', 'b'), got {text!r}") from None
        return tuple(value) if isinstance(value, list | tuple) else (value,)
    return tuple(_element(part, texts) for part in split(text))


def _element(text: str, texts: bool) -> Any:
    try:
        value = ast.literal_eval(text.strip())
    except _NOT_A_LITERAL:
        return text.lstrip()
    return text.lstrip() if texts and not isinstance(value, str) else value


def _frozen(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return tuple(_frozen(item) for item in value)
    if isinstance(value, Mapping):
        return {name: _frozen(item) for name, item in value.items()}
    return value


def _thawed(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return [_thawed(item) for item in value]
    if isinstance(value, Mapping | ml_collections.ConfigDict):
        return {name: _thawed(item) for name, item in value.items()}
    return value


def _kind(kind: type) -> str:
    return _KINDS.get(kind, kind.__name__)


def _mismatch(name: str, value: Any, kind: type) -> ConfigError:
    came = repr(str(value)) if isinstance(value, str) else f"{value!r} ({type(value).__name__})"
    return ConfigError(f"{name} must be {_kind(kind)}, got {came}")
