"""Lightning attention (TransNormerLLM, arXiv 2405.17381): linear attention with a fixed decay per head."""

import ml_collections

from configs.rules import Rules


def get_config() -> ml_collections.ConfigDict:
    config = ml_collections.ConfigDict()
    config.layer = "lightning"
    config.heads = 8
    config.head_dim = 32  # Width of a query or key head.
    config.value_dim = 0  # Width of a value head; 0 means head_dim.
    config.decay = "alibi"  # alibi (released code) | paper | none: the rule for the per-head, per-layer decay.
    config.layer_factor = True  # Lower layers decay faster, the top layer hardly at all.
    config.activation = "silu"  # silu | elu1 (1 + elu) | none, on queries and keys.
    config.gate = True  # Output gate U, without activation.
    config.lrpe = (True, False)  # Learnable rotary phases (doubling the q/k width), per layer; the last value repeats.
    config.norm_epsilon = 1e-6
    return config


def check(rules: Rules) -> None:
    """Raises ConfigError for options that the layer cannot be built with."""
    rules.whole("heads", "head_dim")
    rules.whole("value_dim", least=0)
    rules.one_of("decay", ("alibi", "paper", "none"))
    rules.one_of("activation", ("silu", "elu1", "none"))
    rules.switch("layer_factor", "gate", "lrpe")
    rules.number("norm_epsilon", above=0)
