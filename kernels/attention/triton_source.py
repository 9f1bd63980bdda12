"""A program's elementwise functions as Triton source: printed from their jaxprs, equation by equation.

The functions do not care which way a block lies: rows may be [bq, 1] and columns [1, bk], or the other way round. What
depends on rows or columns alone stays that narrow. Streams come in one buffer of 32-bit words, at offsets that are
written into the source.
"""

import dataclasses
import functools
import hashlib
import linecache
import math
import re
from collections.abc import Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import triton
import triton.language as tl
from jax import lax
from jax.extend import core
from jaxtyping import Array, Int32
from triton.language.extra.cuda import libdevice

from kernels.attention.program import Program, Streams

_NAN = "propagate_nan=tl.PropagateNan.ALL"
# What a primitive becomes where types and parameters do not matter; the others are in `_Body`.
_FORMATS = {
    "abs": "tl.abs({0})",
    "add": "{0} + {1}",
    "add_any": "{0} + {1}",
    "and": "{0} & {1}",
    "atan2": "libdevice.atan2({0}, {1})",
    "ceil": "tl.ceil({0})",
    "clamp": f"tl.minimum(tl.maximum({{1}}, {{0}}, {_NAN}), {{2}}, {_NAN})",
    "cos": "tl.cos({0})",
    "eq": "{0} == {1}",
    "erf": "tl.erf({0})",
    "exp": "tl.exp({0})",
    "exp2": "tl.exp2({0})",
    "expm1": "libdevice.expm1({0})",
    "floor": "tl.floor({0})",
    "ge": "{0} >= {1}",
    "gt": "{0} > {1}",
    "is_finite": "tl.abs({0}) < float('inf')",
    "le": "{0} <= {1}",
    "log": "tl.log({0})",
    "log2": "tl.log2({0})",
    "log1p": "libdevice.log1p({0})",
    "logistic": "1.0 / (1.0 + tl.exp(-{0}))",
    "lt": "{0} < {1}",
    "max": f"tl.maximum({{0}}, {{1}}, {_NAN})",
    "min": f"tl.minimum({{0}}, {{1}}, {_NAN})",
    "mul": "{0} * {1}",
    "ne": "{0} != {1}",
    "neg": "-{0}",
    "not": "~{0}",
    "one_minus_square": "(1.0 + {0}) * (1.0 - {0})",
    "or": "{0} | {1}",
    "pow": "libdevice.pow({0}, {1})",
    "rem": "{0} % {1}",
    "rsqrt": "tl.rsqrt({0})",
    "select_n": "tl.where({0}, {2}, {1})",
    "sign": "tl.where({0} > 0, 1, tl.where({0} < 0, -1, {0}))",
    "sin": "tl.sin({0})",
    "sqrt": "tl.sqrt({0})",
    "square": "{0} * {0}",
    "sub": "{0} - {1}",
    "tan": "libdevice.tan({0})",
    "tanh": "libdevice.tanh({0})",
    "xor": "{0} ^ {1}",
}
_SHIFTS = {"shift_left": "<<", "shift_right_arithmetic": ">>", "shift_right_logical": ">>"}
_SAME = frozenset(("broadcast_in_dim", "copy", "copy_p", "expand_dims", "reshape", "squeeze", "stop_gradient"))
_OF_BOOLEANS = frozenset(("and", "convert_element_type", "eq", "ne", "not", "or", "select_n", "xor"))
_TYPES = frozenset(("bool", "float32", "bfloat16", "float16", "int32", "uint32", "int16", "uint16", "int8", "uint8"))


@dataclasses.dataclass(frozen=True)
class Functions:
    """`triton.jit` functions of one program, or None where it has nothing of the kind."""

    rows: Any  # (words, batch, head, row) -> a tuple: what `scores`, `pull` and `kept` read of the rows
    cols: Any  # (words, batch, head, col) -> the same of the columns
    allowed: Any  # (words, batch, head, row, col) -> whether the mask allows each pair
    scores: Any = None  # (s, rows, cols, tile) -> scores; None where `is_linear`
    pull: Any = None  # (s, ds, rows, cols, tile, live) -> gradients of s, float rows, float columns, tile; 0 where dead
    kept: Any = None  # (rows, cols) -> whether dropout keeps each pair
    zero_rows: Any = None  # (size) -> a tuple of zeros, for the sums of the gradients of rows
    add_rows: Any = None  # (sums, pulled) -> the sums with those of a block over its second axis
    store_rows: Any = None  # (pointer, sums, stride, at)
    zero_cols: Any = None
    add_cols: Any = None
    store_cols: Any = None


