"""Everything elementwise between q.k and the softmax as one small program that kernels run on blocks of the map.

Kernels know matrix products and softmax. What a caller adds to them (scale, soft cap, bias, a function on scores, the
rule of a mask, dropout) is traced here and cut in two. Whatever depends on queries alone or on keys alone, gathers and
lookups included, is computed outside by JAX, which differentiates it too, and enters the kernel as a `Streams` column.
What is left depends on scores or on pairs; it must be elementwise, and a kernel evaluates it on rank-2 blocks.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import dtypes
from jax.extend import core
from jaxtyping import Array

from kernels.attention import dropout
from kernels.attention.masks import Everything, Mask
from kernels.attention.scores import Places
from kernels.tokens import Tokens

# Primitives that a kernel evaluates on a block just as JAX does on the map.
ELEMENTWISE = frozenset(
    "abs add and atan2 ceil clamp convert_element_type copy cos div eq erf exp exp2 expm1 floor ge gt integer_pow "
    "is_finite le log log1p log2 logistic lt max min mul ne neg not or pow rem round rsqrt select_n shift_left "
    "shift_right_arithmetic shift_right_logical sign sin sqrt square stop_gradient sub tan tanh xor".split()
)
# Primitives that only rearrange the leading axes of a map, which a block does not have.
_RESHAPING = frozenset(("broadcast_in_dim", "reshape", "squeeze", "expand_dims"))
_INLINED = {
    "jit": "jaxpr",
    "pjit": "jaxpr",
    "closed_call": "call_jaxpr",
    "custom_jvp_call": "call_jaxpr",
    "custom_vjp_call": "call_jaxpr",
}
_QUERY, _KEY, _SCORE = 1, 2, 4  # What a value depends on.
_MAP = (_SCORE, _SCORE | _QUERY, _SCORE | _KEY, _SCORE | _QUERY | _KEY, _QUERY | _KEY)


class Streams(NamedTuple):
    """What enters a kernel beside q, k and v: float32 or int32 columns, and at most one whole map."""

    rows: tuple[Array, ...]  # [B|1, H|1, T]
    cols: tuple[Array, ...]  # [B|1, H|1, S]
    tile: Array | None  # [B|1, H|1, T, S]


@dataclasses.dataclass(frozen=True, eq=False)
class Function:
    """One elementwise function of a block: equations over `inputs`, which say where each argument comes from."""

    equations: tuple[Any, ...]
    inputs: tuple[tuple[Any, tuple[str, int]], ...]  # (variable, ("score" | "row" | "col" | "tile", number)).
    output: Any

    def reads(self, kind: str) -> tuple[int, ...]:
        """Numbers of the streams "row", "col" or "tile" that it needs."""
        return tuple(sorted({n for _, (name, n) in self.inputs if name == kind}))

    def __call__(self, s: Any, rows: Sequence[Any], cols: Sequence[Any], tile: Any) -> Array:
        sources = {"score": (s,), "row": rows, "col": cols, "tile": (tile,)}
        given = [sources[kind][n] for _, (kind, n) in self.inputs]
        shape = np.broadcast_shapes(*(x.shape for x in given)) if s is None else s.shape
        env = {}
        for (var, _), value in zip(self.inputs, given, strict=True):
            value = jnp.broadcast_to(value, shape)
            env[var] = value != 0 if var.aval.dtype == bool else value.astype(var.aval.dtype)

        def read(atom: Any) -> Array:
            if isinstance(atom, core.Literal):
                return jnp.full(shape, atom.val, atom.aval.dtype)  # type: ignore[attr-defined]
            return env[atom]

        for eqn in self.equations:
            if eqn.primitive.name in _RESHAPING:
                env[eqn.outvars[0]] = read(eqn.invars[0])
            else:
                env[eqn.outvars[0]] = eqn.primitive.bind(*map(read, eqn.invars), **eqn.params)
        return read(self.output)


@dataclasses.dataclass(frozen=True, eq=False)
class Program:
    """What a kernel does to a block [bq, bk] of one batch row and head.

    `rows` are blocks [bq, 1] or [bq, bk] of `Streams.rows`, `cols` [1, bk] or [bq, bk], `tile` [bq, bk]; columns that a
    function does not read may be None.
    """

    scale: float
    linear: bool  # Scores are `scale` times q.k and nothing else.
    change: Function
    mask: Function | None
    drop: Function | None
    rate: float  # Of dropout.
    row_types: tuple[Any, ...]
    col_types: tuple[Any, ...]
    has_tile: bool

    def scores(self, s: Array, rows: Sequence[Any] = (), cols: Sequence[Any] = (), tile: Any = None) -> Array:
        """Changed scores from raw products q.k, float32."""
        return s * self.scale if self.linear else self.change(s, rows, cols, tile)

    def scores_and_pull(
        self, s: Array, rows: Sequence[Any] = (), cols: Sequence[Any] = (), tile: Any = None
    ) -> tuple[
        Array, Callable[[Array], tuple[Array, tuple[Array | None, ...], tuple[Array | None, ...], Array | None]]
    ]:
        """Changed scores, and what makes of their gradient those of s, rows, cols and tile, each [bq, bk].

        Streams without gradient (integers, those not read) give None.
        """
        read = {kind: self.change.reads(kind) for kind in ("row", "col", "tile")}
        wide_rows = self._differentiable(rows, self.row_types, read["row"], s.shape)
        wide_cols = self._differentiable(cols, self.col_types, read["col"], s.shape)

        def changed(s: Array, wide_rows: dict, wide_cols: dict, tile: Any) -> Array:
            return self.scores(
                s,
                [wide_rows.get(n, x) for n, x in enumerate(rows)],
                [wide_cols.get(n, x) for n, x in enumerate(cols)],
                tile,
            )

        out, pull = jax.vjp(changed, s, wide_rows, wide_cols, tile)

        def pulled(ds: Array) -> Any:
            ds, d_rows, d_cols, d_tile = pull(ds)
            return (
                ds,
                tuple(d_rows.get(n) for n in range(len(self.row_types))),
                tuple(d_cols.get(n) for n in range(len(self.col_types))),
                d_tile,
            )

        return out, pulled

    @staticmethod
    def _differentiable(
        columns: Sequence[Any], types: Sequence[Any], read: Sequence[int], shape: Any
    ) -> dict[int, Array]:
        return {n: jnp.broadcast_to(columns[n], shape) for n in read if types[n] == np.float32}

    def allowed(self, rows: Sequence[Any] = (), cols: Sequence[Any] = ()) -> Array | None:
        """Whether the mask allows each pair; None where there is no mask."""
        return None if self.mask is None else self.mask(None, rows, cols, None)

    def kept(self, rows: Sequence[Any] = (), cols: Sequence[Any] = ()) -> Array | None:
        """Whether dropout keeps each probability (then divided by 1 - rate); None without dropout."""
        return None if self.drop is None else self.drop(None, rows, cols, None)

    def float_rows(self) -> tuple[int, ...]:
        """Numbers of the rows that have a gradient."""
        return tuple(n for n in self.change.reads("row") if self.row_types[n] == np.float32)

    def float_cols(self) -> tuple[int, ...]:
        """Numbers of the columns that have a gradient."""
        return tuple(n for n in self.change.reads("col") if self.col_types[n] == np.float32)

    def jaxpr(self, which: str, shape: tuple[int, ...]) -> Any:
        """The closed jaxpr of one function on whole blocks: every operand is [bq, bk], every primitive elementwise.

        "scores" takes (s, *rows, *cols, tile?), "pull" the same and then ds, and gives ds of s, of `float_rows()`, of
        `float_cols()`, of tile; "allowed" and "kept" take (*rows, *cols).
        """
        count, more = len(self.row_types), len(self.col_types)
        columns = [jax.ShapeDtypeStruct(shape, t) for t in (*self.row_types, *self.col_types)]
        square = [jax.ShapeDtypeStruct(shape, np.float32)]
        tile = square if self.has_tile else []

        def split(columns: Sequence[Array]) -> tuple[Any, Any, Any]:
            return columns[:count], columns[count : count + more], columns[-1] if self.has_tile else None

        def pull(s: Array, *rest: Array) -> Any:
            ds, d_rows, d_cols, d_tile = self.scores_and_pull(s, *split(rest[:-1]))[1](rest[-1])
            return ds, *(d_rows[n] for n in self.float_rows()), *(d_cols[n] for n in self.float_cols()), *(
                [d_tile] if self.has_tile else []
            )  # fmt: skip

        functions: dict[str, tuple[Any, list]] = {
            "scores": (lambda s, *rest: self.scores(s, *split(rest)), [*square, *columns, *tile]),
            "pull": (pull, [*square, *columns, *tile, *square]),
            "allowed": (lambda *rest: self.allowed(rest[:count], rest[count:]), columns),
            "kept": (lambda *rest: self.kept(rest[:count], rest[count:]), columns),
        }
        function, operands = functions[which]
        return jax.make_jaxpr(function)(*operands)


@dataclasses.dataclass
class _Columns:
    """The streams found so far, the same one only once."""

    rows: list[Array] = dataclasses.field(default_factory=list)
    cols: list[Array] = dataclasses.field(default_factory=list)
    tile: list[Array] = dataclasses.field(default_factory=list)
    known: dict[Any, tuple[Any, tuple[str, int]]] = dataclasses.field(default_factory=dict)

    def place(self, x: Any, length: int, keys: int) -> tuple[str, int]:
        """Where a value that broadcasts against the map [B, H, T, S] is streamed."""
        key = (x.shape, str(x.dtype), x.tobytes()) if isinstance(x, np.ndarray) else id(x)
        if key not in self.known:
            self.known[key] = x, self._placed(x, length, keys)  # Keeps x, so that no other gets its id.
        return self.known[key][1]

    def _placed(self, x: Any, length: int, keys: int) -> tuple[str, int]:
        kind = np.float32 if jnp.issubdtype(x.dtype, jnp.floating) else np.int32
        if x.dtype != kind:
            x = x.astype(kind)
        x = x.reshape((1,) * (4 - x.ndim) + x.shape)
        if x.shape[2] == 1 and x.shape[3] == keys:
            self.cols.append(x[:, :, 0])
            return "col", len(self.cols) - 1
        if x.shape[3] == 1:
            xp = np if isinstance(x, np.ndarray) else jnp
            self.rows.append(xp.broadcast_to(x[..., 0], (*x.shape[:2], length)))
            return "row", len(self.rows) - 1
        if self.tile:
            raise NotImplementedError(
                "two arrays over all pairs (a whole bias, or an array of score_mod): add them up first"
            )
        self.tile.append(x)
        return "tile", 0


def build(
    q: tuple[int, ...],
    k: tuple[int, ...],
    *,
    mask: Mask,
    q_tokens: Tokens,
    k_tokens: Tokens,
    scale: float,
    soft_cap: float,
    bias: Array | None,
    score_mod: Callable[..., Array] | None,
    score_arrays: tuple[Array, ...],
    rate: float = 0.0,
    seed: Array | None = None,
) -> tuple[Program, Streams]:
    """The program of one call on q [B, T, H, D] and k [B, S, Hk, D] (their shapes are given), and what it reads.

    Raises: `NotImplementedError`, naming the operation, where something is not elementwise.
    """
    (batch, length, heads, _), keys = q, k[1]
    columns, whole = _Columns(), (batch, heads, length, keys)
    score = jax.ShapeDtypeStruct(whole, np.float32)
    if bias is not None:
        bias = bias.reshape((1,) * (4 - bias.ndim) + bias.shape)
        bias = jnp.broadcast_to(
            bias, (*bias.shape[:2], length if bias.shape[2:] == (1, 1) else bias.shape[2], bias.shape[3])
        )
    places = (
        *(np.arange(n, dtype=np.int32).reshape((1,) * i + (n,) + (1,) * (3 - i)) for i, n in enumerate(whole)),
        q_tokens,
        k_tokens,
    )

    def change(s: Array, bias: Any, arrays: Any, places: Any) -> Array:
        s = s * scale
        if soft_cap:
            s = soft_cap * jnp.tanh(s / soft_cap)
        if bias is not None:
            s = s + bias.astype(s.dtype)
        return s if score_mod is None else score_mod(s, Places(*places), *arrays).astype(s.dtype)

    q_columns, k_columns = mask.prepare(q_tokens, k_tokens)
    sides = (
        {name: column[..., :, None] for name, column in q_columns.items()},
        {name: column[..., None, :] for name, column in k_columns.items()},
    )
    place = functools.partial(columns.place, length=length, keys=keys)
    arguments = (bias, score_arrays, places)
    changed = _function("score_mod", change, arguments, _dependence(*arguments), place, score)
    masked = None
    if not isinstance(mask, Everything):
        masked = _function(f"mask {mask}", lambda *sides: jnp.asarray(mask.pairs(*sides)), sides, _sides(sides), place)
    dropped = None
    if rate:
        row, col = dropout.columns(seed, batch, heads, length, keys)
        hashes = row[..., :, None], col[..., None, :]
        dropped = _function("dropout", lambda *hashes: dropout.kept(*hashes, rate), hashes, _sides(hashes), place)
    return Program(
        scale=scale,
        linear=not (soft_cap or score_mod or bias is not None),
        change=changed,
        mask=masked,
        drop=dropped,
        rate=rate,
        row_types=tuple(x.dtype for x in columns.rows),
        col_types=tuple(x.dtype for x in columns.cols),
        has_tile=bool(columns.tile),
    ), Streams(tuple(columns.rows), tuple(columns.cols), columns.tile[0] if columns.tile else None)


def with_inside(program: Program, streams: Streams, keys: int, padded: int) -> tuple[Program, Streams]:
    """The same where only the first `keys` of `padded` key places hold a key."""
    if keys == padded:
        return program, streams
    inside: Any = (np.arange(padded) < keys).astype(np.int32)[None, None]
    number, variable = len(streams.cols), _boolean()
    if program.mask is None:
        mask = Function((), ((variable, ("col", number)),), variable)
    else:
        closed = jax.make_jaxpr(jnp.logical_and)(*2 * (jax.ShapeDtypeStruct((1, 1), bool),))
        (both,), (first, second) = closed.jaxpr.eqns, closed.jaxpr.invars
        renamed = both.replace(invars=[program.mask.output, variable])
        assert {first, second} == set(both.invars)
        mask = Function(
            (*program.mask.equations, renamed), (*program.mask.inputs, (variable, ("col", number))), both.outvars[0]
        )
    program = dataclasses.replace(program, mask=mask, col_types=(*program.col_types, np.dtype(np.int32)))
    return program, streams._replace(cols=(*streams.cols, inside))


def _boolean() -> Any:
    return jax.make_jaxpr(jnp.logical_not)(jax.ShapeDtypeStruct((1, 1), bool)).jaxpr.invars[0]


def _sides(sides: Any) -> Any:
    q, k = sides
    return jax.tree.map(lambda _: _QUERY, q), jax.tree.map(lambda _: _KEY, k)


def _dependence(bias: Any, arrays: Any, places: tuple[Any, ...]) -> Any:
    """What each array of (bias, score_arrays, places) depends on; bias and arrays are what they are: nothing."""
    *_, q, k = places
    nothing = jax.tree.map(lambda _: 0, (bias, arrays))
    return *nothing, (0, 0, _QUERY, _KEY, jax.tree.map(lambda _: _QUERY, q), jax.tree.map(lambda _: _KEY, k))


def _function(
    subject: str, function: Callable[..., Array], arguments: Any, dependence: Any,
    place: Callable[[Any], tuple[str, int]], score: Any = None,
) -> Function:  # fmt: skip
    """Traces `function(score?, *arguments)` and cuts it into columns, given to `place`, and a `Function` of blocks."""
    leaves = jax.tree.leaves(arguments)
    kinds = [*([_SCORE] if score is not None else []), *jax.tree.leaves(dependence)]
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, dtypes.canonicalize_dtype(x.dtype)), arguments)
    closed = jax.make_jaxpr(function)(*([] if score is None else [score]), *shapes)
    tracing = _Tracing(subject, place)
    values = [*([] if score is None else [None]), *leaves]
    env: dict[Any, _Value] = {}
    for var, kind, value in zip(closed.jaxpr.invars, kinds, values, strict=True):
        env[var] = _Value(kind, var, known=value)
    for var, value in zip(closed.jaxpr.constvars, closed.consts, strict=True):
        env[var] = _Value(0, var, known=value)
    if score is not None:
        tracing.inputs[closed.jaxpr.invars[0]] = ("score", 0)
    (out,) = tracing.run(closed.jaxpr, env)
    output = tracing.atom(out)
    return Function(tuple(tracing.equations), tuple(tracing.inputs.items()), output)


@dataclasses.dataclass(eq=False)
class _Value:
    """A value while a function is cut: a map value is a variable of the kernel, any other is computed when needed."""

    kind: int
    atom: Any  # Variable or literal that stands for it in the kernel.
    known: Any = None
    compute: Callable[[], Any] | None = None
    narrow: Callable[[], Any] | None = None  # Before it was broadcast, aligned with its axes.

    @property
    def is_map(self) -> bool:
        return self.kind in _MAP

    def get(self) -> Any:
        if self.known is None:
            self.known = self.compute()
        return self.known


class _Tracing:
    def __init__(self, subject: str, place: Callable[[Any], tuple[str, int]]):
        self.subject, self.place = subject, place
        self.equations: list[Any] = []
        self.inputs: dict[Any, tuple[str, int]] = {}

    def run(self, jaxpr: Any, env: dict[Any, _Value]) -> list[_Value]:
        def read(atom: Any) -> _Value:
            return _Value(0, atom, known=atom.val) if isinstance(atom, core.Literal) else env[atom]

        for eqn in jaxpr.eqns:
            inputs = [read(atom) for atom in eqn.invars]
            kind = functools.reduce(int.__or__, (x.kind for x in inputs), 0)
            name = eqn.primitive.name
            if name in _INLINED:
                inner = eqn.params[_INLINED[name]]
                inner, consts = (inner.jaxpr, inner.consts) if hasattr(inner, "jaxpr") else (inner, ())
                scope = dict(zip(inner.invars, inputs, strict=True))
                scope.update({v: _Value(0, v, known=c) for v, c in zip(inner.constvars, consts, strict=True)})
                env.update(zip(eqn.outvars, self.run(inner, scope), strict=True))
            elif kind in _MAP:
                env[eqn.outvars[0]] = self._in_kernel(eqn, inputs, kind)
            else:
                self._outside(eqn, inputs, kind, env)
        return [read(atom) for atom in jaxpr.outvars]

    def _in_kernel(self, eqn: Any, inputs: list[_Value], kind: int) -> _Value:
        name, (out,) = eqn.primitive.name, eqn.outvars
        if name in _RESHAPING:
            before, after = eqn.invars[0].aval.shape, out.aval.shape
            moved = name == "broadcast_in_dim" and eqn.params["broadcast_dimensions"][-2:] != (
                len(after) - 2,
                len(after) - 1,
            )
            if before[-2:] != after[-2:] or moved:
                raise NotImplementedError(
                    f"{self.subject} reshapes what belongs to pairs of queries and keys from {before} to {after}, as a "
                    "lookup by pair does; kernels do elementwise operations there"
                )
        elif name not in ELEMENTWISE:
            raise NotImplementedError(
                f"{self.subject} uses {name!r} on pairs of queries and keys; kernels do elementwise operations there"
            )
        self.equations.append(eqn.replace(invars=[self.atom(x) for x in inputs]))
        return _Value(kind, out)

    def _outside(self, eqn: Any, inputs: list[_Value], kind: int, env: dict[Any, _Value]) -> None:
        @functools.cache
        def compute() -> list[Any]:
            results = eqn.primitive.bind(*(jnp.asarray(x.get()) for x in inputs), **eqn.params)
            return results if eqn.primitive.multiple_results else [results]

        for n, out in enumerate(eqn.outvars):
            env[out] = _Value(kind, out, compute=lambda n=n: compute()[n])
        if eqn.primitive.name in ELEMENTWISE and any(x.narrow for x in inputs):

            def narrowed() -> Any:
                parts = [jnp.asarray((x.narrow or x.get)()) for x in inputs]
                shape = np.broadcast_shapes(*(x.shape for x in parts))
                return eqn.primitive.bind(*(jnp.broadcast_to(x, shape) for x in parts), **eqn.params)

            env[eqn.outvars[0]].narrow = narrowed
        if eqn.primitive.name == "broadcast_in_dim":
            shape, axes = [1] * len(eqn.params["shape"]), eqn.params["broadcast_dimensions"]
            for axis, size in zip(axes, eqn.invars[0].aval.shape, strict=True):
                shape[axis] = size
            (source,) = inputs
            narrow = source.narrow or source.get
            env[eqn.outvars[0]].narrow = lambda: narrow() if source.narrow else narrow().reshape(shape)
            if isinstance(source.atom, core.Literal):
                env[eqn.outvars[0]].atom = source.atom

    def atom(self, value: _Value) -> Any:
        """What stands for a value in the kernel; a value from outside becomes a stream."""
        if value.is_map or isinstance(value.atom, core.Literal) or value.atom in self.inputs:
            return value.atom
        x = (value.narrow or value.get)()
        self.inputs[value.atom] = self.place(x)
        return value.atom
