"""The words in which a config's rules are written: each states one rule and names the field that breaks it."""

from collections.abc import Iterable
from typing import Any, NoReturn

import ml_collections

from configs.errors import ConfigError, unknown

LARGEST = 2**31 - 1  # Sizes, counts and steps are 32-bit numbers on the device.


class Rules:
    """Rules about the fields of one group, which is called `name` in messages; every method may raise ConfigError."""

    def __init__(self, group: ml_collections.ConfigDict, name: str) -> None:
        self.group, self.name = group, name

    def __getitem__(self, field: str) -> Any:
        """The value of a field; a missing field is an error that names it."""
        if field not in self.group:
            raise ConfigError(f"{self.name}.{field} is missing")
        return self.group[field]

    def fail(self, field: str, message: str) -> NoReturn:
        """The field does not do, for this reason."""
        raise ConfigError(f"{self.name}.{field} {message}, got {self[field]!r}")

    def below(self, field: str) -> "Rules":
        """The rules about a group inside this one."""
        if not isinstance(self[field], ml_collections.ConfigDict):
            self.fail(field, "must be a group of fields")
        return Rules(self[field], f"{self.name}.{field}")

    def whole(self, *fields: str, least: int = 1, most: int = LARGEST) -> None:
        """Whole numbers from `least` to `most`."""
        for field in fields:
            if type(self[field]) is not int:
                self.fail(field, "must be a whole number")
            if not least <= self[field] <= most:
                self.fail(field, f"must be {least} or more" if self[field] < least else f"must be {most} or less")

    def number(
        self,
        *fields: str,
        least: float | None = None,
        above: float | None = None,
        most: float | None = None,
        under: float | None = None,
    ) -> None:
        """Numbers with `least <= value`, `above < value`, `value <= most`, `value < under` where these are given."""
        for field in fields:
            value = self[field]
            if type(value) not in (int, float) or value != value:
                self.fail(field, "must be a number")
            bounds = (
                ("{} or more", least, least is None or value >= least),
                ("above {}", above, above is None or value > above),
                ("{} or less", most, most is None or value <= most),
                ("below {}", under, under is None or value < under),
            )
            if not all(holds for _, _, holds in bounds):
                stated = " and ".join(text.format(f"{bound:g}") for text, bound, _ in bounds if bound is not None)
                self.fail(field, f"must be {stated}")

    def switch(self, *fields: str) -> None:
        """True or false."""
        for field in fields:
            if type(self[field]) is not bool:
                self.fail(field, "must be true or false")

    def text(self, *fields: str, empty: bool = True) -> None:
        """Texts; `empty` says whether "" will do."""
        for field in fields:
            if not isinstance(self[field], str):
                self.fail(field, "must be a text")
            if not self[field] and not empty:
                self.fail(field, "must not be empty")

    def path(self, *fields: str, empty: bool = True) -> None:
        """Texts that a file may be called."""
        self.text(*fields, empty=empty)
        for field in fields:
            if "\0" in self[field]:
                self.fail(field, "must be a path, which holds no NUL character")

    def texts(self, *fields: str, empty: bool = True) -> None:
        """Tuples of texts, none of them empty; `empty` says whether () will do."""
        for field in fields:
            value = self[field]
            if not isinstance(value, tuple) or not all(isinstance(item, str) and item for item in value):
                self.fail(field, "must be a tuple of texts that are not empty")
            if not value and not empty:
                self.fail(field, "must name at least one")

    def one_of(self, field: str, known: Iterable[str]) -> None:
        """One of the known names; the message gives the nearest."""
        if not isinstance(self[field], str):
            self.fail(field, f"must be one of {', '.join(known)}")
        if self[field] not in known:
            raise ConfigError(unknown(f"{self.name}.{field}", self[field], known))

    def divides(self, divisor: str, number: str) -> None:
        """The field `divisor` divides the field `number`."""
        if self[number] % self[divisor]:
            self.fail(divisor, f"must divide {self.name}.{number} = {self[number]}")

    def even(self, *fields: str, why: str) -> None:
        """Even numbers, because of `why`."""
        for field in fields:
            if self[field] % 2:
                self.fail(field, f"must be even: {why}")
