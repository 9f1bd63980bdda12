"""Llama 1, 2 and 3 (Touvron et al. 2023; arXiv 2407.21783), and what was released in their form."""

from collections.abc import Mapping
from typing import Any

from models.plan import layer_specs
from models.pretrained.families import _decoder
from models.pretrained.settings import Settings

MODEL_TYPES = ("llama",)
ARCHITECTURE = "LlamaForCausalLM"
mapping, ignored = _decoder.mapping, _decoder.ignored


def config(hf: Settings) -> dict[str, Any]:
    """See `models.pretrained.families`."""
    bias = hf.flag("attention_bias", default=False)
    return _decoder.config(hf) | {
        "attention.qkv_bias": bias,
        "attention.out_bias": bias,
        "mlp.bias": hf.flag("mlp_bias", default=False),
    }


def hf_config(model: Mapping[str, Any]) -> dict[str, Any]:
    """See `models.pretrained.families`."""
    fields = _decoder.hf_config(model)
    _decoder.whole_heads(model)
    spec = layer_specs(model)[0]
    return fields | {"attention_bias": spec["attention"]["out_bias"], "mlp_bias": spec["mlp"]["bias"]}
