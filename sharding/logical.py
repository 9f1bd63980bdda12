"""Logical axis names in, shardings out: the only view that layers have of the mesh.

A layer says what an axis of an array means ("heads", "mlp", ...); the active rules say where that axis lives. Outside
`activate` every function here is the identity, so a model costs nothing extra on one device.
"""

import contextlib
import dataclasses
import difflib
import functools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

# One entry per dimension. (name, blocks) is a dimension that holds so many blocks side by side, which stay in one piece
# (the heads of a [D, heads * head_dim] matrix): the blocks must divide, not just the size.
Axes = tuple[str | tuple[str, int] | None, ...]

# What a user changes when an axis does not divide.
_FIELDS = {
    "batch": "config.data.batch_size",
    "length": "config.data.length",
    "embed": "config.model.width",
    "heads": "config.model.attention.heads",
    "kv_heads": "config.model.attention.kv_heads",
    "head_dim": "config.model.attention.head_dim",
    "mlp": "config.model.mlp.width",
    "vocab": "config.model.vocab_multiple",
    "latent": "the latent ranks of config.model.attention",
    "slices": "config.model.attention.slices",
    "slice_heads": "config.model.attention.heads",
    "slice_head_parts": "config.model.attention.heads",
    "experts": "config.model.mlp.experts.count",
    "expert_mlp": "config.model.mlp.experts.width",
    "layers": "config.model.depth",
}


class ShardingError(ValueError):
    """A mesh, a table or an array that do not fit together; the message is one line and says what to set."""


@dataclasses.dataclass(frozen=True)
class Rule:
    """Where one logical axis lives.

    `stored` rules hold for parameters at rest only: `gather` makes the axis whole for the time of use (fully sharded
    data parallelism). A `replicable` axis stays whole where it does not divide (key/value heads fewer than the
    model axis); any other axis that does not divide is an error.
    """

    mesh_axes: tuple[str, ...] = ()
    stored: bool = False
    replicable: bool = False


@dataclasses.dataclass(frozen=True)
class Active:
    """A mesh with its rules; hashable, because it is part of the key of every jit cache."""

    mesh: Mesh
    rules: tuple[tuple[str, Rule], ...]

    @property
    def kernel_mesh(self) -> Mesh:
        """The mesh without its axes of one device: `shard_map` would sum gradients along those, one by one."""
        names = tuple(name for name, size in self.mesh.shape.items() if size > 1)
        devices = self.mesh.devices.reshape([self.mesh.shape[name] for name in names])
        return Mesh(devices, names, axis_types=(AxisType.Auto,) * len(names))

    def rule(self, name: str) -> Rule:
        """The rule of a logical axis; `ShardingError` for a name the table does not have."""
        rules = dict(self.rules)
        if name not in rules:
            raise ShardingError(unknown("logical axis", name, rules))
        return rules[name]

    def parts(self, name: str) -> int:
        """How many pieces the axis `name` is cut into while it is used."""
        rule = self.rule(name)
        return 1 if rule.stored else self.size(rule.mesh_axes)

    def size(self, mesh_axes: Iterable[str]) -> int:
        """The number of devices along some mesh axes."""
        return math.prod(self.mesh.shape[axis] for axis in mesh_axes)

    def spec(self, axes: Axes, shape: Sequence[int], *, at_rest: bool = False, what: str = "array") -> PartitionSpec:
        """The `PartitionSpec` of an array with these logical axes.

        A mesh axis serves one dimension of an array. Where a stored rule finds its mesh axis taken by another
        dimension it stays whole; two dimensions in use on the same mesh axis are an error.
        `what` names the array in errors. Raises `ShardingError` for a wrong rank, an unknown axis, two dimensions on
        one mesh axis, or a size that does not divide.
        """
        if len(axes) != len(shape):
            raise ShardingError(
                f"{what} of shape {tuple(shape)} has axes {axes}: give one name (or None) per dimension"
            )
        dimensions: list[tuple[str, ...]] = [()] * len(axes)
        owner: dict[str, str] = {}
        # Axes in use claim their mesh axis before stored ones, whatever their order in the array.
        for stored in (False, True):
            for i, axis in enumerate(axes):
                name, blocks = axis if isinstance(axis, tuple) else (axis, shape[i])
                rule = Rule() if name is None else self.rule(name)
                wanted = self.cutting(rule)
                if not wanted or rule.stored != stored or (stored and not at_rest):
                    continue
                taken = [owner[axis] for axis in wanted if axis in owner]
                if taken and stored:
                    continue
                if taken:
                    raise ShardingError(
                        f"axes {taken[0]!r} and {name!r} of {what} both live on mesh axis {'x'.join(wanted)!r}: "
                        f"set one of them to None in config.sharding.rules"
                    )
                if blocks % self.size(wanted):
                    if rule.replicable:
                        continue
                    raise ShardingError(self.indivisible(name, blocks, wanted, what))
                owner.update(dict.fromkeys(wanted, name))
                dimensions[i] = wanted
        return PartitionSpec(*map(_entry, dimensions))

    def cutting(self, rule: Rule) -> tuple[str, ...]:
        """The mesh axes of a rule that have more than one device."""
        return tuple(axis for axis in rule.mesh_axes if self.mesh.shape[axis] > 1)

    def indivisible(self, name: str, size: int, mesh_axes: tuple[str, ...], what: str) -> str:
        """The message for an axis that does not divide."""
        along = " x ".join(mesh_axes)
        return (
            f"axis {name!r} of {what} has size {size}, which mesh axis {along!r} of size {self.size(mesh_axes)} does "
            f"not divide: change {_FIELDS.get(name, 'that size')} or config.sharding.{mesh_axes[0]}, "
            f"or add ({name!r}, None) to config.sharding.rules"
        )


