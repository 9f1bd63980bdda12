"""Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434): one latent per token serves keys and values."""

import ml_collections

from configs import rope
from configs.rules import Rules


def get_config() -> ml_collections.ConfigDict:
    config = ml_collections.ConfigDict()
    config.layer = "mla"
    config.heads = 8
    config.latents = 1  # GLA has several, each for its own group of heads.
    config.q_lora_rank = 0  # Rank of the query path; 0 is one full matrix.
    config.kv_lora_rank = 64  # d_c, the width of a cached latent.
    config.qk_nope_head_dim = 32  # d_n, the part of a head without positions.
    config.qk_rope_head_dim = 16  # d_r, the rotated part; its key is shared by all heads.
    config.v_head_dim = 32  # d_v.
    config.latent_norm = "rms"  # Of the query's latent too: rms | none (latents made from another attention).
    config.norm_epsilon = 1e-6  # Of the two latent norms.
    config.window = 0  # Keys a query sees, itself included; 0 is all.
    config.soft_cap = 0.0  # c * tanh(scores / c); 0 switches it off.
    config.scale = 0.0  # Softmax scale before YaRN's factor; 0 means (d_n + d_r) ** -0.5.
    config.query_down_bias = False  # With a q_lora_rank.
    config.query_bias = False
    config.latent_bias = False  # Of the latent and of the rotated key.
    config.out_bias = False
    config.rope = rope.get_config()
    return config


def check(rules: Rules) -> None:
    """Raises ConfigError for options that the layer cannot be built with."""
    check_shared(rules)
    rules.whole("latents")
    rules.divides("latents", "heads")


def check_shared(rules: Rules) -> None:
    """The rules about options that every form of latent attention has."""
    rules.whole("heads", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")
    rules.whole("q_lora_rank", "window", least=0)
    rules.one_of("latent_norm", ("rms", "none"))
    rules.number("norm_epsilon", above=0)
    rules.number("scale", "soft_cap", least=0)
    rules.switch("query_down_bias", "query_bias", "latent_bias", "out_bias")
    rope.check(rules.below("rope"))
    if rules["rope"].theta:
        rope.check_width(rules, "qk_rope_head_dim")
