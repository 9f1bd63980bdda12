"""The columns that a call's program reads, brought from global memory to where scores lie in registers."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.extend.core import Literal

from kernels import _compat
from kernels._mosaic_gpu import COL, ROW, TILE, Visits, of
from kernels.attention.program import Function, Program, Streams


def _floor(x: Array) -> Array:
    nearest = lax.round(x, lax.RoundingMethod.TO_NEAREST_EVEN)
    return jnp.where(nearest > x, nearest - 1, nearest)


def _log1p(x: Array) -> Array:
    more = 1 + x  # As rounded; the quotient makes up for that (Kahan).
    return jnp.where((more == 1) | (x == jnp.inf), x, jnp.log(more) * (x / jnp.where(more == 1, 1, more - 1)))


def _tanh(x: Array) -> Array:
    """Exact to 1e-7, absolutely; the GPU's own instruction only to 5e-4, and the library's takes five times as long."""
    return 1 - 2 / (1 + jnp.exp2(x * (2 * math.log2(math.e))))


def _integer_pow(x: Array, *, y: int) -> Array:
    if y < 0:
        return 1 / _integer_pow(x, y=-y)
    return jnp.ones_like(x) if y == 0 else x if y == 1 else lax.integer_pow(x, y)


# Elementwise operations that Mosaic GPU lacks, in one version of jax or the other, or does badly, by those it has.
REWRITTEN: dict[str, Callable[..., Array]] = {
    "add_any": lax.add,
    "ceil": lambda x: -_floor(-x),
    "copy": lambda x: x,
    "expm1": lambda x: _tanh(x / 2) * (jnp.exp(x) + 1),
    "floor": _floor,
    "integer_pow": _integer_pow,
    "is_finite": lambda x: abs(x) < jnp.inf,
    "log1p": _log1p,
    "sqrt": lambda x: jnp.where((x == 0) | (x == jnp.inf), x, x * lax.rsqrt(x)),
    "stop_gradient": lambda x: x,
    "tan": lambda x: jnp.sin(x) / jnp.cos(x),
    "tanh": _tanh,
}


def lowerable(function: Callable[..., Any]) -> Callable[..., Any]:
    """The elementwise function with what `REWRITTEN` says put in place."""

    def rewritten(*args: Any) -> Any:
        closed, shapes = jax.make_jaxpr(function, return_shape=True)(*args)
        values = _evaluated(closed.jaxpr, closed.consts, jax.tree.leaves(args))
        return jax.tree.unflatten(jax.tree.structure(shapes), values)

    return rewritten


def _evaluated(jaxpr: Any, consts: Sequence[Any], args: Sequence[Any]) -> list[Any]:
    env = dict(zip((*jaxpr.constvars, *jaxpr.invars), (*consts, *args), strict=True))

    def read(atom: Any) -> Any:
        if isinstance(atom, Literal):
            return jnp.full(atom.aval.shape, atom.val, atom.aval.dtype)  # type: ignore[attr-defined]
        return env[atom]

    for eqn in jaxpr.eqns:
        name, values = eqn.primitive.name, [read(atom) for atom in eqn.invars]
        options = {"y": eqn.params["y"]} if name == "integer_pow" else {}
        if name in ("jit", "pjit"):
            found = _evaluated(eqn.params["jaxpr"].jaxpr, eqn.params["jaxpr"].consts, values)
        elif name in REWRITTEN:
            found = [REWRITTEN[name](*values, **options)]
        else:
            found = eqn.primitive.bind(*values, **eqn.params)
            found = found if eqn.primitive.multiple_results else [found]
        env.update(zip(eqn.outvars, found, strict=True))
    return [read(atom) for atom in jaxpr.outvars]


def pulled(
    program: Program, s: Array, columns: Any, tile: Any, d_s: Array
) -> tuple[Array, list[Array], list[Array], Any]:
    """The gradients of raw scores, of the program's `float_rows()`, `float_cols()` and tile from that of the scores."""
    rows, cols = columns
    closed, whole = program.jaxpr("pull", s.shape), [tile] if program.has_tile else []
    d_s, *rest = _evaluated(closed.jaxpr, closed.consts, [s, *rows, *cols, *whole, d_s])
    # A gradient that does not depend on scores is the same number everywhere, and would have no place in registers.
    d_s, *rest = (plgpu.layout_cast(x, TILE) for x in (d_s, *rest))
    count = len(program.float_rows())
    end = count + len(program.float_cols())
    return d_s, rest[:count], rest[count:end], rest[end] if program.has_tile else None


