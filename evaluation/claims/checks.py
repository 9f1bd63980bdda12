"""How a claim is decided: comparisons of measured numbers, seed by seed, under a rule that is declared beforehand.

A comparison gives one margin per seed, positive where its statement is true. From the margins of all seeds the check's
rule makes a verdict: the statement holds, it does not hold, or the seeds cannot tell.
"""

import dataclasses
import enum
from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np
from jaxtyping import Float

from configs.errors import unknown
from evaluation import statistics


class Verdict(enum.StrEnum):
    """What came out."""

    HOLDS = "holds"
    FAILS = "does not hold"
    NOISE = "within noise"

    @classmethod
    def together(cls, verdicts: Iterable["Verdict"]) -> "Verdict":
        """That of several: one that does not hold decides, then one that is within noise."""
        found = set(verdicts)
        return next((verdict for verdict in (cls.FAILS, cls.NOISE) if verdict in found), cls.HOLDS)


class Rule(enum.StrEnum):
    """How margins are decided; the text is what a reader is told."""

    EVERY_SEED = "all seeds must agree, two or more"
    STANDARD_ERROR = "the mean must be two standard errors from zero"
    EXACT = "no chance in it: all seeds must agree, one is enough"


@dataclasses.dataclass(frozen=True)
class Key:
    """Which measurement: its name and its keys, in order of their names."""

    name: str
    keys: tuple[tuple[str, str], ...] = ()

    def __str__(self) -> str:
        return f"{self.name} ({', '.join(value for _, value in self.keys)})" if self.keys else self.name


def of(name: str, **keys: object) -> Key:
    """`of("perplexity", transform="pca", factor="lsq")`."""
    return Key(name, tuple(sorted((key, str(value)) for key, value in keys.items())))


class Measured:
    """The values of every measurement, one per seed."""

    def __init__(self, values: Mapping[Key, Sequence[float]]) -> None:
        self._values = {key: np.asarray(each, np.float64) for key, each in values.items()}

    def __getitem__(self, key: Key) -> Float[np.ndarray, " seeds"]:
        if key not in self._values:
            raise ValueError(unknown("measurement", str(key), map(str, self._values)))
        return self._values[key]


@dataclasses.dataclass(frozen=True)
class Comparison:
    """A statement about measured numbers, and by how much each seed has it."""

    statement: str
    margins: Callable[[Measured], Float[np.ndarray, " seeds"]]
    inclusive: bool = False  # Whether a margin of exactly zero counts as true.


def less(a: Key, b: Key, *, times: float = 1.0, by: float = 0.0) -> Comparison:
    """`times` a + `by` < b, paired: both of the same seed."""
    left = (f"{times:g} × " if times != 1 else "") + str(a) + (f" + {by:g}" if by else "")
    return Comparison(f"{left} < {b}", lambda measured: measured[b] - times * measured[a] - by)


def ordered(*keys: Key) -> tuple[Comparison, ...]:
    """Each less than the next."""
    return tuple(less(a, b) for a, b in zip(keys, keys[1:], strict=False))


def at_most(a: Key, bound: float) -> Comparison:
    """a <= bound."""
    return Comparison(f"{a} ≤ {bound:g}", lambda measured: bound - measured[a], inclusive=True)


def at_least(a: Key, bound: float) -> Comparison:
    """a >= bound."""
    return Comparison(f"{a} ≥ {bound:g}", lambda measured: measured[a] - bound, inclusive=True)


def equal(a: Key, b: Key, *, relative: float) -> Comparison:
    """|a - b| <= relative max(|a|, |b|)."""

    def margins(measured: Measured) -> Float[np.ndarray, " seeds"]:
        allowed = relative * np.maximum(np.abs(measured[a]), np.abs(measured[b]))
        return allowed - np.abs(measured[a] - measured[b])

    return Comparison(f"{a} = {b} to {relative:g} of it", margins, inclusive=True)


@dataclasses.dataclass(frozen=True)
class Finding:
    """A comparison decided."""

    statement: str
    margins: tuple[float, ...]  # One per seed.
    agreeing: int  # Seeds for which the statement is true.
    verdict: Verdict

    @property
    def mean(self) -> float:
        """Of the margins."""
        return float(np.mean(self.margins))

    @property
    def stderr(self) -> float | None:
        """Of that mean; None for a single seed."""
        return standard_error(np.asarray(self.margins))


@dataclasses.dataclass(frozen=True)
class CheckResult:
    """A check decided."""

    name: str
    sentence: str
    source: str
    rule: str
    findings: tuple[Finding, ...]

    @property
    def verdict(self) -> Verdict:
        """Holds if every comparison does."""
        return Verdict.together(finding.verdict for finding in self.findings)


@dataclasses.dataclass(frozen=True)
class Check:
    """Part of what a claim comes to: one or more comparisons, which must all hold."""

    name: str
    sentence: str  # In words, as the paper has it.
    comparisons: Comparison | Sequence[Comparison]
    source: str  # Where the direction comes from: "paper, table 3", or "ours" and why.
    rule: Rule = Rule.EVERY_SEED

    def decide(self, measured: Measured) -> CheckResult:
        """Every comparison decided; ValueError for a measurement that there is not."""
        several = [self.comparisons] if isinstance(self.comparisons, Comparison) else self.comparisons
        findings = tuple(_find(comparison, comparison.margins(measured), self.rule) for comparison in several)
        return CheckResult(self.name, self.sentence, self.source, str(self.rule), findings)


def decide(margins: Float[np.ndarray, " seeds"], rule: Rule, *, inclusive: bool = False) -> Verdict:
    """The verdict of margins under a rule. A margin that is no number speaks against the statement."""
    agreeing = _agreeing(margins, inclusive)
    unanimous = Verdict.HOLDS if agreeing.all() else Verdict.NOISE if agreeing.any() else Verdict.FAILS
    if rule is Rule.EXACT:
        return Verdict.HOLDS if agreeing.all() else Verdict.FAILS
    error = standard_error(margins)
    if error is None:
        return Verdict.NOISE  # One seed shows no spread.
    if rule is Rule.EVERY_SEED or error == 0.0 or not np.isfinite(error):
        return unanimous
    distance = margins.mean() / error
    return Verdict.HOLDS if distance > 2 else Verdict.FAILS if distance < -2 else Verdict.NOISE


def standard_error(values: Float[np.ndarray, " seeds"]) -> float | None:
    """Of the mean over seeds: exactly zero for equal values, None for a single one, NaN with values not finite."""
    if len(values) > 1 and np.all(values == values[0]) and np.isfinite(values[0]):
        return 0.0  # And not what rounding makes of it.
    with np.errstate(invalid="ignore"):
        return statistics.mean(values)[1]


def _find(comparison: Comparison, margins: Float[np.ndarray, " seeds"], rule: Rule) -> Finding:
    verdict = decide(margins, rule, inclusive=comparison.inclusive)
    agreeing = int(_agreeing(margins, comparison.inclusive).sum())
    return Finding(comparison.statement, tuple(map(float, margins)), agreeing, verdict)


def _agreeing(margins: Float[np.ndarray, " seeds"], inclusive: bool) -> np.ndarray:
    return margins >= 0 if inclusive else margins > 0
