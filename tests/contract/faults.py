"""Copies of variants with a planted fault, which the contract suite must notice."""

import dataclasses
import importlib.util
import inspect
import itertools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

import layers.attention
from layers.attention.contract import AttentionOutput
from tests.contract.cases import Case

_number = itertools.count()


@dataclasses.dataclass(frozen=True)
class SourceFault:
    """A registered layer whose source is copied with one expression changed."""

    layer: str
    preset: str
    check: str
    old: str
    new: str
    changes: tuple[tuple[str, Any], ...] = ()

    def case(self, folder: Path) -> "FaultyCase":
        """A case on the changed copy; the copy is loaded from `folder` under a name of its own."""
        source = inspect.getsource(inspect.getmodule(layers.attention.get(self.layer)))
        assert source.count(self.old) >= 1, f"{self.layer} no longer contains {self.old!r}: renew this fault"
        name = f"{self.layer}_fault_{next(_number)}"
        copy = folder / f"{name}.py"
        copy.write_text(
            source.replace(self.old, self.new).replace(f'@register("{self.layer}")', f'@register("{name}")')
        )
        spec = importlib.util.spec_from_file_location(name, copy)
        spec.loader.exec_module(importlib.util.module_from_spec(spec))
        return FaultyCase(name, self.preset, self.changes)


@dataclasses.dataclass(frozen=True)
class FaultyCase(Case):
    """A case that builds the layer registered under its own name."""

    def options(self) -> dict[str, Any]:
        return super().options() | {"layer": self.name}


SOURCE_FAULTS = (
    SourceFault("mha", "gqa", "causality", "masks.causal()", "masks.everything()"),
    SourceFault("mha", "gqa", "causality", "masks.causal()", "masks.predicate(lambda q, k: q.index + 1 >= k.index)"),
    SourceFault("mha", "gqa", "packing", "visible(self.mask, view.tokens)", "self.mask"),
    SourceFault("mha", "gqa", "packing", "tokens.positions()", "tokens.index.astype(jnp.float32) ** 1.1"),
    SourceFault("mha", "sliding", "decoding", "window=self.window)", "window=self.window and self.window - 1)"),
    SourceFault("mha", "sliding", "decoding", "pinned = self.sink_tokens if", "pinned = 0 if"),
    SourceFault("mha", "gqa", "decoding", "position = tokens.positions()",
                "position = tokens.positions() * (1 + (cache is not None))"),
    SourceFault("mha", "gqa", "declared_parameters", "count = width", "count = 1 + width"),
    SourceFault("mla", "mla", "causality", "masks.causal()", "masks.everything()"),
    SourceFault("mla", "mla", "packing", "visible(self.mask, keys)", "self.mask"),
    SourceFault("mla", "mla", "decoding", "return contracted(\"bthc,chv->bthv\", read,",
                "return contracted(\"bthc,chv->bthv\", 1.01 * read,"),
    SourceFault("tpla", "tpla", "decoding", "return jnp.sum(read.reshape(", "return jnp.mean(read.reshape("),
    SourceFault("tpla", "tpla", "packing", "mask = visible(self.mask, keys)", "mask = self.mask"),
    SourceFault("mla", "mla", "declared_cache", "(self.rank + self.rotary) * itemsize", "self.rank * itemsize"),
    SourceFault("lightning", "lightning", "packing", "segment=tokens.segment", "segment=None"),
    SourceFault("lightning", "lightning", "decoding", 'cache.state["kv"]', '0.5 * cache.state["kv"]'),
    SourceFault("lightning", "lightning", "decoding", "valid=tokens.valid)", "valid=None)"),
    SourceFault("moh", "moh", "causality", "_whole(self._scores(x, q))", "_whole(self._scores(jnp.roll(x, -1, 1), q))"),
    SourceFault("moh", "moh", "declared_parameters", "parameter_count() + self._routers", "parameter_count()"),
)  # fmt: skip


class Faulty(nnx.Module):
    """Any layer, with a fault put around its call: the generic faults, planted in every variant."""

    def __init__(self, layer: Any, fault: str) -> None:
        self.layer, self.fault = layer, fault

    def init_cache(self, batch: int, length: int, dtype: str) -> Any:
        return self.layer.init_cache(batch, length, dtype)

    def __call__(self, x, tokens, cache=None, hooks=None, layer=0) -> AttentionOutput:
        if self.fault == "packing" and tokens.segment is not None:
            tokens = dataclasses.replace(tokens, segment=jnp.minimum(tokens.segment, 1))
        if self.fault == "gradients":
            x = _wrong_gradient(x)
        later = cache is not None and not cache.fresh
        out, cache, aux = self.layer(x, tokens, cache, hooks, layer)
        if self.fault == "causality":
            out = out + 1e-4 * jnp.roll(out, -1, axis=1)
        if self.fault == "decoding" and later:
            out = 1.001 * out
        return AttentionOutput(out, cache, aux)


GENERIC_FAULTS = ("causality", "packing", "decoding", "gradients")


@jax.custom_vjp
def _wrong_gradient(x):
    return x


_wrong_gradient.defvjp(lambda x: (x, None), lambda _, g: (1.001 * g,))