def words(streams: Streams) -> Int32[Array, " words"]:
    """All rows and columns in one buffer; it is never empty."""
    parts = [lax.bitcast_convert_type(x, jnp.int32).ravel() for x in (*streams.rows, *streams.cols)]
    return jnp.concatenate(parts) if parts else jnp.zeros(1, jnp.int32)


def is_linear(program: Program) -> bool:
    """Whether scores are s times a positive number, which kernels then fold into their exponents."""
    return program.linear and program.scale > 0


def functions(program: Program, streams: Streams) -> Functions:
    """The functions of a program whose rows and columns come as `words(streams)`.

    Raises: `NotImplementedError`, naming it, for a primitive that has no form in Triton.
    """
    bodies, linear = {}, is_linear(program)
    if not linear:
        bodies |= {"scores": _Body(program, "scores"), "pull": _Body(program, "pull")}
    if program.drop is not None:
        bodies["kept"] = _Body(program, "kept")
    loads = _loads(program, streams)
    read = set().union(*(body.read for body in bodies.values()))
    rows, cols = ([name for name in loads if name in read and name[0] == side] for side in "rc")
    source = [
        _definition("rows", "words, batch, head, row", (f"{x} = {loads[x]}" for x in rows), _tuple(rows)),
        _definition("cols", "words, batch, head, col", (f"{x} = {loads[x]}" for x in cols), _tuple(cols)),
    ]
    arguments = {"scores": "s, rows, cols, tile", "pull": "s, ds, rows, cols, tile, live", "kept": "rows, cols"}
    given = {x: f"{name}[{i}]" for name, side in (("rows", rows), ("cols", cols)) for i, x in enumerate(side)}
    for name, body in bodies.items():
        source.append(body.definition(name, arguments[name], given))
    pair = "words, batch, head, row, col"
    if program.mask is None:
        source.append(_definition("allowed", pair, (), "tl.full((1, 1), True, tl.int1)"))
    else:
        source.append(_Body(program, "allowed").definition("allowed", pair, loads))
    if not linear:
        source += _sums("rows", 1, len(program.float_rows()))
        source += _sums("cols", 1 + len(program.float_rows()), len(program.float_cols()))
    return _compiled("\n\n".join(source))


def _loads(program: Program, streams: Streams) -> dict[str, str]:
    """The expression that loads each row r0, r1, .. and column c0, c1, .. for `row` or `col`, indices of any shape."""
    found, offset = {}, 0
    sides = (("r", "row", streams.rows, program.row_types), ("c", "col", streams.cols, program.col_types))
    for side, at, columns, types in sides:
        for n, (x, dtype) in enumerate(zip(columns, types, strict=True)):
            batches, heads, length = x.shape
            terms = ["words", str(offset)]
            terms += [f"batch * {heads * length}"] * (batches > 1) + [f"head * {length}"] * (heads > 1)
            cast = ".to(tl.float32, bitcast=True)" if dtype == np.float32 else ""
            found[f"{side}{n}"] = f"tl.load({' + '.join(terms)} + {at}){cast}"
            offset += math.prod(x.shape)
    return found


def _sums(side: str, first: int, count: int) -> list[str]:
    if not count:
        return []
    zeros = _tuple(["tl.zeros((N,), tl.float32)"] * count)
    added = _tuple(f"sums[{i}] + tl.sum(pulled[{first + i}], 1)" for i in range(count))
    stores = (f"tl.store(pointer + {i} * stride + at, sums[{i}])" for i in range(count))
    return [
        _definition(f"zero_{side}", "N: tl.constexpr", (), zeros),
        _definition(f"add_{side}", "sums, pulled", (), added),
        _definition(f"store_{side}", "pointer, sums, stride, at", stores, "()"),
    ]


