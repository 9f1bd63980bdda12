"""Attention variants, one file each, found by name.

layer = layers.attention.build("mla", width=256, rngs=nnx.Rngs(0), kv_lora_rank=32)
out, cache, aux = layer(x, kernels.tokens.sequence(x.shape[1]))
"""

import importlib
import pkgutil
from typing import Any

from flax import nnx

from layers.attention.contract import Attention, AttentionOutput, register, variants
from layers.setting import Setting

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")


def names() -> tuple[str, ...]:
    """The registered layers."""
    return tuple(variants())


def get(name: str) -> type[Attention]:
    """The class registered as `name`; `ValueError` naming the known ones if there is none."""
    if name not in variants():
        raise ValueError(f"unknown attention layer {name!r}: known are {', '.join(names())}")
    return variants()[name]


def build(layer: str, *, width: int, rngs: nnx.Rngs, layer_index: int = 0, **options: Any) -> Attention:
    """One layer by name, for notebooks and tests; options are the constructor's, or fields of `Setting`."""
    shared = {name: options.pop(name) for name in Setting.__dataclass_fields__ if name in options}
    return get(layer)(Setting(width, **shared), layer_index=layer_index, rngs=rngs, **options)


__all__ = ["Attention", "AttentionOutput", "build", "get", "names", "register"]
