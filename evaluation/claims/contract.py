"""What a claim is: what it says of itself, what it is given, and what it returns."""

import dataclasses
import pathlib
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import ml_collections

import data
from configs import fields
from configs.errors import unknown
from evaluation.claims.checks import Check
from evaluation.contract import EvaluationError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from evaluation.claims.record import Record


@dataclasses.dataclass(frozen=True)
class Number:
    """One number that one seed gave. `keys` says which of several of that name: transform=pca, factor=lsq."""

    name: str
    value: float
    unit: str = ""
    keys: Mapping[str, str] = dataclasses.field(default_factory=dict)


def number(name: str, value: Any, unit: str = "", **keys: Any) -> Number:
    """`number("perplexity", 4.72, transform="pca", factor="lsq")`."""
    return Number(name, float(value), unit, {key: str(each) for key, each in keys.items()})


@dataclasses.dataclass(frozen=True)
class Table:
    """How numbers are laid out: a row per value of the key `rows`, a column per value of the key `columns`.

    Without `columns` each of the names in `measures` is a column. `where` fixes the other keys of the numbers shown.
    """

    title: str
    measures: str | tuple[str, ...]
    rows: str
    columns: str = ""
    where: Mapping[str, str] = dataclasses.field(default_factory=dict)
    decimals: int = 3

    def __post_init__(self) -> None:
        if self.columns and not isinstance(self.measures, str):
            raise ValueError(f"table {self.title!r} has columns by {self.columns}, so it can show one measure only")


class Trained(Protocol):
    """A finished run as a claim uses it; `training.LoadedRun` is one."""

    config: ml_collections.ConfigDict  # With `run_dir`, where everything of the run lies.
    model: Any
    tokenizer: Any
    step: int
    layout: Any


Train = Callable[[ml_collections.ConfigDict], Trained]  # Trains by the ordinary loop, or finds the run finished.
Convert = Callable[..., Any]  # (run folder, new run folder, to=..., **options): what `eval.py convert` does.


@dataclasses.dataclass(frozen=True)
class ClaimContext:
    """What a claim may use for one seed. `params` are its parameters, `seeds` among them; it measures `seed` alone."""

    seed: int
    params: Mapping[str, Any]
    trainer: Train
    progress: Callable[[str, int, int], None]  # Called with (what, done, total).
    converter: Callable[[str, dict[str, Any]], pathlib.Path] | None = None  # (run folder, options) -> the new one.

    def train(self, config: ml_collections.ConfigDict) -> Trained:
        """The run of `config` with this seed: trained by the loop of `train.py`, continued or, if finished, reused.

        Its folder is named by a hash of the whole config, so an equal config is trained once, whichever claim asks.
        """
        return self.trainer(fields.apply(config, {"seed": self.seed}))

    def convert(self, trained: Trained, **options: Any) -> pathlib.Path:
        """The run folder of a run with another attention, for runs to start from: `to` and the options of
        `eval.py convert`. Its name is a hash of these, so an equal conversion is done once.

        Raises EvaluationError where whoever measures has no conversions.
        """
        if self.converter is None:
            raise EvaluationError("this claim converts a network, and no conversion was given: measure it with eval.py")
        return self.converter(trained.config.run_dir, options)

    def pipeline(self, trained: Trained) -> data.Pipeline:
        """The texts of a run with the run's own tokenizer: what `evaluation.evaluate` wants beside the model."""
        source = trained.config.data.copy_and_resolve_references()
        source.tokenizer = f"{trained.config.run_dir}/tokenizer"
        return data.build(source, seed=trained.config.seed)

    def report(self, what: str, done: int, total: int) -> None:
        """Tells whoever watches how far the work of this seed is."""
        self.progress(what, done, total)


@dataclasses.dataclass(frozen=True)
class Claim:
    """A published claim, and the small experiment that tries it.

    `checks` follow from what the paper says, never from what the code gives; they are written before it is run.
    """

    slug: str  # Lower-case words with dashes; its file has underscores for them.
    title: str
    says: str  # What the paper says, as a direction that a small experiment can have too.
    setting: str  # What is done here: model, data, size.
    run: Callable[[ClaimContext], Iterable[Number]]  # One seed's numbers; the same names and keys for every seed.
    checks: Sequence[Check]
    paper: str = ""  # The arXiv identifier, such as 2508.15881.
    defaults: Mapping[str, Any] = dataclasses.field(default_factory=lambda: {"seeds": (0, 1, 2)})
    smoke: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # What --smoke changes of the defaults.
    tables: Sequence[Table] = ()
    draw: "Callable[[Record], Figure] | None" = None  # None: the first table as points with their spread.
    version: int = 1  # Raised when the same parameters give other numbers; what was kept before is measured anew.

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", self.slug):
            raise ValueError(f"slug {self.slug!r} is not made of lower-case words with dashes")
        if "seeds" not in self.defaults:
            raise ValueError(f"claim {self.slug} has no seeds among its defaults")
        stray = sorted(self.smoke.keys() - self.defaults.keys())
        if stray:
            raise ValueError(f"claim {self.slug}: smoke sets {stray[0]!r}, which has no default")

    def parameters(self, given: Mapping[str, Any], *, smoke: bool = False) -> dict[str, Any]:
        """The defaults, under the smoke setting if that is wanted, under `given`, each of the default's type.

        A tuple comes as text with `:` between, as parameters of tasks do. Raises a UserError for an unknown name.
        """
        merged = {**self.defaults, **(self.smoke if smoke else {})}
        for name, value in given.items():
            if name not in merged:
                raise EvaluationError(unknown(f"parameter of claim {self.slug}", name, merged))
            merged[name] = _convert(f"{self.slug}.{name}", value, self.defaults[name])
        seeds = merged["seeds"]
        if not seeds or len(set(seeds)) < len(seeds):
            raise EvaluationError(f"{self.slug}.seeds must be distinct and at least one, got {seeds}")
        return merged

    def command(self, parameters: Mapping[str, Any]) -> str:
        """The command line that measures with `parameters`."""
        changed = {name: value for name, value in parameters.items() if value != self.defaults[name]}
        shown = [f"{self.slug}.{name}={_text(value)}" for name, value in changed.items()]
        return f"python eval.py --claim={self.slug}" + (f" --params={','.join(shown)}" if shown else "")


def _convert(name: str, value: Any, default: Any) -> Any:
    if isinstance(default, tuple):
        items = value.split(":") if isinstance(value, str) else value if isinstance(value, list | tuple) else [value]
        return tuple(fields.convert(name, item, default[0] if default else "") for item in items)
    return fields.convert(name, value, default)


def _text(value: Any) -> str:
    return ":".join(map(str, value)) if isinstance(value, tuple) else str(value)