# A user context and not a plain context variable: jit must trace again when the layout changes.
_active = jax.make_user_context(default_value=None)


def active() -> Active | None:
    """The mesh and rules in force; None without, and on a mesh of one device, where there is nothing to lay out."""
    value = _active.value
    return value if value is not None and value.mesh.size > 1 else None


@contextlib.contextmanager
def activate(mesh: Mesh, rules: Mapping[str, Rule | str | None]) -> Iterator[Active]:
    """Put a mesh and its rules in force for everything traced inside. A rule may be just the name of a mesh axis."""
    value = Active(mesh, normalise(mesh, rules))
    with _active(value):
        yield value


def normalise(mesh: Mesh, rules: Mapping[str, Rule | str | None]) -> tuple[tuple[str, Rule], ...]:
    """Rules in their hashable form; `ShardingError` for a mesh axis that the mesh does not have."""
    result = []
    for name, rule in rules.items():
        if not isinstance(rule, Rule):
            rule = Rule(() if rule is None else (rule,))
        for axis in rule.mesh_axes:
            if axis not in mesh.shape:
                raise ShardingError(f"the rule of {name!r} has an " + unknown("mesh axis", axis, mesh.shape))
        result.append((name, rule))
    return tuple(result)


def constrain(x: jax.Array, axes: Axes) -> jax.Array:
    """`x` laid out by the active rules; identity when none are active or the mesh is one device.

    Raises `ShardingError` if a dimension does not divide over its mesh axis.
    """
    context = active()
    if context is None:
        return x
    return _place(x, NamedSharding(context.mesh, context.spec(axes, x.shape)))


def gather(weight: jax.Array, axes: Axes) -> jax.Array:
    """A parameter as the computation needs it: stored axes made whole, the others left split.

    Call it on every weight right before its use (inside the scan over layers, after the cast to the compute type), so
    that one layer at a time is whole. The gradient goes back to the layout at rest. Identity when nothing is active.
    """
    context = active()
    if context is None:
        return weight
    whole = NamedSharding(context.mesh, context.spec(axes, weight.shape, what="weight"))
    rest = NamedSharding(context.mesh, context.spec(axes, weight.shape, at_rest=True, what="weight"))
    return _gather(weight, whole, rest)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _gather(weight: jax.Array, whole: NamedSharding, rest: NamedSharding) -> jax.Array:
    return _place(_place(weight, rest), whole)


def _gather_forward(weight: jax.Array, whole: NamedSharding, rest: NamedSharding) -> tuple[jax.Array, None]:
    return _place(_place(weight, rest), whole), None  # Not by _gather: `save_all_but_gathered` must see the placing.


def _gather_backward(whole: NamedSharding, rest: NamedSharding, _: None, gradient: jax.Array) -> tuple[jax.Array]:
    # Two steps, a sum and a cut, are one reduce-scatter where the compiler has it. Asked for the pieces at once, the
    # partitioner moves activations instead for some gradients (the embedding table's).
    return (_place(_place(gradient, whole), rest),)


_gather.defvjp(_gather_forward, _gather_backward)


def save_all_but_gathered(primitive: Any, *_: Any, **parameters: Any) -> bool:
    """The `jax.checkpoint` policy that recomputes nothing but layouts: gathered weights are gathered again.

    A layer differentiated without it keeps its whole weights until the backward pass, so that a scan over layers ends
    up with the whole model on every device.
    """
    return primitive.name != "sharding_constraint"


