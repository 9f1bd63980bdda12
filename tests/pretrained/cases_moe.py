"""The configurations with experts that are compared with transformers; see `cases.py`.

Those of `PATCHED` and `PADDED` are recorded by `record_moe.py`.
"""

from typing import Any

_DEEPSEEK = {
    "vocab_size": 61, "hidden_size": 32, "intermediate_size": 40, "moe_intermediate_size": 12, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 4, "kv_lora_rank": 16, "q_lora_rank": 12, "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 6, "v_head_dim": 10, "n_routed_experts": 8, "n_shared_experts": 2, "num_experts_per_tok": 3,
    "first_k_dense_replace": 1, "moe_layer_freq": 1, "max_position_embeddings": 64, "rms_norm_eps": 1e-6,
    "hidden_act": "silu", "attention_bias": False, "attention_dropout": 0.0, "tie_word_embeddings": False,
}  # fmt: skip
_MINIMAX = {
    "vocab_size": 61, "hidden_size": 32, "intermediate_size": 20, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "num_local_experts": 4, "num_experts_per_tok": 2, "block_size": 8,
    "layer_types": ["linear_attention", "linear_attention", "full_attention"],
    "linear_attn_alpha_factor": 2.5, "full_attn_alpha_factor": 1.5, "mlp_alpha_factor": 3.5,
    "linear_attn_beta_factor": 0.8, "full_attn_beta_factor": 1.2, "mlp_beta_factor": 0.9,
    "max_position_embeddings": 64, "rms_norm_eps": 1e-5, "hidden_act": "silu", "sliding_window": None,
}  # fmt: skip


def _yarn(**fields: Any) -> dict[str, Any]:
    return {"type": "yarn", "factor": 8.0, "original_max_position_embeddings": 8} | fields


def _v2(**fields: Any) -> dict[str, Any]:
    """Fields as the release has them."""
    own = {
        "model_type": "deepseek_v2", "architectures": ["DeepseekV2ForCausalLM"], "scoring_func": "softmax",
        "norm_topk_prob": False, "topk_method": "greedy", "n_group": 1, "topk_group": 1, "routed_scaling_factor": 1.0,
        "rope_theta": 10000, "aux_loss_alpha": 0.001, "seq_aux": True,
    }  # fmt: skip
    return {"config": _DEEPSEEK | own | fields, "length": 28}


def _v3(**fields: Any) -> dict[str, Any]:
    own = {
        "model_type": "deepseek_v3", "architectures": ["DeepseekV3ForCausalLM"], "scoring_func": "sigmoid",
        "norm_topk_prob": True, "topk_method": "noaux_tc", "n_group": 4, "topk_group": 2, "routed_scaling_factor": 2.5,
        "rope_theta": 10000, "num_nextn_predict_layers": 1, "ep_size": 1,
    }  # fmt: skip
    return {"config": _DEEPSEEK | own | fields, "length": 28}


def _minimax(**fields: Any) -> dict[str, Any]:
    own = {"model_type": "minimax", "architectures": ["MiniMaxForCausalLM"], "rope_theta": 10000, "postnorm": True}
    # Made from the config; transformers writes them, and the release may lack them.
    return {"config": _MINIMAX | own | fields, "length": 28, "made": r".*\.(slope_rate|\w+_decay)"}


CASES = {
    "deepseek_v2": _v2(
        topk_method="group_limited_greedy", n_group=4, topk_group=2, routed_scaling_factor=4.0,
        rope_scaling=_yarn(beta_fast=32, beta_slow=1, mscale=0.707, mscale_all_dim=0.707),
    ),
    "deepseek_v2_lite": _v2(
        q_lora_rank=None, rms_norm_eps=1e-3, rope_scaling=_yarn(mscale=1.0, mscale_all_dim=0.707)
    ),
    "deepseek_v2_dense": _v2(first_k_dense_replace=2, attention_bias=True),
    "deepseek_v3": _v3(rope_scaling=_yarn(beta_fast=32, beta_slow=1, mscale=1.0, mscale_all_dim=1.0)),
    "deepseek_v3_biases": _v3(
        attention_bias=True, q_lora_rank=None, norm_topk_prob=False, rope_interleave=False, num_hidden_layers=1,
        first_k_dense_replace=0,
        tie_word_embeddings=True, n_group=2, topk_group=1,
    ),
    "kimi_k2": _v3(
        n_group=1, topk_group=1, n_shared_experts=1, routed_scaling_factor=2.827, num_nextn_predict_layers=0,
        rope_theta=50000.0, max_position_embeddings=4096, attention_bias=True, rope_scaling=_yarn(
            original_max_position_embeddings=512, beta_fast=1.0, beta_slow=1.0, mscale=1.0, mscale_all_dim=1.0
        ),
    ),
    "minimax": _minimax(),
    "minimax_windows": _minimax(
        num_attention_heads=6, num_key_value_heads=3, sliding_window=7, num_hidden_layers=2, rope_theta=1e7,
        layer_types=["linear_attention", "full_attention"], rotary_dim=64,
    ),
}  # fmt: skip

# transformers 5.23 turns whole heads whatever `rotary_dim` says; the network was trained to turn the first channels.
PATCHED = {"minimax_rotary": _minimax(num_hidden_layers=1, layer_types=["full_attention"], rotary_dim=4)}
# Tokens of padding before each row.
PADDED = {"minimax": (0, 9)}
