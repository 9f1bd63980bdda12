"""Qwen2 and Qwen2.5 (arXiv 2407.10671): biases on queries, keys and values, windows in the upper layers if at all."""

from collections.abc import Mapping
from typing import Any

from models.pretrained.families import _decoder
from models.pretrained.settings import Settings

MODEL_TYPES = ("qwen2",)
ARCHITECTURE = "Qwen2ForCausalLM"
mapping, ignored = _decoder.mapping, _decoder.ignored


def config(hf: Settings) -> dict[str, Any]:
    """See `models.pretrained.families`."""
    return _decoder.config(hf) | windows(hf) | {"attention.qkv_bias": True}


def windows(hf: Settings) -> dict[str, Any]:
    """The windows: in the layers that layer_types names, or from max_window_layers on; with use_sliding_window only."""
    depth = hf.depth()
    window = None
    if hf.flag("use_sliding_window", default=False):
        window = hf.whole("sliding_window", default=None if "sliding_window" in hf.values else 4096)
    first = hf.whole("max_window_layers", default=28, least=0)
    kinds = tuple(_decoder.KINDS[window is not None and layer >= first] for layer in range(depth))
    return _decoder.windows(hf, hf.texts("layer_types", length=depth, default=kinds), window)


def hf_config(model: Mapping[str, Any]) -> dict[str, Any]:
    """See `models.pretrained.families`."""
    return _decoder.hf_config(model) | hf_windows(model)


def hf_windows(model: Mapping[str, Any]) -> dict[str, Any]:
    """The reverse of `windows`."""
    kinds, window = _decoder.kinds_of(model)
    first = next((layer for layer, kind in enumerate(kinds) if kind == _decoder.KINDS[1]), len(kinds))
    return {
        "use_sliding_window": window is not None,
        "sliding_window": window,
        "max_window_layers": first,
        "layer_types": kinds,
    }
