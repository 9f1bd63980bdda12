"""What a program sends between devices: read from what was compiled, or lowered, and counted.

The text of a compiled program (`jax.jit(f).lower(...).compile().as_text()`) shows what the partitioner put in. A
lowered program shows only what `shard_map` says, but in the types that were written: the CPU compiler turns bf16 sums
into f32 ones, so bytes of explicit collectives are best read there.
"""

import dataclasses
import itertools
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

NAMES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute", "collective-broadcast")

_ARRAY = re.compile(r"\b([a-z]+\d*\w*)\[([\d,<=]*)\]")
_INSTRUCTION = re.compile(rf"^\s*(?:ROOT )?%?[\w.\-]+ = (.*?) ({'|'.join(NAMES)})(-start)?\((.*)$")
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{\s*$")
_OPCODE = re.compile(r"^\s*(?:ROOT )?%?[\w.\-]+ = .*? ([a-z][\w\-]*)\(")
_CALLEE = re.compile(r"\b(?:calls|to_apply|body|condition|true_computation|false_computation)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"\bbranch_computations=\{([^}]*)\}")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')


@dataclasses.dataclass(frozen=True)
class Collective:
    """One array that a program moves between devices.

    Attributes:
        name: the operation, as XLA spells it ("all-reduce").
        shape: of the result on one device.
        bytes: of that result.
        dtype: as XLA spells it ("f32").
        times: how often it runs: the product of the trip counts of the loops around it. A branch counts as taken.
        exact: False where a loop around it has no known trip count and was taken to run once.
        groups: the devices that take part together, by their place in the mesh; for a permute, (source, target) pairs.
        axes: the mesh axes those groups run along; None if no mesh was given or the groups follow no axes.
    """

    name: str
    shape: tuple[int, ...]
    bytes: int
    dtype: str
    times: int = 1
    exact: bool = True
    groups: tuple[tuple[int, ...], ...] = ()
    axes: tuple[str, ...] | None = None

    @property
    def sent(self) -> float:
        """Bytes that one device sends in one run of a ring algorithm."""
        others = max(len(self.groups[0]) - 1, 0) if self.groups else 0
        if self.name == "all-reduce":
            return 2 * self.bytes * others / (others + 1)
        if self.name == "reduce-scatter":
            return self.bytes * others
        if self.name == "collective-permute":
            return float(self.bytes)
        return self.bytes * others / (others + 1)


def collectives(
    program: "str | jax.stages.Compiled | jax.stages.Lowered", mesh: Mesh | None = None
) -> dict[str, list[Collective]]:
    """The collectives of a program by name, in program order; names it does not use are absent.

    `program` is a compiled program, its text, or a lowered one. An operation that XLA merged out of several arrays
    gives one entry per array, so that merging changes no count. With a `mesh`, each entry says which of its axes it
    runs along. Raises `ValueError` for a text that is no compiled program, or groups of devices it cannot read.
    """
    if hasattr(program, "compiler_ir"):
        found = _of_lowered(program)  # type: ignore[arg-type]
    else:
        found = _of_text(program if isinstance(program, str) else program.as_text())
    result: dict[str, list[Collective]] = {}
    for one in found:
        if mesh is not None:
            one = dataclasses.replace(one, axes=_axes(one, mesh))
        result.setdefault(one.name, []).append(one)
    return result


def summary(found: dict[str, list[Collective]]) -> dict[tuple[str, tuple[str, ...] | None], tuple[int, int]]:
    """(name, axes) -> (how many runs, how many bytes of results) per device over the whole program."""
    totals: dict[tuple[str, tuple[str, ...] | None], tuple[int, int]] = {}
    for one in itertools.chain.from_iterable(found.values()):
        count, size = totals.get((one.name, one.axes), (0, 0))
        totals[one.name, one.axes] = (count + one.times, size + one.times * one.bytes)
    return totals


# Compiled text


def _of_text(text: str) -> list[Collective]:
    if "HloModule" not in text or "ENTRY " not in text:
        raise ValueError("no compiled program: pass jax.jit(f).lower(...).compile() or its as_text()")
    devices = math.prod(int(n) for n in re.findall(r"\b(?:num_partitions|replica_count)=(\d+)", text.splitlines()[0]))
    computations: dict[str, list[str]] = {}
    entry, lines = "", []
    for line in text.splitlines():
        if start := _COMPUTATION.match(line):
            lines = computations.setdefault(start[2], [])
            entry = start[2] if start[1] else entry
        else:
            lines.append(line)
    return list(_walk(computations, entry, devices, 1, True))


def _walk(computations: dict[str, list[str]], name: str, devices: int, times: int, exact: bool) -> Iterator[Collective]:
    for line in computations.get(name, ()):
        if match := _INSTRUCTION.match(line):
            yield from _instruction(match[1], match[2], bool(match[3]), match[4], devices, times, exact)
            continue
        opcode = _OPCODE.match(line)
        if opcode is None or opcode[1] in ("async-update", "async-done"):
            continue  # The computation of an asynchronous operation was counted at its start.
        inner, inner_exact = times, exact
        if opcode[1] == "while":
            trips = _TRIPS.search(line)
            inner, inner_exact = times * (int(trips[1]) if trips else 1), exact and trips is not None
        branches = _BRANCHES.search(line)
        names = [part.strip().lstrip("%") for part in branches[1].split(",")] if branches else []
        for callee in names + _CALLEE.findall(line):
            yield from _walk(computations, callee, devices, inner, inner_exact)


def _instruction(
    result: str, name: str, start: bool, rest: str, devices: int, times: int, exact: bool
) -> Iterator[Collective]:
    arrays = [(dtype, _dimensions(text)) for dtype, text in _ARRAY.findall(result)]
    if start and name == "all-gather":
        arrays = arrays[len(arrays) // 2 :]  # The pair (operands, results).
    elif start and name == "collective-permute":
        arrays = arrays[1:2]  # (operand, result, contexts).
    elif name == "all-to-all" and len(arrays) > 1:
        arrays = [(arrays[0][0], (len(arrays), *arrays[0][1]))]  # One array, cut into a tuple.
    groups = _pairs(rest) if name == "collective-permute" else _groups(rest, devices)
    for dtype, shape in arrays:
        yield Collective(name, shape, math.ceil(math.prod(shape) * _bits(dtype) / 8), dtype, times, exact, groups)


def _dimensions(text: str) -> tuple[int, ...]:
    return tuple(int(size.lstrip("<=")) for size in text.split(",") if size)


def _bits(dtype: str) -> int:
    if dtype == "pred":
        return 8
    return int(re.search(r"\d+", dtype)[0])


def _pairs(rest: str) -> tuple[tuple[int, ...], ...]:
    match = re.search(r"source_target_pairs=\{(\{.*?\})\}", rest)
    return _braces(match[1]) if match else ()


def _groups(rest: str, devices: int) -> tuple[tuple[int, ...], ...]:
    """The forms in which XLA writes groups: listed, a transposed sequence, axes of a mesh; none means everyone."""
    if match := re.search(r"replica_groups=\{(\{.*?\})\}", rest):
        return _braces(match[1])
    if match := re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", rest):
        return tuple(map(tuple, _sequence(match[2], match[3]).reshape(_numbers(match[1])).tolist()))
    if match := re.search(r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\((.*?\)?)\))? ?\{([^}]*)\}", rest):
        shape = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", match[1])}
        chosen = match[3].replace("'", "").replace(" ", "").split(",")
        order = re.fullmatch(r"\[([\d,]+)\](?:T\(([\d,]+)\))?", match[2]) if match[2] else None
        parts = _with_parts(shape, chosen)
        if (order or not match[2]) and all(axis in parts for axis in chosen):
            return _along(chosen, parts, _sequence(*order.groups()) if order else None)
    elif "replica_groups={}" in rest or "replica_groups=" not in rest:
        return (tuple(range(devices)),)
    written = re.search(r"replica_groups=.{0,80}", rest)[0]
    raise ValueError(f"cannot read the groups of devices of a collective: {written}")


