"""What an evaluation task is: what it is given, what it returns, and the error it raises.

A task is a file in `evaluation/tasks/` whose `TASKS` holds one or more `Task`s. Nothing else has to know of it.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, TypeVar

import ml_collections
from flax import nnx

from configs.errors import UserError, unknown

Item = TypeVar("Item")


class EvaluationError(UserError):
    """An evaluation that cannot run as asked; one line that says what to do."""


class Generate(Protocol):
    """How ids are continued: the signature of `models.generation.generate`."""

    def __call__(
        self, model: nnx.Module, prompts: list[list[int]], *, max_new_tokens: int, **options: Any
    ) -> list[list[int]]: ...


@dataclasses.dataclass(frozen=True)
class Metric:
    """One number of a task."""

    value: float
    stderr: float | None = None  # None: not defined for this number or this many units.
    higher_is_better: bool = True


@dataclasses.dataclass(frozen=True)
class Units:
    """The per-unit numbers behind one metric, kept so that two runs can be compared unit by unit.

    The metric is sum(numerator) / sum(denominator); a plain mean has a denominator of ones.
    """

    metric: str
    ids: Sequence[str]
    numerator: Sequence[float]
    denominator: Sequence[float]


@dataclasses.dataclass(frozen=True)
class Grid:
    """A matrix of results, such as recall by context length and depth; written as CSV and drawn as a heat map."""

    title: str
    rows: Sequence[str]
    columns: Sequence[str]
    values: Sequence[Sequence[float]]
    row_name: str = ""
    column_name: str = ""
    limits: tuple[float, float] | None = None  # Range of the colours; None fits the values.


@dataclasses.dataclass(frozen=True)
class TaskResult:
    """What a task found."""

    name: str
    metrics: Mapping[str, Metric]
    samples: Sequence[dict[str, Any]] = ()  # One row per document, with at least doc_id.
    effective: int = 0  # Documents evaluated.
    original: int = 0  # Documents there were before any limit.
    units: Units | None = None
    grids: Mapping[str, Grid] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class EvalContext:
    """What a task may use.

    `length` is the longest window the model is given (inputs, not counting the last target). `params` are the task's
    own parameters, its defaults already filled in. `generate` None means `models.generation.generate`.
    """

    model: nnx.Module
    tokenizer: Any
    pipeline: Any | None = None
    config: ml_collections.ConfigDict | None = None
    batch_size: int = 16
    length: int = 256
    limit: float = 0.0
    seed: int = 0
    params: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    bootstrap_iterations: int = 0
    generation: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    generate: Generate | None = None
    system: str = ""  # Text put before every prompt.
    picked: Sequence[int] | None = None  # Only these documents, by index.
    predict_only: bool = False  # Samples without metrics.
    layout: Any | None = None  # sharding.Layout of the model, if it is spread over a mesh.
    progress: Callable[[str, int, int], None] | None = None  # Called with (what, done, total).

    @property
    def longest(self) -> int:
        """The most tokens the model takes, prompt and answer together."""
        return self.config.model.max_length if self.config is not None else self.length

    def select(self, items: Sequence[Item]) -> list[tuple[int, Item]]:
        """(index, item) of the documents to use: those picked, else as many as `limit` allows (a share below 1)."""
        if self.picked is not None:
            missing = [index for index in self.picked if not 0 <= index < len(items)]
            if missing:
                raise EvaluationError(
                    f"document {missing[0]} was asked for, the task has {len(items)}: 0 to {len(items) - 1}"
                )
            return [(index, items[index]) for index in self.picked]
        return list(enumerate(items))[: count(self.limit, len(items))]

    def report(self, what: str, done: int, total: int) -> None:
        """Tells whoever watches how far the work is."""
        if self.progress is not None:
            self.progress(what, done, total)


@dataclasses.dataclass(frozen=True)
class Task:
    """A named task; `run(context)` does it."""

    name: str
    function: Callable[[EvalContext], TaskResult]
    output_type: str  # loglikelihood | loglikelihood_rolling | multiple_choice | generate_until | probe.
    description: str
    defaults: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    group: str = ""
    version: int = 1
    needs_text: bool = False  # Whether it reads the pipeline's documents.
    cluster_key: str = ""  # The field of a sample that names its cluster, where samples are not independent.

    def run(self, context: EvalContext) -> TaskResult:
        """The task with its defaults beneath `context.params`; EvaluationError for a parameter it does not have."""
        return self.function(dataclasses.replace(context, params=self.parameters(context.params)))

    def parameters(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """The defaults with `given` over them, each of the default's type."""
        merged = dict(self.defaults)
        for name, value in given.items():
            if name not in merged:
                raise EvaluationError(unknown(f"parameter of task {self.name}", name, merged or ["none"]))
            merged[name] = _cast(f"{self.name}.{name}", value, merged[name])
        return merged


def count(limit: float, total: int) -> int:
    """How many of `total` documents a limit lets through: 0 all, below 1 that share (at least one), else that many."""
    if limit < 0:
        raise EvaluationError(f"limit must be 0 (all), a share below 1 or a number of documents, got {limit}")
    if limit == 0:
        return total
    if limit < 1:
        return min(total, max(1, round(limit * total)))
    return min(total, int(limit))


def _cast(name: str, value: Any, default: Any) -> Any:
    """`value` as the type of `default`; lists and tuples may come as one element or as text with `:` between."""
    if isinstance(default, tuple):
        items = value.split(":") if isinstance(value, str) else value if isinstance(value, list | tuple) else [value]
        kind = type(default[0]) if default else str
        return tuple(_cast(name, item, kind()) for item in items)
    if isinstance(default, bool):
        if str(value).lower() in ("true", "1", "false", "0"):
            return str(value).lower() in ("true", "1")
        raise EvaluationError(f"{name} must be true or false, got {value!r}")
    if isinstance(default, int | float):
        try:
            number = float(value)
        except (TypeError, ValueError):
            raise EvaluationError(f"{name} must be a number, got {value!r}") from None
        if isinstance(default, int) and number != int(number):
            raise EvaluationError(f"{name} must be a whole number, got {value!r}")
        return int(number) if isinstance(default, int) else number
    return value
