"""Masks as values: who may attend to whom, written once, asked pair by pair or block by block.

A mask is a frozen expression over the columns of `kernels.tokens.Tokens`; `&`, `|` and `~` compose them. Every leaf
states its `rule` once, in comparisons of columns. The same rule runs on arrays (then it answers for each pair) and on
`Interval`s (then it answers for whole blocks: can some pair be allowed, must all pairs be). So a new mask is a subclass
of `Mask` with `reads` and `rule`; a mask whose blocks are known otherwise overrides `block_rule` too. Expressions
without array fields are hashable; all are pytrees whose leaves are their `arrays`, so lists made at run time may travel
inside a mask through `jit`.
"""

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int8

from kernels.attention.intervals import Interval, Truth
from kernels.tokens import Tokens

EMPTY, PARTIAL, FULL = 0, 1, 2

# What an absent column means. `segment` may be absent on both sides only: one alone says nothing about the other.
_DEFAULTS = {"segment": 0, "start": 0, "valid": True}


def expression(cls: type) -> type:
    """Class decorator of a mask: a frozen dataclass and a pytree (masks and fields marked `array()` are children)."""
    cls = dataclasses.dataclass(frozen=True, repr=False)(cls)
    children = [field.name for field in dataclasses.fields(cls) if field.metadata.get("child")]
    static = [field.name for field in dataclasses.fields(cls) if not field.metadata.get("child")]
    return jax.tree_util.register_dataclass(cls, data_fields=children, meta_fields=static)


def array(**options: Any) -> Any:
    """A dataclass field that holds an array or other masks rather than a static parameter."""
    return dataclasses.field(metadata={"child": True}, **options)


