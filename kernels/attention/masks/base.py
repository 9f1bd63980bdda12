"""Masks as values: who may attend to whom, written once, asked pair by pair or block by block.

A mask is a frozen expression over the columns of `kernels.tokens.Tokens`; `&`, `|` and `~` compose them. Every leaf
states its `rule` once, in comparisons of columns. The same rule runs on arrays (then it answers for each pair) and on
`Interval`s (then it answers for whole blocks: can some pair be allowed, must all pairs be). So a new mask is a subclass
of `Mask` with `reads` and `rule`; a mask whose blocks are known otherwise overrides `block_rule` too. Expressions
without array fields are hashable; all are pytrees whose leaves are their `arrays`, so lists made at run time may travel
inside a mask through `jit`.
"""

import dataclasses
import functools
import operator
from collections.abc import Callable, Iterable, Mapping
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int8

from kernels.attention.masks.intervals import Interval, Truth
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
        for path, leaf in self._leaves():
            own = leaf.extra(side, tokens.index.shape[-1])
            columns.update({path + name: column for name, column in own.items()})
        return columns

    def _leaves(self) -> Iterable[tuple[str, "Mask"]]:
        """The masks that are no composition, with the path to each: "1/0/" is the first part of the second part."""
        yield from ((f"{i}/{path}", leaf) for i, part in enumerate(self.parts) for path, leaf in part._leaves())
        if not self.parts:
            yield "", self

    def _of_part(self, i: int, columns: Mapping[str, Any]) -> dict[str, Any]:
        """What part `i` sees: the columns of tokens, and its own."""
        own = f"{i}/"
        return {name.removeprefix(own): x for name, x in columns.items() if name.startswith(own) or "/" not in name}

    def _answers(self, method: str, q: Mapping[str, Any], k: Mapping[str, Any]) -> Iterable[Any]:
        return (getattr(part, method)(self._of_part(i, q), self._of_part(i, k)) for i, part in enumerate(self.parts))

    def pairs(self, q: dict[str, Array], k: dict[str, Array]) -> Any:
        """The rule on arrays already shaped to broadcast against each other (either way round)."""
        return self.rule(SimpleNamespace(**q), SimpleNamespace(**k))

    def block_pairs(self, q: dict[str, Any], k: dict[str, Any]) -> Truth:
        """The rule on blocks: columns are `Interval`s and `Truth`s that broadcast against each other."""
        return self.block_rule(SimpleNamespace(**q), SimpleNamespace(**k))

    def allowed(self, q: Tokens, k: Tokens) -> Bool[Array, "B|1 H|1 T S"]:
        """True where query t may attend to key s; one batch row (or head) where all agree."""
        return self._map(*self.prepare(q, k), q.index.shape[-1], k.index.shape[-1])

    def _map(self, q: dict[str, Array], k: dict[str, Array], length: int, keys: int) -> Bool[Array, "B|1 H|1 T S"]:
        q = {name: column[..., :, None] for name, column in q.items()}
        k = {name: column[..., None, :] for name, column in k.items()}
        answer = jnp.asarray(self.pairs(q, k))
        answer = answer.reshape((1,) * (4 - answer.ndim) + answer.shape)
        return jnp.broadcast_to(answer, (*answer.shape[:2], length, keys))

    def materialise(
        self, q: Tokens | int, k: Tokens | int | None = None, rows: slice = slice(None), keys: slice = slice(None)
    ) -> Bool[Array, "B|1 H|1 T S"]:
        """`allowed` on a slice of the map. An int is a plain sequence of that length; no `k` is self-attention."""
        q = _tokens(q)
        k = q if k is None else _tokens(k)
        chosen = zip(self.prepare(q, k), (q, k), (rows, keys), strict=True)
        sides = [({n: c[..., part] for n, c in side.items()}, t.index[:, part].shape[-1]) for side, t, part in chosen]
        return self._map(sides[0][0], sides[1][0], sides[0][1], sides[1][1])

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
        truth = self.block_pairs(q_blocks, k_blocks)
        xp = jnp if any(isinstance(x, jax.Array) for x in (truth.possible, truth.certain)) else np
        status = xp.where(truth.certain, np.int8(FULL), xp.where(truth.possible, np.int8(PARTIAL), np.int8(EMPTY)))
        status = status.reshape((1,) * (4 - status.ndim) + status.shape)
        return xp.broadcast_to(status, (*status.shape[:2], -(-length // block_q), -(-keys // block_k)))

    def draw(self, length: int | Tokens, *, block: int = 0, head: int = 0) -> Any:
        """A matplotlib figure of the map, with the classes of the blocks shaded where `block` is given."""
        from kernels.attention.masks.picture import draw

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


class Combination(Mask):
    """Several masks, their answers put together by `operation`."""

    terms: tuple[Mask, ...]
    operation: Callable[[Any, Any], Any]
    symbol: str

    @property
    def parts(self) -> tuple[Mask, ...]:
        return self.terms

    def pairs(self, q: dict[str, Array], k: dict[str, Array]) -> Any:
        return functools.reduce(type(self).operation, self._answers("pairs", q, k))

    def block_pairs(self, q: dict[str, Any], k: dict[str, Any]) -> Truth:
        return functools.reduce(type(self).operation, self._answers("block_pairs", q, k))

    def __repr__(self) -> str:
        return "(" + f" {self.symbol} ".join(map(repr, self.terms)) + ")"


@expression
class And(Combination):
    """Allowed by every part."""

    terms: tuple[Mask, ...] = array()
    operation, symbol = staticmethod(operator.and_), "&"


@expression
class Or(Combination):
    """Allowed by some part."""

    terms: tuple[Mask, ...] = array()
    operation, symbol = staticmethod(operator.or_), "|"


@expression
class Not(Mask):
    """Allowed where the part is not."""

    part: Mask = array()

    @property
    def parts(self) -> tuple[Mask, ...]:
        return (self.part,)

    def pairs(self, q: dict[str, Array], k: dict[str, Array]) -> Any:
        (answer,) = self._answers("pairs", q, k)
        return ~answer

    def block_pairs(self, q: dict[str, Any], k: dict[str, Any]) -> Truth:
        (answer,) = self._answers("block_pairs", q, k)
        return ~answer

    def __repr__(self) -> str:
        return f"~{self.part!r}"


@expression
class Everything(Mask):
    def rule(self, q: Any, k: Any) -> Any:
        return np.ones((1, 1, 1, 1), bool)


def _tokens(tokens: Tokens | int) -> Tokens:
    return tokens if isinstance(tokens, Tokens) else Tokens(index=np.arange(tokens, dtype=np.int32)[None])


def _flat(kind: Any, *masks: Any) -> tuple[Mask, ...]:
    return tuple(term for mask in masks for term in (mask.terms if isinstance(mask, kind) else (mask,)))


def _bounds(column: Array, block: int, axis: int) -> Interval | Truth:
    """Least and greatest value of a [B|1, H|1, T] column in each block of tokens, with an axis of size 1 put in."""
    xp = jnp if isinstance(column, jax.Array) else np
    column = xp.pad(column, ((0, 0), (0, 0), (0, -column.shape[-1] % block)), mode="edge")  # Repeats move no bound.
    column = column.reshape(*column.shape[:2], -1, block)
    low, high = (xp.expand_dims(bound, axis) for bound in (column.min(-1), column.max(-1)))
    return Truth(possible=high, certain=low) if column.dtype == bool else Interval(low, high)
