"""The layout of one run: its mesh, its table, and the sharding of every array it keeps."""

import contextlib
import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from sharding import logical, presets
from sharding.logical import Rule, ShardingError

_INSIDE_VARIABLE = jax.tree_util.GetAttrKey("value")


@dataclasses.dataclass(frozen=True)
class Layout:
    """A mesh with its table. Made by `build`; everything a loop needs to place its state and its batches."""

    preset: str
    mesh: Mesh
    rules: Mapping[str, Rule]

    def activate(self) -> contextlib.AbstractContextManager[logical.Active]:
        """Put the layout in force for everything traced inside."""
        return logical.activate(self.mesh, self.rules)

    def replicated(self) -> NamedSharding:
        """Whole on every device."""
        return NamedSharding(self.mesh, PartitionSpec())

    def parts(self) -> dict[str, int]:
        """Into how many pieces each logical axis is cut while it is used."""
        context = self._context()
        return {name: context.parts(name) for name in self.rules}

    def param_shardings(self, abstract_state: Any) -> Any:
        """The tree of `abstract_state` with a `NamedSharding` in place of every array.

        Variables say their logical axes in the metadata `axes`; what says nothing is replicated. Works for parameters,
        and for optimiser states and averages that keep the variables of the parameters (see also `like`).
        Raises `ShardingError`, naming the variable, where a size does not divide.
        """
        context = self._context()

        def place(path: tuple, leaf: Any) -> Any:
            if not isinstance(leaf, nnx.Variable):
                return self.replicated()
            value = leaf.get_value()
            axes = leaf.get_metadata().get("axes")
            if axes is None or not hasattr(value, "shape"):
                return leaf.replace(jax.tree.map(lambda _: self.replicated(), value))
            spec = context.spec(tuple(axes), value.shape, at_rest=True, what=f"parameter {name_of(path)}")
            return leaf.replace(NamedSharding(self.mesh, spec))

        return jax.tree_util.tree_map_with_path(place, abstract_state, is_leaf=lambda x: isinstance(x, nnx.Variable))

    def like(self, tree: Any, params: Any) -> Any:
        """The tree of `tree` with a `NamedSharding` in place of every array, each following its parameter.

        An array of `tree` (an optimiser state, gradients, an average) belongs to the parameter whose path ends its own
        path and whose shape it has; arrays of no parameter (counters, factored moments) are replicated.
        `tree` and `params` may be abstract.
        """
        own = {row.name: row for row in self.placements(params)}

        def place(path: tuple, leaf: Any) -> NamedSharding:
            for start in range(len(path) + 1):
                parameter = own.get(name_of(path[start:]))
                if parameter is not None and parameter.shape == tuple(leaf.shape):
                    return parameter.sharding
            return self.replicated()

        return jax.tree_util.tree_map_with_path(place, tree)

    def batch_sharding(self, rows: int | None = None) -> NamedSharding:
        """The sharding of an array [B, ...] of a batch; `ShardingError` if `rows` do not divide over the devices."""
        context = self._context()
        parts = context.parts("batch")
        spec = context.spec(("batch",), (parts if rows is None else rows,), what="the global batch")
        return NamedSharding(self.mesh, spec)

    def reader(self) -> tuple[int, int]:
        """(index, count): which share of every batch this process must read.

        Processes whose devices hold the same rows (the model axis crosses them) read the same share, so the count may
        be less than the number of processes. Raises `ShardingError` if processes overlap in part.
        """
        shares = self._rows_by_process()
        distinct = sorted(set(shares.values()))
        held = [block for share in distinct for block in share]
        if len(held) != len(set(held)) or len({len(share) for share in distinct}) > 1:
            raise ShardingError(
                "the mesh gives processes overlapping or unequal parts of the batch: set config.sharding.model so that "
                "it divides, or is a multiple of, the devices of one process"
            )
        return distinct.index(shares[jax.process_index()]), len(distinct)

    def put(self, batch: Mapping[str, np.ndarray]) -> dict[str, jax.Array]:
        """This process's rows as global arrays, split over the batch axis.

        Each array is [rows of this reader, ...]; the global one has `reader()[1]` times as many rows.
        """
        _, count = self.reader()
        mine = self._rows_by_process()[jax.process_index()]
        return {name: self._put(np.asarray(array), count, mine) for name, array in batch.items()}

    def bytes_per_device(self, abstract_state: Any) -> int:
        """Bytes that one device holds of a state at rest."""
        return sum(row.bytes_per_device for row in self.placements(abstract_state))

    def placements(self, abstract_state: Any) -> list["Placement"]:
        """One row per array of a state, in tree order."""
        shardings = jax.tree_util.tree_leaves(
            self.param_shardings(abstract_state), is_leaf=lambda x: isinstance(x, NamedSharding)
        )
        arrays = jax.tree_util.tree_leaves_with_path(abstract_state)
        return [
            Placement(name_of(path), tuple(leaf.shape), leaf.dtype, sharding)
            for (path, leaf), sharding in zip(arrays, shardings, strict=True)
        ]

    def describe(self, abstract_state: Any = None) -> str:
        """Lines for a person: mesh, table, and, given a state, where each array lives and its bytes per device."""
        shape = " x ".join(f"{axis}={size}" for axis, size in self.mesh.shape.items())
        lines = [f"sharding {self.preset}: mesh {shape} on {self.mesh.devices.flat[0].platform}"]
        lines += [f"  {name} -> {_meaning(rule)}" for name, rule in self.rules.items() if rule.mesh_axes]
        if abstract_state is None:
            return "\n".join(lines)
        rows = self.placements(abstract_state)
        width = max((len(row.name) for row in rows), default=0)
        for row in rows:
            spec = ", ".join("-" if axis is None else str(axis) for axis in row.sharding.spec)
            lines.append(f"  {row.name:{width}} {str(row.shape):20} [{spec}] {row.bytes_per_device:,} bytes")
        total, own = sum(row.bytes for row in rows), sum(row.bytes_per_device for row in rows)
        lines.append(f"  {own:,} of {total:,} bytes on each device")
        return "\n".join(lines)

    def _context(self) -> logical.Active:
        return logical.Active(self.mesh, logical.normalise(self.mesh, self.rules))

    def _rows_by_process(self) -> dict[int, tuple[int, ...]]:
        """For each process, the blocks of the batch that its devices hold, in order."""
        parts = self._context().parts("batch")
        blocks: dict[int, set[int]] = {}
        for device, (rows,) in self.batch_sharding().devices_indices_map((parts,)).items():
            held = blocks.setdefault(device.process_index, set())  # type: ignore[attr-defined]
            held.update(range(parts)[rows])
        return {process: tuple(sorted(held)) for process, held in blocks.items()}

    def _put(self, array: np.ndarray, count: int, mine: Sequence[int]) -> jax.Array:
        rows = array.shape[0] * count
        sharding = self.batch_sharding(rows)
        block = array.shape[0] // len(mine)
        # The blocks of this process need not be neighbours in the mesh; they are filled in the order it reads them.
        local = {global_block * block: array[i * block : (i + 1) * block] for i, global_block in enumerate(mine)}
        shape = (rows, *array.shape[1:])
        return jax.make_array_from_callback(shape, sharding, lambda index: local[index[0].start or 0])


