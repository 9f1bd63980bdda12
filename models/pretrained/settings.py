"""A `config.json` as families read it: every field is checked, and every mistake names the file and the field."""

import math
from collections.abc import Mapping
from typing import Any, NoReturn

from models.pretrained.errors import PretrainedError

_REQUIRED: Any = object()


class Settings:
    """The content of a config.json. `where` is the file's name for errors, `path` the dotted field this group is at.

    Every reader takes the names under which the field is known, the first present one counting; a default makes it
    optional, and `null` counts as absent where there is a default.
    """

    def __init__(self, values: Mapping[str, Any], where: str = "config.json", path: str = "") -> None:
        self.values, self.where, self.path = dict(values), where, path

    def __contains__(self, name: str) -> bool:
        return self.values.get(name) is not None

    def whole(self, *names: str, default: Any = _REQUIRED, least: int = 1, most: int = 2**31 - 1) -> Any:
        """A whole number from `least` to `most`."""
        kind = f"a whole number >= {least}" + (f" and <= {most}" if most < 2**31 - 1 else "")
        return self._read(names, default, lambda x: type(x) is int and least <= x <= most, kind)

    def depth(self) -> int:
        """num_hidden_layers, as many as `config.model.depth` may be."""
        return self.whole("num_hidden_layers", most=4096)

    def number(self, *names: str, default: Any = _REQUIRED, above: float = -math.inf) -> Any:
        """A finite number above `above`, as a float."""
        sound = lambda x: type(x) in (int, float) and math.isfinite(x) and x > above  # noqa: E731
        kind = "a number" if above == -math.inf else f"a number above {above:g}"
        found = self._read(names, default, sound, kind)
        return float(found) if type(found) is int else found

    def flag(self, *names: str, default: Any = _REQUIRED) -> Any:
        """true or false."""
        return self._read(names, default, lambda x: type(x) is bool, "true or false")

    def text(self, *names: str, default: Any = _REQUIRED) -> Any:
        """A text."""
        return self._read(names, default, lambda x: isinstance(x, str), "a text")

    def texts(self, *names: str, length: int, default: Any = _REQUIRED) -> Any:
        """A list of `length` texts, as a tuple."""
        found = self._read(
            names,
            default,
            lambda x: isinstance(x, list) and len(x) == length and all(isinstance(item, str) for item in x),
            f"a list of {length} texts",
        )
        return tuple(found) if isinstance(found, list) else found

    def wholes(self, *names: str, length: int, default: Any = _REQUIRED) -> Any:
        """A list of `length` whole numbers of at least 0, as a tuple."""
        found = self._read(
            names,
            default,
            lambda x: isinstance(x, list) and len(x) == length and all(type(i) is int and 0 <= i < 2**31 for i in x),
            f"a list of {length} whole numbers",
        )
        return tuple(found) if isinstance(found, list) else found

    def group(self, *names: str) -> "Settings":
        """A group of fields, empty if absent."""
        name, found = self._first(names)
        if found is not None and not isinstance(found, Mapping):
            self.refuse(name, "must be an object")
        return Settings(found or {}, self.where, f"{self.path}{name}.")

    def only(self, name: str, *values: Any, default: Any = _REQUIRED) -> Any:
        """The field, which must be one of `values`; absent it is `default`, by default the first of them."""
        default = values[0] if default is _REQUIRED else default
        found = self.values.get(name)
        found = default if found is None else found
        if not any(found is value or (type(found) is type(value) and found == value) for value in (*values, default)):
            known = " or ".join(repr(value) for value in values)
            self.refuse(name, f"= {found!r} is not supported: only {known}")
        return found

    def refuse(self, name: str, reason: str) -> NoReturn:
        """Raises PretrainedError about the field."""
        raise PretrainedError(f"{self.where}: {self.path}{name} {reason}")

    def _first(self, names: tuple[str, ...]) -> tuple[str, Any]:
        for name in names:
            if self.values.get(name) is not None:
                return name, self.values[name]
        return names[0], None

    def _read(self, names: tuple[str, ...], default: Any, sound: Any, kind: str) -> Any:
        name, found = self._first(names)
        if found is None:
            if default is _REQUIRED:
                self.refuse(name, f"is missing: it must be {kind}")
            return default
        if not sound(found):
            shown = repr(found)
            self.refuse(name, f"must be {kind}, got {shown[:60]}{'...' if len(shown) > 60 else ''}")
        return found
