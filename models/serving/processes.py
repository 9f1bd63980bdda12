"""Prefill in one process and decoding in another, on two meshes of one shape.

Both processes belong to one run of `jax.distributed`. Their meshes are the two halves of a joint mesh with a leading
axis "role" of 2: 0 reads prompts, 1 decodes. What goes over goes by `ppermute` along that axis, inside `shard_map`:
each device sends its partner in the other half the partner's part, and nothing more. Of one hand-over all arrays of one
kind (shape, type, place) are sent as one, so that a model of equal layers needs a single collective-permute.

    # process 0                                        # process 1
    link = Link(prefill.mesh, decode.mesh)             link = Link(prefill.mesh, decode.mesh)
    source = Prefill(model, prefill)                   source = FromAfar(link, model)
    serve(source, link, kept(model, decode))           engine = Engine(model, layout=decode, prefill=source)
                                                       engine.generate(prompts, ...); source.close()

Every call of a link is one that both processes must make, in the same order: `serve` answers `FromAfar`. Ids of the
prompt go from role 1 to 0, the cache and the logits from 0 to 1.
"""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array

from models.decoder import DecoderLM
from models.serving.handover import Left, Prefill, Prefilled, bucket, fitted
from models.serving.kept import Kept


class Kind(NamedTuple):
    """Shape, type and place of an array on the mesh of its role; nothing cuts its first axis."""

    shape: tuple[int, ...]
    dtype: Any
    spec: PartitionSpec = PartitionSpec()

    @property
    def joint(self) -> PartitionSpec:
        """The place of the arrays of both roles, side by side, on the joint mesh."""
        return PartitionSpec("role", *self.spec[1:])


class Link:
    """Two meshes of one shape, one of each role; both processes make it alike, of the same devices."""

    def __init__(self, prefill: Mesh, decode: Mesh) -> None:
        """Raises `ValueError` for meshes of different axes, or which share devices."""
        if prefill.shape != decode.shape:
            raise ValueError(f"a link joins meshes of one shape, not {dict(prefill.shape)} and {dict(decode.shape)}")
        if set(prefill.devices.flat) & set(decode.devices.flat):
            raise ValueError("a link joins meshes that share no device")
        self.meshes = (prefill, decode)
        names = ("role", *prefill.axis_names)
        self.mesh = Mesh(np.stack([prefill.devices, decode.devices]), names, axis_types=(AxisType.Auto,) * len(names))

    def move(self, arrays: Sequence[Array] | None, kinds: Sequence[Kind], source: int = 0) -> list[Array] | None:
        """Moves arrays of these kinds from the mesh of role `source` to the other, each part to the device in the same
        place. The sending process gives the arrays, the other None; the receiving one gets them."""
        joint = [self._joint(None if arrays is None else arrays[i], kind, source) for i, kind in enumerate(kinds)]
        moved = _move(self.mesh, tuple(kind.joint for kind in kinds), source, joint)
        mesh = self.meshes[1 - source]
        return [self._own(x, kind, mesh) for x, kind in zip(moved, kinds, strict=True)] if _here(mesh) else None

    def lowered(self, kinds: Sequence[Kind], source: int = 0) -> jax.stages.Lowered:
        """The program of `move`, to see what it sends."""
        joint = [
            jax.ShapeDtypeStruct((2 * x.shape[0], *x.shape[1:]), x.dtype, sharding=NamedSharding(self.mesh, x.joint))
            for x in kinds
        ]
        return _move.lower(self.mesh, tuple(kind.joint for kind in kinds), source, joint)

    def _joint(self, array: Array | None, kind: Kind, source: int) -> Array:
        """The array and, in the place of the other role's, zeros: one array over both meshes."""
        parts = {} if array is None else {shard.device: shard.data for shard in array.addressable_shards}
        part = NamedSharding(self.meshes[source], kind.spec).shard_shape(kind.shape)
        for device in self.mesh.devices.flat:
            if device not in parts and device.process_index == jax.process_index():
                parts[device] = jnp.zeros(part, kind.dtype, device=device)
        shape, place = (2 * kind.shape[0], *kind.shape[1:]), NamedSharding(self.mesh, kind.joint)
        return jax.make_array_from_single_device_arrays(shape, place, [*parts.values()])

    def _own(self, moved: Array, kind: Kind, mesh: Mesh) -> Array:
        """The receiving role's half."""
        parts = [shard.data for shard in moved.addressable_shards if shard.device in set(mesh.devices.flat)]
        return jax.make_array_from_single_device_arrays(kind.shape, NamedSharding(mesh, kind.spec), parts)


