"""GQA with up-projections per query head (TransMLA, arXiv 2502.07864, first version): the cache of GQA, keys of MHA."""

import ml_collections

from configs import rope
from configs.rules import Rules


def get_config() -> ml_collections.ConfigDict:
    config = ml_collections.ConfigDict()
    config.layer = "mha_latent"
    config.heads = 8
    config.key_rank = 64  # Width of the cached latent of the keys: GQA's kv_heads * head_dim.
    config.value_rank = 64  # Width of that of the values.
    config.head_dim = 32  # Width of a query or key head.
    config.value_dim = 0  # Width of a value head; 0 means head_dim.
    config.window = 0  # Keys a query sees, itself included; 0 is all.
    config.qk_norm = False  # RMSNorm of each query and key head before rotation.
    config.norm_epsilon = 1e-6  # Of qk_norm.
    config.soft_cap = 0.0  # c * tanh(scores / c); 0 switches it off.
    config.scale = 0.0  # Softmax scale; 0 means head_dim ** -0.5.
    config.qkv_bias = False  # Of the queries and of both latents.
    config.out_bias = False
    config.rope = rope.get_config()
    return config


def check(rules: Rules) -> None:
    """Raises ConfigError for options that the layer cannot be built with."""
    rules.whole("heads", "key_rank", "value_rank", "head_dim")
    rules.whole("value_dim", "window", least=0)
    rules.switch("qk_norm", "qkv_bias", "out_bias")
    rules.number("soft_cap", "scale", least=0)
    rules.number("norm_epsilon", above=0)
    rope.check(rules.below("rope"))
    if rules["rope"].theta:
        rope.check_width(rules, "head_dim")