def approximable(program: Program) -> bool:
    """Whether the GPU's fast instructions serve: those for sines are only good for small angles."""
    return program.linear or not {"cos", "sin", "tan"} & {eqn.primitive.name for eqn in program.change.equations}


def unsupported(program: Program, *blocks: int) -> None:
    """Raises `NotImplementedError` for operations without another in their place, and for sizes of blocks."""
    for size in blocks:
        if size % 64 or size > 256:
            raise NotImplementedError(f"blocks of {size} tokens; Hopper's tensor cores want multiples of 64 up to 256")
    for function in (program.change, program.drop, program.mask):
        for eqn in function.equations if function is not None else ():
            floating = jnp.issubdtype(eqn.outvars[0].aval.dtype, jnp.floating)
            if eqn.primitive.name == "pow" or (eqn.primitive.name == "rem" and floating):
                raise NotImplementedError(f"Mosaic GPU has no {eqn.primitive.name} of floating point numbers")


@dataclasses.dataclass(frozen=True)
class Streamed:
    """The program of a call in a kernel's blocks, [queries, keys] or (`turned`) [keys, queries]."""

    program: Program
    turned: bool = False

    def functions(self, masked: bool) -> list[Function]:
        program = self.program
        changes = [] if program.linear else [program.change]
        return changes + [f for f in (program.drop, program.mask if masked else None) if f is not None]

    def reads(self, kind: str, masked: bool = True) -> list[int]:
        """Numbers of the streams of a kind that blocks read, with a mask or without."""
        return sorted({n for f in self.functions(masked) for n in f.reads(kind)})

    def arrays(self, streams: Streams) -> Streams:
        """The streams that blocks read, None for others."""
        rows, cols = (
            tuple(x if n in self.reads(kind) else None for n, x in enumerate(side))
            for kind, side in (("row", streams.rows), ("col", streams.cols))
        )
        tile = streams.tile if self.reads("tile") else None
        return Streams(rows, cols, tile if tile is None or not self.turned else tile.mT)

    def looks_up(self, kind: str, visits: Visits, masked: bool) -> Any:
        """What tells blocks where the tokens are whose columns of a kind (or whose tile) they read; None if nothing."""
        return visits.tokens if self.reads(kind, masked) or self.reads("tile", masked) else None

    def rows(self, refs: Streams, row: Any, head: Any, queries: Any, masked: bool = True) -> list[Any]:
        """What blocks read of these queries."""
        return self._load(refs.rows, self.reads("row", masked), row, head, queries, COL if self.turned else ROW)

    def cols(self, refs: Streams, row: Any, head: Any, keys: Any, masked: bool = True) -> list[Any]:
        """What blocks read of these keys."""
        return self._load(refs.cols, self.reads("col", masked), row, head, keys, ROW if self.turned else COL)

    def tile(self, refs: Streams, row: Any, head: Any, queries: Any, keys: Any) -> Any:
        """What one block reads of the whole map."""
        if refs.tile is None:
            return None
        place = (keys, queries) if self.turned else (queries, keys)
        return _compat.load(of(refs.tile, row, head).at[place], TILE)

    @staticmethod
    def _load(refs: Any, numbers: list[int], row: Any, head: Any, tokens: Any, layout: Any) -> list[Any]:
        return [_compat.load(of(x, row, head).at[tokens], layout) if n in numbers else None for n, x in enumerate(refs)]

    def wide(self, rows: list[Any], cols: list[Any], shape: tuple[int, int]) -> tuple[list[Any], list[Any]]:
        """Both over a whole block."""
        across = (1, 0) if self.turned else (0, 1)
        return tuple(  # type: ignore[return-value]
            [None if x is None else lax.broadcast_in_dim(x, shape, [axis]) for x in side]
            for axis, side in zip(across, (rows, cols), strict=True)
        )
