"""The configurations that are compared with transformers: config.json files as people have them, old and new.

`CASES` of every module `cases*.py` here: name -> {"config": config.json, "length": tokens per row}. After a change:
python tests/pretrained/record.py, in an environment with torch and transformers.
"""

from typing import Any

_SMALL = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
}


def _case(model_type: str, architecture: str, length: int = 20, **fields: Any) -> dict[str, Any]:
    return {"config": _SMALL | {"model_type": model_type, "architectures": [architecture]} | fields, "length": length}


def _llama(**fields: Any) -> dict[str, Any]:
    return _case("llama", "LlamaForCausalLM", **fields)


def _mistral(**fields: Any) -> dict[str, Any]:
    return _case("mistral", "MistralForCausalLM", **fields)


def _qwen2(**fields: Any) -> dict[str, Any]:
    return _case("qwen2", "Qwen2ForCausalLM", **fields)


def _qwen3(**fields: Any) -> dict[str, Any]:
    return _case("qwen3", "Qwen3ForCausalLM", **fields)


def _gemma2(**fields: Any) -> dict[str, Any]:
    return _case("gemma2", "Gemma2ForCausalLM", **{"head_dim": 8, "sliding_window": 6} | fields)


def _yarn(**fields: Any) -> dict[str, Any]:
    return {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 16} | fields


CASES = {
    "llama1": _llama(num_key_value_heads=None, rope_theta=10000.0, rope_scaling=None, pretraining_tp=1),
    "llama_tied": _llama(tie_word_embeddings=True, num_key_value_heads=1, rope_theta=5e5, torch_dtype="float32"),
    "llama_biases": _llama(
        num_hidden_layers=2, attention_bias=True, mlp_bias=True, head_dim=16, hidden_act="gelu_pytorch_tanh"
    ),
    "llama3": _llama(
        num_hidden_layers=2, rope_theta=500000.0, length=40,
        rope_scaling={"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                      "original_max_position_embeddings": 16},
    ),
    "llama_linear": _llama(rope_theta=10000.0, rope_scaling={"type": "linear", "factor": 4.0}),
    "llama_yarn": _llama(rope_parameters=_yarn(), length=40),
    "llama_yarn_mscale": _llama(
        length=40,
        rope_parameters=_yarn(mscale=0.7, mscale_all_dim=1.2, beta_fast=4.0, beta_slow=0.5),
    ),
    "llama_yarn_factor": _llama(rope_parameters=_yarn(attention_factor=1.3), length=40),
    "llama_yarn_lower": _llama(
        rope_parameters=_yarn(attention_factor=0.8, factor=2.0), length=40
    ),
    "mistral": _mistral(sliding_window=6, rope_theta=10000.0),
    "mistral_whole": _mistral(sliding_window=None, rope_theta=1e6, head_dim=12),
    "qwen2": _qwen2(rope_theta=1e6, use_sliding_window=False, sliding_window=8, max_window_layers=1),
    "qwen2_windows": _qwen2(
        num_hidden_layers=3, use_sliding_window=True, sliding_window=5, max_window_layers=2, tie_word_embeddings=True
    ),
    "qwen2_types": _qwen2(
        num_hidden_layers=3, use_sliding_window=True, sliding_window=5, max_window_layers=3,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
    ),
    "qwen2_yarn": _qwen2(
        rope_theta=1e6, length=40,
        rope_scaling={"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16},
    ),
    "qwen3": _qwen3(num_hidden_layers=2, head_dim=16, tie_word_embeddings=True, rope_theta=1e6),
    "qwen3_biases": _qwen3(
        head_dim=8, attention_bias=True, num_hidden_layers=4, use_sliding_window=True, sliding_window=7,
        layer_types=["sliding_attention", "full_attention"] * 2,
    ),
    "gemma2": _gemma2(query_pre_attn_scalar=20, num_hidden_layers=3, attn_logit_softcapping=2.0,
                      final_logit_softcapping=3.0),
    "gemma2_wide": _gemma2(head_dim=16, query_pre_attn_scalar=16, num_hidden_layers=2, attn_logit_softcapping=None,
                           final_logit_softcapping=None, num_key_value_heads=4),
    "gemma2_types": _gemma2(num_hidden_layers=2, query_pre_attn_scalar=8, attention_bias=True,
                            layer_types=["full_attention", "sliding_attention"]),
}  # fmt: skip