class Mask:
    """Base of all masks. Subclasses give `reads` (such as "q.index") and `rule(q, k)`."""

    reads: tuple[str, ...] = ()

    def rule(self, q: Any, k: Any) -> Any:
        """Whether q may attend to k, from `q.<column>` and `k.<column>` as declared in `reads`."""
        raise NotImplementedError(f"{type(self).__name__} has no rule")

    def block_rule(self, q: Any, k: Any) -> Truth:
        """The rule for whole blocks: the columns are `Interval`s (numbers) or `Truth`s (booleans)."""
        return Truth.of(self.rule(q, k))

    @property
    def parts(self) -> tuple["Mask", ...]:
        """The masks this one is made of."""
        return ()

    def extra(self, side: str, length: int) -> dict[str, Array]:
        """Columns [B|1, H|1, length] of the mask's own beside those of the tokens, such as a window per head."""
        return {}

    @property
    def columns(self) -> frozenset[str]:
        """Names of the `Tokens` columns the mask reads, on either side."""
        return self.columns_of("q") | self.columns_of("k")

    def columns_of(self, side: str) -> frozenset[str]:
        """Names of the columns the mask reads on side "q" or "k"."""
        own = {name.split(".")[1] for name in self.reads if name.startswith(side + ".")}
        return frozenset(own).union(*(part.columns_of(side) for part in self.parts))

    def prepare(self, q: Tokens, k: Tokens) -> tuple[dict[str, Array], dict[str, Array]]:
        """The columns the mask reads as two dictionaries of [B|1, H|1, T] and [.., S]; the only thing a kernel loads.

        Raises `ValueError` where a column that has no default is absent.
        """
        return self._side("q", q, k), self._side("k", k, q)

    def _side(self, side: str, tokens: Tokens, other: Tokens) -> dict[str, Array]:
        columns = {}
        for name in sorted(self.columns_of(side)):
            column = getattr(tokens, name)
            lonely = name == "segment" and (column is None) != (other.segment is None)
            if column is None and (lonely or name not in _DEFAULTS):
                raise ValueError(f"mask {self} reads {side}.{name}, which these tokens lack: give Tokens({name}=...)")
            if column is None:
                column = np.full((1, tokens.index.shape[-1]), _DEFAULTS[name])
            columns[name] = column[:, None]
        for mask in self._leaves():
            for name, column in mask.extra(side, tokens.index.shape[-1]).items():
                if name in columns:
                    raise ValueError(f"mask {self}: two parts bring a column {side}.{name}")
                columns[name] = column
        return columns

    def _leaves(self) -> Iterable["Mask"]:
        yield from (leaf for part in self.parts for leaf in part._leaves())
        if not self.parts:
            yield self

    def pairs(self, q: dict[str, Array], k: dict[str, Array]) -> Any:
        """The rule on arrays already shaped to broadcast against each other (either way round)."""
        return self.rule(SimpleNamespace(**q), SimpleNamespace(**k))

    def allowed(self, q: Tokens, k: Tokens) -> Bool[Array, "B|1 H|1 T S"]:
        """True where query t may attend to key s; one batch row (or head) where all agree."""
        q_columns, k_columns = self.prepare(q, k)
        q_columns = {name: column[..., :, None] for name, column in q_columns.items()}
        k_columns = {name: column[..., None, :] for name, column in k_columns.items()}
        answer = jnp.asarray(self.pairs(q_columns, k_columns))
        answer = answer.reshape((1,) * (4 - answer.ndim) + answer.shape)
        return jnp.broadcast_to(answer, (*answer.shape[:2], q.index.shape[-1], k.index.shape[-1]))

    def materialise(
        self, q: Tokens | int, k: Tokens | int | None = None, rows: slice = slice(None), keys: slice = slice(None)
    ) -> Bool[Array, "B|1 H|1 T S"]:
        """`allowed` on a slice of the map. An int is a plain sequence of that length; no `k` is self-attention."""
        q = _tokens(q)
        k = q if k is None else _tokens(k)
        return self.allowed(q.map(lambda column: column[:, rows]), k.map(lambda column: column[:, keys]))

    def classify(self, q: Tokens, k: Tokens, block_q: int, block_k: int) -> Int8[Array, "B|1 H|1 nq nk"]:
        """EMPTY, PARTIAL or FULL for every block, without looking at pairs; NumPy in, NumPy out.

        Conservative: a block called EMPTY holds no allowed pair, one called FULL no forbidden one; PARTIAL may be any.
        """
        return self.classify_columns(*self.prepare(q, k), block_q, block_k, q.index.shape[-1], k.index.shape[-1])

    def classify_columns(
        self, q: Mapping[str, Any], k: Mapping[str, Any], block_q: int, block_k: int, length: int, keys: int
    ) -> Int8[Array, "B|1 H|1 nq nk"]:
        """`classify` on the columns that `prepare` gave."""
        q_blocks = {name: _bounds(column, block_q, 3) for name, column in q.items()}
        k_blocks = {name: _bounds(column, block_k, 2) for name, column in k.items()}
        truth = self.block_rule(SimpleNamespace(**q_blocks), SimpleNamespace(**k_blocks))
        xp = jnp if any(isinstance(x, jax.Array) for x in (truth.possible, truth.certain)) else np
        status = xp.where(truth.certain, np.int8(FULL), xp.where(truth.possible, np.int8(PARTIAL), np.int8(EMPTY)))
        status = status.reshape((1,) * (4 - status.ndim) + status.shape)
        return xp.broadcast_to(status, (*status.shape[:2], -(-length // block_q), -(-keys // block_k)))

    def draw(self, length: int | Tokens, *, block: int = 0, head: int = 0) -> Any:
        """A matplotlib figure of the map, with the classes of the blocks shaded where `block` is given."""
        from kernels.attention.picture import draw

        return draw(self, _tokens(length), block=block, head=head)

    def __and__(self, other: "Mask") -> "Mask":
        if isinstance(self, Everything) or isinstance(other, Everything):
            return other if isinstance(self, Everything) else self
        return And(_flat(And, self, other))

    def __or__(self, other: "Mask") -> "Mask":
        if isinstance(self, Everything) or isinstance(other, Everything):
            return Everything()
        return Or(_flat(Or, self, other))

    def __invert__(self) -> "Mask":
        return self.part if isinstance(self, Not) else Not(self)

    def __repr__(self) -> str:
        values = ", ".join(repr(getattr(self, field.name)) for field in dataclasses.fields(self))  # type: ignore[arg-type]
        return f"{getattr(self, 'name', type(self).__name__.lower())}({values})"


@expression
class And(Mask):
    """Allowed by every part."""

    terms: tuple[Mask, ...] = array()

    @property
    def parts(self) -> tuple[Mask, ...]:
        return self.terms

    def pairs(self, q: dict[str, Array], k: dict[str, Array]) -> Any:
        return _fold(lambda a, b: a & b, (term.pairs(q, k) for term in self.terms))

    def block_rule(self, q: Any, k: Any) -> Truth:
        return _fold(lambda a, b: a & b, (term.block_rule(q, k) for term in self.terms))

    def __repr__(self) -> str:
        return "(" + " & ".join(map(repr, self.terms)) + ")"


@expression
class Or(Mask):
    """Allowed by some part."""

    terms: tuple[Mask, ...] = array()

    @property
    def parts(self) -> tuple[Mask, ...]:
        return self.terms

    def pairs(self, q: dict[str, Array], k: dict[str, Array]) -> Any:
        return _fold(lambda a, b: a | b, (term.pairs(q, k) for term in self.terms))

    def block_rule(self, q: Any, k: Any) -> Truth:
        return _fold(lambda a, b: a | b, (term.block_rule(q, k) for term in self.terms))

    def __repr__(self) -> str:
        return "(" + " | ".join(map(repr, self.terms)) + ")"


@expression
class Not(Mask):
    """Allowed where the part is not."""

    part: Mask = array()

    @property
    def parts(self) -> tuple[Mask, ...]:
        return (self.part,)

    def pairs(self, q: dict[str, Array], k: dict[str, Array]) -> Any:
        return ~self.part.pairs(q, k)

    def block_rule(self, q: Any, k: Any) -> Truth:
        return ~self.part.block_rule(q, k)

    def __repr__(self) -> str:
        return f"~{self.part!r}"


@expression
class Everything(Mask):
    def rule(self, q: Any, k: Any) -> Any:
        return np.ones((1, 1, 1, 1), bool)


@expression
class Causal(Mask):
    reads = ("q.index", "k.index")

    def rule(self, q: Any, k: Any) -> Any:
        return q.index >= k.index


@expression
class SlidingWindow(Mask):
    size: int
    name = "sliding_window"
    reads = ("q.index", "k.index")

    def rule(self, q: Any, k: Any) -> Any:
        return q.index - k.index < self.size


@expression
class SinkTokens(Mask):
    count: int
    name = "sink_tokens"
    reads = ("k.index", "k.start")

    def rule(self, q: Any, k: Any) -> Any:
        return k.index - k.start < self.count


@expression
class Segments(Mask):
    reads = ("q.segment", "k.segment")

    def rule(self, q: Any, k: Any) -> Any:
        return q.segment == k.segment


@expression
class Valid(Mask):
    reads = ("k.valid",)

    def rule(self, q: Any, k: Any) -> Any:
        return k.valid


@expression
class Prefix(Mask):
    reads = ("k.prompt",)

    def rule(self, q: Any, k: Any) -> Any:
        return k.prompt


@expression
class Predicate(Mask):
    function: Callable[[Any, Any], Any]
    by_block: bool
    reads: tuple[str, ...] = ()

    def rule(self, q: Any, k: Any) -> Any:
        return self.function(q, k)

    def block_rule(self, q: Any, k: Any) -> Truth:
        return Truth.of(self.function(q, k)) if self.by_block else Truth.unknown()

    def __repr__(self) -> str:
        return f"predicate({getattr(self.function, '__name__', self.function)})"


def everything() -> Mask:
    """Every query attends to every key."""
    return Everything()


def causal() -> Mask:
    """Keys that do not come after the query: q.index >= k.index."""
    return Causal()


def sliding_window(size: int) -> Mask:
    """Keys less than `size` before the query (the query's own place counts); alone it does not hide the future."""
    if size < 1:
        raise ValueError(f"sliding_window needs a size of at least 1, not {size}")
    return SlidingWindow(int(size))


def sink_tokens(count: int) -> Mask:
    """The first `count` keys of each document (StreamingLLM, Xiao et al. 2023)."""
    if count < 0:
        raise ValueError(f"sink_tokens needs a count of at least 0, not {count}")
    return SinkTokens(int(count))


def segments() -> Mask:
    """Keys of the query's own packed document."""
    return Segments()


def valid() -> Mask:
    """Keys that are no padding."""
    return Valid()


def prefix(length: int | None = None) -> Mask:
    """Keys of the prompt (column `prompt`), or the first `length` keys: `causal() | prefix()` is a prefix LM."""
    return Prefix() if length is None else sink_tokens(length)


def predicate(
    function: Callable[[Any, Any], Any], reads: Iterable[str] = ("q.index", "k.index"), *, by_block: bool = False
) -> Mask:
    """Any rule on token columns: `function(q, k)` sees the columns named in `reads` and returns booleans.

    Blocks are skipped only with `by_block=True`, which promises that `function` uses nothing but comparisons, `+ - *`,
    `//` by a positive number, and `& | ~`, so that it also runs on intervals.
    """
    reads = tuple(reads)
    for name in reads:
        side, _, column = name.partition(".")
        if side not in ("q", "k") or column not in {field.name for field in dataclasses.fields(Tokens)}:
            raise ValueError(f"predicate reads {name!r}: expected q.<column> or k.<column> with a column of Tokens")
    return Predicate(function, by_block, reads)


def _tokens(tokens: Tokens | int) -> Tokens:
    return tokens if isinstance(tokens, Tokens) else Tokens(index=np.arange(tokens, dtype=np.int32)[None])


def _flat(kind: Any, *masks: Any) -> tuple[Mask, ...]:
    return tuple(term for mask in masks for term in (mask.terms if isinstance(mask, kind) else (mask,)))


def _fold(function: Callable[[Any, Any], Any], items: Iterable[Any]) -> Any:
    items = iter(items)
    answer = next(items)
    for item in items:
        answer = function(answer, item)
    return answer


def _bounds(column: Array, block: int, axis: int) -> Interval | Truth:
    """Least and greatest value of a [B|1, H|1, T] column in each block of tokens, with an axis of size 1 put in."""
    xp = jnp if isinstance(column, jax.Array) else np
    column = xp.pad(column, ((0, 0), (0, 0), (0, -column.shape[-1] % block)), mode="edge")  # Repeats move no bound.
    column = column.reshape(*column.shape[:2], -1, block)
    low, high = (xp.expand_dims(bound, axis) for bound in (column.min(-1), column.max(-1)))
    return Truth(possible=high, certain=low) if column.dtype == bool else Interval(low, high)
