"""Interval arithmetic: what can be said of a rule from the least and greatest values in a block."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


@dataclasses.dataclass(frozen=True)
class Truth:
    """A three-valued answer for a block: `possible`, some pair may hold; `certain`, every pair holds."""

    possible: Any
    certain: Any

    @staticmethod
    def of(answer: Any) -> "Truth":
        """A plain boolean that holds for the whole block, or a `Truth` as it is."""
        return answer if isinstance(answer, Truth) else Truth(answer, answer)

    @staticmethod
    def unknown() -> "Truth":
        """Nothing is known: the block must be looked at."""
        return Truth(np.ones((1, 1, 1, 1), bool), np.zeros((1, 1, 1, 1), bool))

    def __and__(self, other: Any) -> "Truth":
        other = Truth.of(other)
        return Truth(self.possible & other.possible, self.certain & other.certain)

    def __or__(self, other: Any) -> "Truth":
        other = Truth.of(other)
        return Truth(self.possible | other.possible, self.certain | other.certain)

    def __invert__(self) -> "Truth":
        return Truth(~self.certain, ~self.possible)

    __rand__ = __and__
    __ror__ = __or__
    __array_ufunc__ = None  # NumPy arrays on the left must hand over to the methods here.


@dataclasses.dataclass(frozen=True, eq=False)
class Interval:
    """Numbers somewhere between `low` and `high`, both included; arithmetic never loses a value that can occur."""

    low: Any
    high: Any

    __array_ufunc__ = None
    __hash__ = None

    @staticmethod
    def of(value: Any) -> "Interval":
        """An interval as it is, or a number as the interval of itself alone."""
        return value if isinstance(value, Interval) else Interval(value, value)

    def __add__(self, other: Any) -> "Interval":
        other = Interval.of(other)
        return Interval(self.low + other.low, self.high + other.high)

    def __neg__(self) -> "Interval":
        return Interval(-self.high, -self.low)

    def __sub__(self, other: Any) -> "Interval":
        return self + -Interval.of(other)

    def __rsub__(self, other: Any) -> "Interval":
        return -self + other

    def __mul__(self, other: Any) -> "Interval":
        other = Interval.of(other)
        corners = [a * b for a in (self.low, self.high) for b in (other.low, other.high)]
        xp = jnp if any(isinstance(corner, jax.Array) for corner in corners) else np
        low, high = corners[0], corners[0]
        for corner in corners[1:]:
            low, high = xp.minimum(low, corner), xp.maximum(high, corner)
        return Interval(low, high)

    def __floordiv__(self, other: int) -> "Interval":
        if not isinstance(other, (int, np.integer)) or other < 1:
            raise TypeError(f"an interval can be divided by a positive whole number, not by {other!r}")
        return Interval(self.low // other, self.high // other)

    def __lt__(self, other: Any) -> Truth:
        other = Interval.of(other)
        return Truth(self.low < other.high, self.high < other.low)

    def __le__(self, other: Any) -> Truth:
        other = Interval.of(other)
        return Truth(self.low <= other.high, self.high <= other.low)

    def __gt__(self, other: Any) -> Truth:
        return Interval.of(other) < self

    def __ge__(self, other: Any) -> Truth:
        return Interval.of(other) <= self

    def __eq__(self, other: Any) -> Truth:  # type: ignore[override]
        other = Interval.of(other)
        overlap = (self.low <= other.high) & (other.low <= self.high)
        single = (self.low == self.high) & (other.low == other.high)
        return Truth(overlap, overlap & single)

    def __ne__(self, other: Any) -> Truth:  # type: ignore[override]
        return ~(self == other)

    __radd__ = __add__
    __rmul__ = __mul__
