"""Multi-head attention (Vaswani et al. 2017) with rotary positions; the softmax layer the other presets specialise."""

import ml_collections

from configs import rope
from configs.rules import Rules


def get_config() -> ml_collections.ConfigDict:
    config = ml_collections.ConfigDict()
    config.layer = "mha"
    config.heads = 8  # Query heads.
    config.kv_heads = 8  # Key/value heads: = heads MHA, 1 MQA, between GQA; must divide heads.
    config.head_dim = 32  # Width of a query or key head.
    config.value_dim = 0  # Width of a value head; 0 means head_dim.
    config.window = 0  # Keys a query sees, itself included; 0 is all.
    config.sink_tokens = 0  # First tokens of a document that stay visible outside the window.
    config.learned_sinks = False  # One logit per head in the softmax denominator.
    config.qk_norm = False  # RMSNorm of each query and key head before rotation.
    config.norm_epsilon = 1e-6  # Of qk_norm.
    config.soft_cap = 0.0  # c * tanh(scores / c); 0 switches it off.
    config.scale = 0.0  # Softmax scale; 0 means head_dim ** -0.5.
    config.qkv_bias = False
    config.out_bias = False
    config.rope = rope.get_config()
    return config


def check(rules: Rules) -> None:
    """Raises ConfigError for options that the layer cannot be built with."""
    rules.whole("heads", "kv_heads", "head_dim")
    rules.whole("value_dim", "window", "sink_tokens", least=0)
    rules.divides("kv_heads", "heads")
    rules.switch("learned_sinks", "qk_norm", "qkv_bias", "out_bias")
    rules.number("soft_cap", "scale", least=0)
    rules.number("norm_epsilon", above=0)
    if rules["sink_tokens"] and not rules["window"]:
        rules.fail("sink_tokens", f"needs a window: set {rules.name}.window")
    rope.check(rules.below("rope"))
    if rules["rope"].theta:
        rope.check_width(rules, "head_dim")