@dataclasses.dataclass(frozen=True)
class Placement:
    """Where one array lives."""

    name: str
    shape: tuple[int, ...]
    dtype: Any
    sharding: NamedSharding

    @property
    def bytes(self) -> int:
        """Of the whole array."""
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def bytes_per_device(self) -> int:
        """Of one device's part."""
        return math.prod(self.sharding.shard_shape(self.shape)) * self.dtype.itemsize


def build(config: Any, devices: Sequence[jax.Device] | None = None) -> Layout:
    """The layout that `config.sharding` means on these devices (all of every process by default).

    Raises `ShardingError` for an unknown preset or axis, or a mesh whose sizes do not give the number of devices.
    """
    table = presets.rules(config)
    devices = list(jax.devices() if devices is None else devices)
    if config.preset == "single":
        if jax.process_count() > 1:
            raise ShardingError(
                f"preset 'single' is one device, but {jax.process_count()} processes take part: "
                "set config.sharding.preset to fsdp"
            )
        devices = devices[:1]
    sizes = presets.sizes(config, len(devices))
    mesh = jax.make_mesh(tuple(sizes.values()), tuple(sizes), axis_types=(AxisType.Auto,) * len(sizes), devices=devices)
    return Layout(config.preset, mesh, table)


def name_of(path: tuple) -> str:
    """A path in a tree as a dotted name, the same for attributes, keys and indices, for a variable and its array."""
    if path and path[-1] == _INSIDE_VARIABLE:
        path = path[:-1]
    return ".".join(str(getattr(key, "key", getattr(key, "name", getattr(key, "idx", key)))) for key in path)


def _meaning(rule: Rule) -> str:
    notes = ["stored in pieces, whole in use"] * rule.stored + ["whole where it does not divide"] * rule.replicable
    return "+".join(rule.mesh_axes) + (f" ({', '.join(notes)})" if notes else "")
