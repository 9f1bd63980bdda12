"""What each layer of a model keeps of a request, and where on a mesh."""

import contextlib
import dataclasses
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec, Sharding, SingleDeviceSharding

from layers.attention.tpla import TensorParallelLatentAttention
from layers.cache import LayerCache, SlotCache, StateCache
from layers.paged import PagedCache, per_token
from models.decoder import DecoderLM
from sharding import logical


class Layout(Protocol):
    """What serving asks of a `sharding.Layout`."""

    @property
    def mesh(self) -> Mesh:
        """The devices."""

    def activate(self) -> contextlib.AbstractContextManager[logical.Active]:
        """Puts it in force for everything traced inside."""

    def param_shardings(self, abstract_state: Any) -> Any:
        """The tree with a sharding in place of every array."""


@dataclasses.dataclass(frozen=True)
class Kept:
    """What one layer keeps of one request.

    Attributes:
        cache: the layer's cache of one row up to the model's max_length, abstract; each array has its sharding.
        paged: one entry per token, to lie in pages; otherwise the cache has a fixed size (a state, a window).
        copies: how often the entries of each head are there, so that every device finds those of its heads.
        sliced: rows of a whole latent may be cut to make its entries (TPLA).
    """

    cache: Any
    paged: bool
    copies: int = 1
    sliced: bool = False

    @property
    def entries(self) -> dict[str, Any]:
        """Those of heads or slices, [1, S, G, C]; none in a state."""
        return self.cache.entries if isinstance(self.cache, SlotCache) else {}

    @property
    def form(self) -> Any:
        """What is handed over for this layer: its arrays of one row, abstract."""
        return self.entries if self.paged else self.cache

    def empty(self, rows: int, pages: int, page: int) -> PagedCache | LayerCache:
        """The empty cache of `rows` requests: pages without an owner, or so many rows."""
        if not self.paged:
            return jax.tree.map(lambda x: jnp.zeros((rows, *x.shape[1:]), x.dtype, device=x.sharding), self.cache)
        pool = lambda x: jnp.zeros((pages, page, *x.shape[2:]), x.dtype, device=x.sharding)  # noqa: E731
        entries = {name: pool(x) for name, x in self.entries.items()}
        return PagedCache(entries, None, None, fresh=False, axes=self.cache.axes)


def kept(model: DecoderLM, layout: Layout | None = None, dtype: str | None = None) -> tuple[Kept, ...]:
    """What every layer keeps; the model may be abstract. Entries are in the compute dtype by default.

    Raises:
        NotImplementedError: a layer, which is named, keeps entries per token that cannot lie in pages.
        ShardingError: the mesh cuts rows, or does not divide what is kept.
    """
    dtype = dtype or model.setting.compute_dtype
    definition, state = nnx.split(model)
    everywhere: Sharding = SingleDeviceSharding(next(iter(jnp.zeros(()).devices())))
    if layout is not None:
        everywhere = NamedSharding(layout.mesh, PartitionSpec())
    found: list[Kept] = []

    def look(state: nnx.State) -> None:
        for number, block in enumerate(nnx.merge(definition, state).layers()):
            own = _kept(block.attention, number, model.setting.max_length, dtype, layout)
            found.append(dataclasses.replace(own, cache=_with_shardings(own.cache, layout, everywhere)))

    jax.eval_shape(look, state)
    return tuple(found)


def in_force(layout: Layout | None) -> contextlib.AbstractContextManager[Any]:
    """The layout, activated; nothing without one."""
    return contextlib.nullcontext() if layout is None else layout.activate()


def placed(model: DecoderLM, layout: Layout | None) -> DecoderLM:
    """The model with its blocks stored one by one (a step then cuts no stacked weights), on its devices."""
    definition, state = nnx.split(model)
    if any(stack.repeats * stack.period > 1 for stack in model.stacks):
        apart: list[nnx.GraphDef] = []

        def unstack(state: nnx.State) -> nnx.State:
            definition_, state = nnx.split(nnx.merge(definition, state).unstacked())
            apart.append(definition_)
            return state

        state = jax.jit(unstack)(state)
        definition = apart[0]
    return nnx.merge(definition, state if layout is None else jax.device_put(state, layout.param_shardings(state)))


def _kept(layer: Any, number: int, length: int, dtype: str, layout: Layout | None) -> Kept:
    alone = jax.eval_shape(lambda: layer.init_cache(1, length, dtype))
    with in_force(layout):
        if logical.parts("batch") > 1:
            raise logical.ShardingError(
                "rows of a serving engine come and go one by one, so a mesh cannot cut them: set config.sharding.data "
                "to 1"
            )
        cache = jax.eval_shape(lambda: layer.init_cache(1, length, dtype))
        paged = not (isinstance(cache, StateCache) or (type(cache) is SlotCache and cache.window))
        if paged:
            try:
                cache = per_token(layer, length, dtype)
            except NotImplementedError as error:
                raise NotImplementedError(f"layer {number} cannot be served: {error}") from None
    copies = 1
    if isinstance(cache, SlotCache):
        copies = max(x.shape[2] // alone.entries[name].shape[2] for name, x in cache.entries.items())
    sliced = isinstance(layer, TensorParallelLatentAttention)
    return Kept(dataclasses.replace(cache, fresh=False), paged, copies, sliced)


def _with_shardings(cache: Any, layout: Layout | None, everywhere: Sharding) -> Any:
    """The abstract cache, each array with where it lies: entries as their axes say, all else everywhere."""
    cache = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=everywhere), cache)
    if layout is None or not isinstance(cache, SlotCache):
        return cache
    axes = dict(cache.axes)
    entries: dict[str, Any] = {}
    for name, x in cache.entries.items():
        with layout.activate() as active:
            spec = list(active.spec((None, None, *axes[name]), x.shape, what=f"what is kept as {name!r}"))
        while spec and spec[-1] is None:  # As compiled programs write it, so that none is looked for twice.
            spec.pop()
        sharding = NamedSharding(layout.mesh, PartitionSpec(*spec))
        entries[name] = jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)
    return dataclasses.replace(cache, entries=entries)


__all__ = ["Kept", "Layout", "in_force", "kept", "placed"]
