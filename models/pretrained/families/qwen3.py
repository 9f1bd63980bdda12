"""Qwen3 (arXiv 2505.09388): a norm on each head of queries and keys, and heads of a width of their own."""

from collections.abc import Mapping
from typing import Any

from models.plan import layer_specs
from models.pretrained.families import _decoder, qwen2
from models.pretrained.settings import Settings

MODEL_TYPES = ("qwen3",)
ARCHITECTURE = "Qwen3ForCausalLM"
mapping, ignored = _decoder.mapping, _decoder.ignored


def config(hf: Settings) -> dict[str, Any]:
    """See `models.pretrained.families`."""
    bias = hf.flag("attention_bias", default=False)
    fields = _decoder.config(hf)
    return fields | qwen2.windows(hf) | {
        "attention.head_dim": hf.whole("head_dim", default=128),
        "attention.qkv_bias": bias,
        "attention.out_bias": bias,
        "attention.qk_norm": True,
        "attention.norm_epsilon": fields["norm.epsilon"],
    }  # fmt: skip


def hf_config(model: Mapping[str, Any]) -> dict[str, Any]:
    """See `models.pretrained.families`."""
    fields = _decoder.hf_config(model) | qwen2.hf_windows(model)
    return fields | {"attention_bias": layer_specs(model)[0]["attention"]["out_bias"]}
