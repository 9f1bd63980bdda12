"""Prefill on one mesh, and the way of what it leaves behind to the mesh that decodes (TPLA, arXiv 2508.15881, section
on prefill/decode separation).

What a layer leaves of a prompt is either a dict of entries [1, T, G, C], one copy of each head, or a cache of fixed
size of one row. `fitted` makes of it what the decoding layer keeps; `hand_over` puts that on the decoding devices, each
of which gets no more than its part.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec, Sharding
from jaxtyping import Array, Float

from kernels.tokens import Tokens
from layers.cache import Caches, SlotCache, View
from models import generation
from models.decoder import DecoderLM
from models.serving.kept import Kept, Layout, in_force, kept, placed

#: What each layer leaves of a prompt.
Left = tuple[Any, ...]


class Prefilled(NamedTuple):
    """Logits [1, V] after the prompt, and what the layers leave of it, padded to a bucket."""

    logits: Float[Array, "1 V"]
    layers: Left


@functools.partial(jax.tree_util.register_dataclass, data_fields=("entries",), meta_fields=("copies", "fresh"))
@dataclasses.dataclass(frozen=True)
class _Left:
    """The cache of a prefill: it only holds on to the entries it is given, one copy of each head."""

    entries: dict[str, Array]
    copies: int
    fresh: bool = True

    def append(self, entries: dict[str, Array], tokens: Tokens) -> tuple[View, "_Left"]:
        once = {name: x[:, :, :: self.copies] for name, x in entries.items()}
        return View(entries, tokens), _Left(once, self.copies, fresh=False)


class Prefill:
    """A model on the devices that read prompts. It may differ from the one that decodes as far as `fitted` says."""

    def __init__(self, model: DecoderLM, layout: Layout | None = None) -> None:
        """Raises as `kept` does."""
        self.model, self.layout = placed(model, layout), layout
        self._kept = kept(self.model, layout)
        self._definition, self._state = nnx.split(self.model)

    def __call__(self, prompt: Sequence[int]) -> Prefilled:
        """Runs one prompt. Lengths are padded to powers of two, of each of which one program is compiled."""
        ids = np.zeros((1, bucket(len(prompt), self.model.setting.max_length)), np.int32)
        ids[0, : len(prompt)] = prompt
        copies = tuple(one.copies if one.paged else 0 for one in self._kept)
        with in_force(self.layout):
            logits, layers = _prefill(self._definition, copies, self._state, ids, np.array([len(prompt)], np.int32))
        return Prefilled(logits, tuple(_once(left, one) for left, one in zip(layers, self._kept, strict=True)))

    def handed(self, prompt: Sequence[int], target: Sequence[Kept]) -> Prefilled:
        """The same, handed over to where `target` says."""
        logits, layers = self(prompt)
        return Prefilled(logits, hand_over(layers, target))


def bucket(length: int, longest: int) -> int:
    """The length that a prompt is padded to: the next power of two, at least 16 and at most `longest`."""
    return min(max(16, 1 << (length - 1).bit_length()), longest)


def slice_rows(rows: Float[Array, "*n 1 C"], slices: int, rotary: int) -> Float[Array, "*n g c"]:
    """Cuts rows [latent, rotated key] of MLA into those of TPLA: each slice has its channels of the latent, and the
    whole key of `rotary` channels behind them. One slice is the row as it is."""
    latent, key = jnp.split(rows, [rows.shape[-1] - rotary], axis=-1)
    if rows.shape[-2] != 1 or latent.shape[-1] % slices:
        raise ValueError(f"{slices} slices do not divide the latent of rows {rows.shape} with a key of {rotary}")
    latent = latent.reshape(*latent.shape[:-2], slices, -1)
    return jnp.concatenate([latent, jnp.broadcast_to(key, (*latent.shape[:-1], rotary))], axis=-1)


def fitted(layers: Left, target: Sequence[Kept], mesh: Mesh | None = None) -> Left:
    """What the decoding layers keep, made of what a prefill left: whole latents cut into slices, heads copied.

    With a `mesh`, of the prefill's devices and of the shape of the decoding one, each device is left with the part of
    its partner there. Raises `ValueError` for what cannot be made.
    """
    if len(layers) != len(target):
        raise ValueError(f"a prefill of {len(layers)} layers was handed to a decoder of {len(target)}")
    for number, (left, one) in enumerate(zip(layers, target, strict=True)):
        _check(number, left, one)
    forms = tuple(
        (one.copies, one.paged, tuple((name, x.shape[2:], x.dtype) for name, x in one.entries.items()))
        for one in target
    )
    leaves = jax.tree.leaves(tuple(one.form for one in target))
    places = None if mesh is None else tuple(NamedSharding(mesh, x.sharding.spec) for x in leaves)
    return _fit(forms, places, layers)


def hand_over(layers: Left, target: Sequence[Kept]) -> Left:
    """What a prefill in this process left, made to fit and put where the decoding layers keep it: a device gets its
    part and nothing else."""
    places = jax.tree.map(lambda x: x.sharding, tuple(one.form for one in target))
    mesh = _mesh_like(jax.tree.leaves(layers)[0], jax.tree.leaves(places)[0])
    return jax.device_put(fitted(layers, target, mesh), places)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _prefill(definition: nnx.GraphDef, copies: tuple[int, ...], state: nnx.State, ids: Array, lengths: Array) -> Any:
    model = nnx.merge(definition, state)
    longest, dtype = model.setting.max_length, model.setting.compute_dtype
    caches: Left = tuple(
        _Left({}, times) if times else block.attention.init_cache(1, longest, dtype)
        for block, times in zip(model.layers(), copies, strict=True)
    )
    logits, after = generation.prefill(model, ids, lengths, Caches(caches, jnp.zeros((1,), jnp.int32)))
    return logits, tuple(cache.entries if isinstance(cache, _Left) else cache for cache in after.layers)


def _once(left: Any, own: Kept) -> Any:
    """A cache of fixed size with one copy of each head, as entries in pages are already."""
    if own.copies == 1 or not isinstance(left, SlotCache):
        return left
    return dataclasses.replace(left, entries={name: x[:, :, :: own.copies] for name, x in left.entries.items()})


@functools.partial(jax.jit, static_argnums=(0, 1))
def _fit(forms: tuple, places: tuple[NamedSharding, ...] | None, layers: Left) -> Left:
    whole = None if places is None else NamedSharding(places[0].mesh, PartitionSpec())
    made = []
    for left, (copies, paged, entries) in zip(layers, forms, strict=True):
        held = left if paged else getattr(left, "entries", {})
        fit = {name: _to(held[name], copies, shape, dtype, whole) for name, shape, dtype in entries}
        made.append(fit if paged else dataclasses.replace(left, entries=fit) if entries else left)
    if places is None:
        return tuple(made)
    leaves, tree = jax.tree.flatten(tuple(made))
    return jax.tree.unflatten(tree, map(jax.lax.with_sharding_constraint, leaves, places))


def _to(x: Array, copies: int, shape: tuple[int, int], dtype: Any, whole: NamedSharding | None) -> Array:
    heads, width = shape
    sliced = x.shape[2:] != (heads // copies, width)
    if sliced:
        x = slice_rows(x, heads, _rotary(x.shape[-1], heads, width))
    x = jnp.repeat(x, copies, axis=2).astype(dtype)
    # Every device has all of these rows, and cuts its own part; left to itself the partitioner sends keys around.
    return jax.lax.with_sharding_constraint(x, whole) if whole and (sliced or copies > 1) else x


def _rotary(whole: int, slices: int, width: int) -> int:
    """r of rows d + r wide that are d / slices + r wide in slices."""
    return (slices * width - whole) // (slices - 1)


def _check(number: int, left: Any, one: Kept) -> None:
    entries = left if one.paged else getattr(left, "entries", {})
    wanted = {name: (x.shape[2] // one.copies, *x.shape[3:]) for name, x in one.entries.items()}
    found = {name: x.shape[2:] for name, x in entries.items()} if isinstance(entries, dict) else None
    same_kind = isinstance(left, dict) if one.paged else type(left) is type(one.cache)
    if same_kind and found == wanted and (one.paged or _sizes(left) == _sizes(one.cache)):
        return
    if same_kind and one.sliced and set(found) == {"latent"} and found["latent"][0] == 1 < wanted["latent"][0]:
        (slices, width), whole = wanted["latent"], found["latent"][1]
        rotary = _rotary(whole, slices, width)
        if 0 <= rotary < width and slices * (width - rotary) + rotary == whole:
            return
    raise ValueError(
        f"layer {number}: the prefill leaves {found or type(left).__name__}, and the decoder keeps "
        f"{wanted or type(one.cache).__name__}: both need the same attention, or mla and tpla of the same widths"
    )


def _sizes(cache: Any) -> list[tuple[int, ...]]:
    """Shapes of what is no entry of heads."""
    rest = (cache.tokens, cache.length) if isinstance(cache, SlotCache) else cache
    return [x.shape for x in jax.tree.leaves(rest)]


def _mesh_like(source: Array, target: Sharding) -> Mesh | None:
    """The mesh of `source`, if it has the axes of the target's."""
    meshes = [getattr(sharding, "mesh", None) for sharding in (source.sharding, target)]
    return meshes[0] if None not in meshes and meshes[0].shape == meshes[1].shape else None


__all__ = ["Left", "Prefill", "Prefilled", "bucket", "fitted", "hand_over", "slice_rows"]