class FromAfar:
    """What an engine in the decoding process takes for its `prefill`: prompts are read where `serve` runs."""

    def __init__(self, link: Link, model: DecoderLM) -> None:
        """`model` is the one that decodes."""
        self._link, self._longest, self._logits = link, model.setting.max_length, _logits(model)

    def handed(self, prompt: Sequence[int], target: Sequence[Kept]) -> Prefilled:
        """Asks for a prompt, and receives what is left of it."""
        self._ask(prompt)
        layers = cross(self._link, None, target, bucket(len(prompt), self._longest))
        (logits,) = self._link.move(None, [self._logits])
        return Prefilled(logits, layers)

    def close(self) -> None:
        """Lets `serve` return."""
        self._ask(())

    def _ask(self, prompt: Sequence[int]) -> None:
        note = np.zeros((1, 1 + self._longest), np.int32)
        note[0, : len(prompt) + 1] = [len(prompt), *prompt]
        self._link.move([jax.device_put(note, _everywhere(self._link.meshes[1]))], [_note(self._longest)], source=1)


def serve(prefill: Prefill, link: Link, target: Sequence[Kept]) -> int:
    """Reads the prompts that a `FromAfar` asks for until it is closed; returns how many. `target` is `kept` of the
    model and layout that decode (the model may be abstract)."""
    count, longest, kind = 0, prefill.model.setting.max_length, _logits(prefill.model)
    while True:
        (note,) = link.move(None, [_note(longest)], source=1)
        length, *ids = np.asarray(note)[0].tolist()
        if not length:
            return count
        logits, layers = prefill(ids[:length])
        cross(link, fitted(layers, target, link.meshes[0]), target, bucket(length, longest))
        link.move([jax.device_put(logits, _everywhere(link.meshes[0]))], [kind])
        count += 1


def cross(link: Link, layers: Left | None, target: Sequence[Kept], length: int) -> Left | None:
    """Hands the rows of a prompt of `length` padded tokens over: the prefilling process gives what is `fitted` to its
    mesh, the other one None, and gets them on its own mesh."""
    together, kinds = stacks(target, length)
    places = tuple(NamedSharding(link.meshes[0], kind.spec) for kind in kinds)
    moved = link.move(None if layers is None else _stacked(together, places, jax.tree.leaves(layers)), kinds)
    if moved is None:
        return None
    tree = jax.tree.structure(tuple(one.form for one in target))
    return jax.tree.unflatten(tree, _apart(together, moved))


def stacks(target: Sequence[Kept], length: int) -> tuple[tuple[tuple[int, ...], ...], list[Kind]]:
    """How the arrays of such rows are sent: which of them as one, by number, and what these stacks are."""
    groups: dict[Kind, list[int]] = {}
    for i, leaf in enumerate(jax.tree.leaves(tuple(_row(one, length) for one in target))):
        groups.setdefault(Kind(leaf.shape, leaf.dtype, leaf.sharding.spec), []).append(i)
    kinds = [Kind((len(own), *x.shape), x.dtype, PartitionSpec(None, *x.spec)) for x, own in groups.items()]
    return tuple(map(tuple, groups.values())), kinds


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _move(mesh: Mesh, specs: tuple[PartitionSpec, ...], source: int, arrays: list[Array]) -> list[Array]:
    """The collective-permutes, one per array."""

    def permute(*parts: Array) -> list[Array]:
        return [jax.lax.ppermute(part, "role", [(source, 1 - source)]) for part in parts]

    return jax.shard_map(permute, mesh=mesh, in_specs=specs, out_specs=list(specs), check_vma=False)(*arrays)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _stacked(
    together: tuple[tuple[int, ...], ...], places: tuple[NamedSharding, ...], leaves: list[Array]
) -> list[Array]:
    made = [jnp.stack([leaves[i] for i in own]) for own in together]
    return list(map(jax.lax.with_sharding_constraint, made, places))


@functools.partial(jax.jit, static_argnums=0)
def _apart(together: tuple[tuple[int, ...], ...], moved: list[Array]) -> list[Array]:
    found = {i: stack[at] for own, stack in zip(together, moved, strict=True) for at, i in enumerate(own)}
    return [found[i] for i in range(len(found))]


def _row(one: Kept, length: int) -> Any:
    """What a layer keeps of a prompt of so many tokens, abstract."""
    if not one.paged:
        return one.form
    return {
        name: jax.ShapeDtypeStruct((1, length, *x.shape[2:]), x.dtype, sharding=x.sharding)
        for name, x in one.form.items()
    }


def _note(longest: int) -> Kind:
    """What asks for a prompt: its length and its ids; length 0 is the end."""
    return Kind((1, 1 + longest), jnp.int32)


def _logits(model: DecoderLM) -> Kind:
    definition, state = nnx.split(model)
    hidden = jax.ShapeDtypeStruct((1, 1, model.setting.width), model.setting.compute_dtype)
    out = jax.eval_shape(lambda state, x: nnx.merge(definition, state).unembed(x)[:, 0], state, hidden)
    return Kind(out.shape, out.dtype)


def _everywhere(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())


def _here(mesh: Mesh) -> bool:
    """Whether this process has devices of the mesh."""
    return any(device.process_index == jax.process_index() for device in mesh.devices.flat)


__all__ = ["FromAfar", "Kind", "Link", "cross", "serve", "stacks"]