def _with_parts(shape: dict[str, int], chosen: Sequence[str]) -> dict[str, int]:
    """The mesh with a chosen part `axis:(before)size` of an axis as an axis of its own."""
    result: dict[str, int] = {}
    for axis, whole in shape.items():
        parts = [re.fullmatch(rf"{axis}:\((\d+)\)(\d+)", name) for name in chosen if name.startswith(f"{axis}:")]
        if not parts:
            result[axis] = whole
        elif len(parts) == 1 and parts[0]:
            before, size = int(parts[0][1]), int(parts[0][2])
            result |= {f"{axis}<": before, parts[0][0]: size, f"{axis}>": whole // (before * size)}
    return result


def _sequence(dims: str, order: str | None) -> np.ndarray:
    """0, 1, 2, ... laid out in `dims` and transposed to `order`."""
    ids = np.arange(math.prod(_numbers(dims))).reshape(_numbers(dims))
    return ids.transpose(_numbers(order)) if order else ids


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(map(int, text.split(",")))


def _braces(text: str) -> tuple[tuple[int, ...], ...]:
    return tuple(map(_numbers, re.findall(r"\{([\d,]+)\}", text)))


# Lowered program


def _of_lowered(lowered: "jax.stages.Lowered") -> list[Collective]:
    module = lowered.compiler_ir("stablehlo")
    symbols = {op.attributes["sym_name"].value: op.operation for op in module.body if "sym_name" in op.attributes}
    return list(_visit(symbols, symbols["main"], 1, True))


def _visit(symbols: dict[str, Any], op: Any, times: int, exact: bool) -> Iterator[Collective]:
    name = op.name.removeprefix("stablehlo.").replace("_", "-")
    if name in NAMES:
        groups = _lowered_groups(symbols, op.attributes)
        for value in op.results:
            dtype, shape = str(value.type.element_type), tuple(value.type.shape)
            size = math.ceil(math.prod(shape) * (8 if dtype == "i1" else _bits(dtype)) / 8)
            yield Collective(name, shape, size, _hlo_name(dtype), times, exact, groups)
        return
    if op.name in ("func.call", "call"):
        yield from _visit(symbols, symbols[op.attributes["callee"].value], times, exact)
    if op.name == "stablehlo.while":
        trips = _trips(op)
        times, exact = times * (trips or 1), exact and trips is not None
    for region in op.regions:
        for block in region:
            for inner in block:
                yield from _visit(symbols, inner.operation, times, exact)


def _lowered_groups(symbols: dict[str, Any], attributes: Any) -> tuple[tuple[int, ...], ...]:
    if "source_target_pairs" in attributes:
        return tuple(map(tuple, np.asarray(attributes["source_target_pairs"]).tolist()))
    groups = attributes["replica_groups"]
    named = re.search(r"mesh = @(\w+), axes = \[(.*)\]", str(groups))
    if named is None:
        return tuple(map(tuple, np.asarray(groups).tolist()))
    # From jax 0.11 on, groups are axes of a mesh declared beside the functions.
    shape = {name: int(size) for name, size in re.findall(r'"(\w+)"=(\d+)', str(symbols[named[1]]))}
    return _along(re.findall(r'name = "(\w+)"', named[2]), shape)


def _hlo_name(dtype: str) -> str:
    """MLIR's i32, ui32 and i1 as HLO's s32, u32 and pred."""
    if dtype == "i1":
        return "pred"
    return re.sub(r"^i(\d)", r"s\1", dtype).replace("ui", "u")


def _trips(op: Any) -> int | None:
    """Runs of `while i < limit: ...; i += step` with constants; None for any other loop."""
    condition, body = (region.blocks[0] for region in op.regions)
    final = list(condition)[-1].operands[0].owner
    if getattr(final, "name", "") != "stablehlo.compare" or "LT" not in str(final.attributes["comparison_direction"]):
        return None
    counter, limit = final.operands[0], _constant(final.operands[1])
    places = [i for i, argument in enumerate(condition.arguments) if argument == counter]
    if not places or limit is None:
        return None
    first = _constant(op.operands[places[0]])
    following = list(body)[-1].operands[places[0]].owner
    if first is None or getattr(following, "name", "") != "stablehlo.add":
        return None
    step = _constant(following.operands[1]) if following.operands[0] == body.arguments[places[0]] else None
    return None if not step else max(0, math.ceil((limit - first) / step))


def _constant(value: Any) -> int | None:
    owner = value.owner
    if getattr(owner, "name", "") != "stablehlo.constant":
        return None
    constant = np.asarray(owner.attributes["value"])
    return int(constant) if constant.ndim == 0 and np.issubdtype(constant.dtype, np.integer) else None


# Mesh axes


def _axes(one: Collective, mesh: Mesh) -> tuple[str, ...] | None:
    """The mesh axes along which the groups of a collective run; None if they follow none."""
    names = tuple(name for name, size in mesh.shape.items() if size > 1)
    if one.name == "collective-permute":
        moved = {name for source, target in one.groups for name in _differ(source, target, mesh)}
        return tuple(name for name in names if name in moved)
    wanted = _as_sets(one.groups)
    for count in range(len(names) + 1):
        for chosen in itertools.combinations(names, count):
            if _as_sets(_along(chosen, mesh.shape)) == wanted:
                return chosen
    return None


def _differ(source: int, target: int, mesh: Mesh) -> list[str]:
    shape = tuple(mesh.shape.values())
    places = zip(mesh.shape, np.unravel_index(source, shape), np.unravel_index(target, shape), strict=True)
    return [name for name, a, b in places if a != b]


def _along(
    chosen: Sequence[str], shape: Mapping[str, int], ids: np.ndarray | None = None
) -> tuple[tuple[int, ...], ...]:
    """The groups of devices that differ only along the chosen axes of a mesh of this shape, filled with `ids`."""
    ids = np.arange(math.prod(shape.values())) if ids is None else ids
    ids = ids.reshape(tuple(shape.values()))
    positions = [list(shape).index(name) for name in chosen]
    moved = np.moveaxis(ids, positions, range(ids.ndim - len(chosen), ids.ndim))
    return tuple(map(tuple, moved.reshape(-1, math.prod(shape[name] for name in chosen)).tolist()))


def _as_sets(groups: Iterable[Iterable[int]]) -> frozenset[frozenset[int]]:
    return frozenset(frozenset(group) for group in groups)