def shard_kernel(function: Callable, in_axes: Sequence[Axes | None], out_axes: Any) -> Callable:
    """`function` run once per device on that device's part (`shard_map`); identity when nothing is active.

    `in_axes` has one entry per positional argument: the logical axes of that array, or of every array inside it where
    the argument is a pytree (there a dimension of size 1 is a broadcast one and stays whole), or None for replicated.
    `out_axes` is the axes of the result (`()` for a replicated one), or a tuple of them. `function` must not mix data
    across split axes, and per-head constants must be arguments of it, not closures.
    """
    context = active()
    if context is None:
        return function

    def local(*arguments: Any) -> Any:
        with _active(None):  # Inside, arrays are one device's own: constraints have nothing to say.
            return function(*arguments)

    @functools.wraps(function)
    def sharded(*arguments: Any) -> Any:
        if len(arguments) != len(in_axes):
            raise ShardingError(f"shard_kernel got {len(arguments)} arguments and the axes of {len(in_axes)}")
        pairs = list(zip(arguments, in_axes, strict=True))
        in_specs = tuple(_argument_specs(context, argument, axes, i) for i, (argument, axes) in enumerate(pairs))
        whole = _left_whole(context, pairs, in_specs)
        # check_vma=False: kernels with their own derivative rules do not state how their results vary.
        out_specs = _output_specs(context, out_axes, whole)
        mapped = jax.shard_map(local, mesh=context.kernel_mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)
        return mapped(*arguments)

    return sharded


def kv_repeat(heads: int, kv_heads: int) -> int:
    """How often each key/value head is repeated so that the heads axis splits them evenly; 1 when nothing is active.

    `ShardingError` if the query heads themselves do not divide.
    """
    context = active()
    parts = 1 if context is None else context.parts("heads")
    if heads % parts:
        raise ShardingError(context.indivisible("heads", heads, context.rule("heads").mesh_axes, "queries"))
    return repeats(heads, kv_heads, parts)


def repeats(heads: int, kv_heads: int, parts: int) -> int:
    """The least factor r for which `kv_heads * r` divides over `parts` devices and each device's query heads find
    exactly their own key/value heads on it."""
    return next(r for r in range(1, heads + 1) if kv_heads * r % parts == 0 and heads % (kv_heads * r) == 0)


def parts(name: str) -> int:
    """Into how many pieces the active mesh cuts this logical axis in use; 1 when nothing is active."""
    context = active()
    return 1 if context is None else context.parts(name)


def mesh_axes(*names: str) -> tuple[str, ...]:
    """The mesh axes that cut these logical axes in use, for collectives inside `shard_kernel`; () when nothing is
    active. Call it outside the function that is sharded."""
    context = active()
    if context is None:
        return ()
    rules = [context.rule(name) for name in names]
    found = [axis for rule in rules if not rule.stored for axis in context.cutting(rule)]
    return tuple(dict.fromkeys(found))


def unknown(kind: str, name: str, known: Iterable[str]) -> str:
    """The message for a name that is not there, with the nearest ones."""
    known = sorted(known)
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(near)}?" if near else f"known: {', '.join(known)}"
    return f"unknown {kind} {name!r}: {hint}"


def _place(x: jax.Array, sharding: NamedSharding) -> jax.Array:
    if isinstance(x, jax.core.Tracer):
        return jax.lax.with_sharding_constraint(x, sharding)
    return jax.device_put(x, sharding)  # Outside jit an array may still sit on one device.


def _argument_specs(context: Active, argument: Any, axes: Axes | None, i: int) -> Any:
    what = f"kernel argument {i}"
    if axes is None:
        return jax.tree.map(lambda _: PartitionSpec(), argument)
    if hasattr(argument, "shape"):
        return context.spec(axes, argument.shape, what=what)

    def of_part(x: jax.Array) -> PartitionSpec:
        if len(axes) != len(x.shape):
            return context.spec(axes, x.shape, what=what)  # Raises.
        split = tuple(None if size == 1 else name for name, size in zip(axes, x.shape, strict=True))
        return context.spec(split, x.shape, what=what)

    return jax.tree.map(of_part, argument)


def _left_whole(context: Active, pairs: list[tuple[Any, Axes | None]], specs: tuple[Any, ...]) -> frozenset[str]:
    """The replicable axes that some argument could not split; the results cannot be split along them either."""
    return frozenset(
        name
        for (argument, axes), spec in zip(pairs, specs, strict=True)
        if axes is not None and hasattr(argument, "shape")
        for name, placed in zip(axes, spec, strict=True)
        if isinstance(name, str) and placed is None and context.rule(name).replicable
    )


def _output_specs(context: Active, axes: Any, whole: frozenset[str]) -> Any:
    if not all(name is None or isinstance(name, str) for name in axes):  # Blocks have no place in a result.
        return tuple(_output_specs(context, one, whole) for one in axes)
    dimensions = []
    for name in axes:
        rule = Rule() if name is None or name in whole else context.rule(name)
        dimensions.append(_entry(() if rule.stored else context.cutting(rule)))
    return PartitionSpec(*dimensions)


def _entry(mesh_axes: tuple[str, ...]) -> str | tuple[str, ...] | None:
    """One dimension of a `PartitionSpec`."""
    return None if not mesh_axes else mesh_axes[0] if len(mesh_axes) == 1 else mesh_axes
