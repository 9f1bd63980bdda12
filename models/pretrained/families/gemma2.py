"""Gemma 2 (arXiv 2408.00118): four norms a block with gains stored less 1, soft caps, a window in every other layer."""

from collections.abc import Mapping
from typing import Any

from models.plan import layer_specs
from models.pretrained.errors import UnsuitedError
from models.pretrained.families import _decoder
from models.pretrained.mapping import Mapped
from models.pretrained.settings import Settings

MODEL_TYPES = ("gemma2",)
ARCHITECTURE = "Gemma2ForCausalLM"
_NORMS = {
    "attention_norm": "input_layernorm",
    "attention_out_norm": "post_attention_layernorm",
    "mlp_norm": "pre_feedforward_layernorm",
    "mlp_out_norm": "post_feedforward_layernorm",
}


def config(hf: Settings) -> dict[str, Any]:
    """See `models.pretrained.families`."""
    hf.only("use_bidirectional_attention", False)
    depth, width = hf.depth(), hf.whole("hidden_size")
    bias = hf.flag("attention_bias", default=False)
    kinds = tuple(_decoder.KINDS[(layer + 1) % 2] for layer in range(depth))
    window = hf.whole("sliding_window", default=None if "sliding_window" in hf.values else 4096)
    # Absent is the library's default, null is no cap.
    caps = {
        name: hf.number(name, default=0.0 if name in hf.values else default, above=0)
        for name, default in (("attn_logit_softcapping", 50.0), ("final_logit_softcapping", 30.0))
    }
    values = hf.values | {"hidden_activation": hf.text("hidden_activation", default="gelu_pytorch_tanh")}
    fields = _decoder.config(Settings(values, hf.where, hf.path), tied=True, activation="hidden_activation")
    return fields | _decoder.windows(hf, hf.texts("layer_types", length=depth, default=kinds), window) | {
        "embedding_scale": width**0.5,
        "logit_cap": caps["final_logit_softcapping"],
        "norm.offset": 1.0,
        "residual.form": "sandwich",
        "attention.head_dim": hf.whole("head_dim", default=256),
        "attention.scale": hf.number("query_pre_attn_scalar", default=256, above=0) ** -0.5,
        "attention.soft_cap": caps["attn_logit_softcapping"],
        "attention.qkv_bias": bias,
        "attention.out_bias": bias,
    }  # fmt: skip


def hf_config(model: Mapping[str, Any]) -> dict[str, Any]:
    """See `models.pretrained.families`."""
    fields = _decoder.hf_config(model, activation="hidden_activation")
    _decoder.whole_heads(model)
    attention = layer_specs(model)[0]["attention"]
    scalar = (attention["scale"] or attention["head_dim"] ** -0.5) ** -2
    if abs(scalar - round(scalar)) > 1e-6 * scalar:
        raise UnsuitedError(f"its attention.scale {attention['scale']} is no whole number to the power -1/2")
    kinds, window = _decoder.kinds_of(model)
    return fields | {
        "layer_types": kinds,
        "sliding_window": window,
        "query_pre_attn_scalar": round(scalar),
        "attn_logit_softcapping": attention["soft_cap"] or None,
        "final_logit_softcapping": model["logit_cap"] or None,
        "attention_bias": attention["out_bias"],
    }


def mapping(model: Mapping[str, Any]) -> list[Mapped]:
    """See `models.pretrained.families`."""
    return _decoder.mapping(model, _NORMS)


def ignored(hf: Settings) -> tuple[str, ...]:
    """See `models.pretrained.families`."""
    return _decoder.ignored(hf, tied=True)