def _definition(name: str, arguments: str, lines: Iterable[str], result: str) -> str:
    body = "".join(f"    {line}\n" for line in (*lines, f"return {result}"))
    return f"@triton.jit\ndef {name}({arguments}):\n{body}"


def _tuple(items: Iterable[str]) -> str:
    return f"({''.join(f'{item}, ' for item in items)})"


@functools.cache
def _compiled(source: str) -> Functions:
    """The functions of a source; where Triton looks for it, it finds it in `linecache`."""
    name = f"<{__name__} {hashlib.sha256(source.encode()).hexdigest()[:16]}>"
    linecache.cache[name] = (len(source), None, source.splitlines(keepends=True), name)
    scope: dict[str, Any] = {"__name__": name, "triton": triton, "tl": tl, "libdevice": libdevice}
    exec(compile(source, name, "exec"), scope)
    return Functions(**{field.name: scope.get(field.name) for field in dataclasses.fields(Functions)})


class _Body:
    """One function of a program: lines that read s, ds, r0, r1, .., c0, .., tile, and what they come to.

    An operand is the name of a tensor, or a NumPy scalar: what is known is computed here and not in the kernel.
    """

    def __init__(self, program: Program, which: str) -> None:
        names = [f"r{n}" for n in range(len(program.row_types))] + [f"c{n}" for n in range(len(program.col_types))]
        if which in ("scores", "pull"):
            names = ["s", *names, *["tile"] * program.has_tile, *["ds"] * (which == "pull")]
        closed = program.jaxpr(which, (2, 2))
        self.lines: list[str] = []
        outputs = self._run(closed.jaxpr, closed.consts, names)
        if which in ("scores", "pull"):
            outputs = [self._wide(x, "s" if which == "scores" else "ds") for x in outputs]
        if which == "pull":
            self.lines += ["if live is not None:", *(f"    {x} = tl.where(live, {x}, 0.0)" for x in outputs)]
            self.result = _tuple(outputs)
        else:
            (output,) = outputs
            self.result = output if isinstance(output, str) else f"tl.full((1, 1), {bool(output)}, tl.int1)"
        self.read = set(names) & set(re.findall(r"\w+", "\n".join((*self.lines, self.result))))

    def definition(self, name: str, arguments: str, loads: dict[str, str]) -> str:
        """Its source, where `loads` are the expressions of what is no argument."""
        return _definition(
            name, arguments, [f"{x} = {loads[x]}" for x in loads if x in self.read] + self.lines, self.result
        )

    def _run(self, jaxpr: Any, consts: Sequence[Any], operands: Sequence[Any]) -> list[Any]:
        env = dict(zip(jaxpr.constvars, (np.asarray(c) for c in consts), strict=True))
        if any(c.size != 1 for c in env.values()):
            raise NotImplementedError("an array of constants over pairs of queries and keys has no form in Triton")
        env = {var: c.reshape(())[()] for var, c in env.items()} | dict(zip(jaxpr.invars, operands, strict=True))

        def read(atom: Any) -> Any:
            return np.asarray(atom.val, atom.aval.dtype)[()] if isinstance(atom, core.Literal) else env[atom]  # type: ignore[attr-defined]

        for eqn in _needed(jaxpr):
            given = [read(x) for x in eqn.invars]
            inner = eqn.params.get("jaxpr") or eqn.params.get("call_jaxpr")
            if inner is not None:
                env.update(zip(eqn.outvars, self._run(inner.jaxpr, inner.consts, given), strict=True))
            else:
                env[eqn.outvars[0]] = self._equation(eqn, given)
        return [read(x) for x in jaxpr.outvars]

    def _equation(self, eqn: Any, given: Sequence[Any]) -> Any:
        name, (out,) = eqn.primitive.name, eqn.outvars
        if name in _SAME:
            return given[0]
        if not any(isinstance(x, str) for x in given):
            with jax.ensure_compile_time_eval():
                constants = [jnp.asarray(x, var.aval.dtype) for x, var in zip(given, eqn.invars, strict=True)]
                return np.asarray(eqn.primitive.bind(*constants, **eqn.params))[()]
        kinds = [str(var.aval.dtype) for var in (*eqn.invars, out)]
        strange = [kind for kind in kinds if kind not in _TYPES]
        if strange or ("bool" in kinds[:-1] and name not in _OF_BOOLEANS):
            raise NotImplementedError(f"{name!r} of {(*strange, 'bool')[0]} has no form in Triton")
        short = [kind in ("bfloat16", "float16") for kind in kinds]
        text = [
            f"{x}.to(tl.float32)" if cut and isinstance(x, str) else _text(x)
            for x, cut in zip(given, short, strict=False)
        ]
        expression = self._expression(eqn, name, text, given, kinds)
        return self._line(f"({expression}).to(tl.{kinds[-1]})" if short[-1] else expression)

    def _expression(self, eqn: Any, name: str, text: list[str], given: Sequence[Any], kinds: list[str]) -> str:
        first, dtype = text[0], kinds[-1]
        if name == "convert_element_type":
            return f"{first} != 0" if dtype == "bool" else f"{first}.to(tl.{dtype})"
        if name == "div":
            if "float" not in dtype:
                return f"{first} // {text[1]}"
            known = not isinstance(given[1], str) and 2.0**-100 < abs(float(given[1])) < 2.0**100
            return f"{first} * {_text(1 / np.float32(given[1]))}" if known else f"{first} / {text[1]}"
        if name == "integer_pow":
            return self._power(first, eqn.params["y"])
        if name == "round":
            nearest_even = int(eqn.params["rounding_method"]) == 1
            return f"libdevice.{'rint' if nearest_even else 'round'}({first})"
        if name == "select_n" and len(text) != 3:
            raise NotImplementedError("'select_n' between more than two arrays has no form in Triton")
        if name in _SHIFTS:
            return self._shift(name, text, given, dtype)
        if name not in _FORMATS:
            raise NotImplementedError(f"{name!r} has no form in Triton")
        return _FORMATS[name].format(*text)

    def _power(self, x: str, exponent: int) -> str:
        left, result = abs(exponent), ""
        while left:
            if left % 2:
                result = self._line(f"{result} * {x}") if result else x
            left //= 2
            x = self._line(f"{x} * {x}") if left else x
        return f"1.0 / {result}" if exponent < 0 else result

    def _shift(self, name: str, text: list[str], given: Sequence[Any], dtype: str) -> str:
        """Shifts by the number of bits or more give 0, or the sign; of these the hardware promises nothing."""
        (x, by), bits, unsigned = text, 8 * np.dtype(dtype).itemsize, dtype if dtype[0] == "u" else f"u{dtype}"
        shifted, beyond = f"({x} {_SHIFTS[name]} {by})", "0"
        if name == "shift_right_logical" and dtype != unsigned:
            if not isinstance(given[0], str):
                raise NotImplementedError("'shift_right_logical' of a constant has no form in Triton")
            shifted = f"({x}.to(tl.{unsigned}, bitcast=True) >> {by}).to(tl.{dtype}, bitcast=True)"
        if name == "shift_right_arithmetic":
            beyond = f"({x} >> {bits - 1})"
        if isinstance(given[1], str):
            return f"tl.where(({by} >= 0) & ({by} < {bits}), {shifted}, {beyond})"
        return shifted if 0 <= given[1] < bits else f"{x} * 0 + {beyond}"

    def _line(self, expression: str) -> str:
        name = f"x{len(self.lines)}"
        self.lines.append(f"{name} = {expression}")
        return name

    def _wide(self, x: Any, like: str) -> str:
        return self._line(
            f"tl.broadcast_to({x}, {like}.shape)" if isinstance(x, str) else f"tl.zeros_like({like}) + {_text(x)}"
        )


def _needed(jaxpr: Any) -> list[Any]:
    """The equations on which the outputs stand."""
    wanted, found = {x for x in jaxpr.outvars if not isinstance(x, core.Literal)}, []
    for eqn in reversed(jaxpr.eqns):
        if wanted.intersection(eqn.outvars):
            found.append(eqn)
            wanted.update(x for x in eqn.invars if not isinstance(x, core.Literal))
    return found[::-1]


def _text(x: Any) -> str:
    """An operand as source."""
    if isinstance(x, str):
        return x
    if isinstance(x, np.bool_):
        return str(bool(x))
    if isinstance(x, np.integer):
        return f"({int(x)})"
    return repr(float(x)) if np.isfinite(x) else f"float('{float(x)}')"
