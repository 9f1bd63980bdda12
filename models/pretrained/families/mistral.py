"""Mistral 7B (arXiv 2310.06825): Llama with a sliding window in every layer, or in none."""

from collections.abc import Mapping
from typing import Any

from models.pretrained.families import _decoder
from models.pretrained.settings import Settings

MODEL_TYPES = ("mistral",)
ARCHITECTURE = "MistralForCausalLM"
mapping, ignored = _decoder.mapping, _decoder.ignored


def config(hf: Settings) -> dict[str, Any]:
    """See `models.pretrained.families`."""
    if "layer_types" in hf:
        hf.refuse("layer_types", "is no field of mistral: its window holds in every layer")
    # A file that does not name the window has the library's default, 4096; null is none.
    window = hf.whole("sliding_window", default=None if "sliding_window" in hf.values else 4096)
    return _decoder.config(hf) | {"attention.window": window or 0}


def hf_config(model: Mapping[str, Any]) -> dict[str, Any]:
    """See `models.pretrained.families`."""
    fields = _decoder.hf_config(model)
    return fields | {"sliding_window": _decoder.kinds_of(model)[1]}
