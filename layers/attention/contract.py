"""The contract that every attention variant fulfils, and the registry that finds variants by name."""

import abc
import inspect
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

from flax import nnx
from jaxtyping import Array, Float

from kernels.attention import masks
from kernels.tokens import Tokens
from layers.cache import LayerCache
from layers.hooks import Hooks
from layers.setting import Setting

#: No axis is cut.
NOWHERE: Mapping[str, int] = MappingProxyType({})


class AttentionOutput(NamedTuple):
    """What a layer returns.

    Attributes:
        out: [B, T, D], to be added to the residual stream.
        cache: the cache after these tokens; None if none was given.
        aux: scalars under "loss/<name>" are added to the objective; taps are under "tap/<site>".
    """

    out: Float[Array, "B T D"]
    cache: LayerCache | None
    aux: dict[str, Array]


class Attention(nnx.Module, abc.ABC):
    """Mixes information between tokens.

    A variant is one file in this folder holding one subclass, decorated with `@register`. Its constructor takes a
    `Setting`, the layer's number, `rngs`, and the variant's own options by keyword; `configs/attention/` has a preset
    with the same options. The contract suite runs on every registered variant.
    """

    setting: Setting
    #: Options of the class it specialises that it leaves no choice of.
    fixed: tuple[str, ...] = ()
    #: Causal variants pass the causality and decode tests; others declare False and are tested without.
    causal = True

    @abc.abstractmethod
    def __call__(
        self,
        x: Float[Array, "B T D"],
        tokens: Tokens,
        cache: Any = None,
        hooks: Hooks | None = None,
        layer: int = 0,
    ) -> AttentionOutput:
        """Mixes x; `tokens` has the metadata of its T tokens, `cache` (made by this layer's `init_cache`) what came
        before them.

        `layer` is this layer's number, for hooks.
        """

    @abc.abstractmethod
    def init_cache(self, batch: int, length: int, dtype: str) -> LayerCache:
        """An empty cache for sequences up to `length`."""

    @abc.abstractmethod
    def parameter_count(self) -> int:
        """Number of parameters by formula; tested against the arrays."""

    @abc.abstractmethod
    def flops(self, length: int) -> float:
        """Floating-point operations (2 per multiply-add) of matrix products in one forward pass over a row."""

    @abc.abstractmethod
    def cache_bytes(self, length: int, itemsize: int, parts: Mapping[str, int] = NOWHERE) -> int:
        """Bytes remembered per row of `length` tokens on one device; entries have `itemsize` bytes per number.

        `parts`: into how many pieces a mesh cuts logical axes ("heads" for one)."""

    def all_reduces(self) -> dict[int, int]:
        """Sums over devices in one forward pass under tensor parallelism, and no other communication: numbers per
        token -> how many such sums. By default the one after the output projection."""
        return {self.setting.width: 1}


_VARIANTS: dict[str, type[Attention]] = {}


def register(name: str):
    """Class decorator: makes a variant known under `name` (the `layer` field of its presets)."""

    def add(variant: type[Attention]) -> type[Attention]:
        if name in _VARIANTS:
            raise ValueError(f"two attention layers are called {name!r}")
        _VARIANTS[name] = variant
        return variant

    return add


def variants() -> dict[str, type[Attention]]:
    """The registered variants by name."""
    return dict(sorted(_VARIANTS.items()))


def options(variant: type[Attention]) -> set[str]:
    """The names of a layer's own options: what its constructor takes, and what it hands on to that of its base."""
    names: set[str] = set()
    for kind in variant.__mro__:
        parameters = inspect.signature(kind.__init__).parameters.values()
        names |= {each.name for each in parameters if each.kind is each.KEYWORD_ONLY}
        if not any(each.kind is each.VAR_KEYWORD for each in parameters):
            break
    return names - {"layer_index", "rngs", *variant.fixed}


def visible(mask: masks.Mask, keys: Tokens) -> masks.Mask:
    """`mask`, restricted to the query's own document where documents are packed, and to keys that are no padding."""
    if keys.segment is not None:
        mask = mask & masks.segments()
    return mask if keys.valid is None else mask & masks.valid()


__all__ = ["NOWHERE", "Attention", "AttentionOutput", "Setting", "register", "variants", "visible"]
