"""Lightning attention (TransNormerLLM, arXiv 2405.17381): linear attention with a fixed decay per head."""

import ml_collections

from configs.rules import Rules


def get_config() -> ml_collections.ConfigDict:
    config = ml_collections.ConfigDict()
    config.layer = "lightning"
    config.heads = 8
    config.head_dim = 32  # Width of a query or key head.
    config.value_dim = 0  # Width of a value head; 0 means head_dim.
    config.decay = "alibi"  # alibi (released code) | paper | minimax | none: how fast a head of a layer forgets.
    config.layer_factor = True  # Lower layers decay faster, the top layer hardly at all.
    config.activation = "silu"  # silu | elu1 (1 + elu) | none, on queries and keys.
    config.activate_values = False  # The activation on values too.
    config.gate = "plain"  # Output gate x U: plain | sigmoid | none.
    config.norm_gain = False  # A trained gain in the norm of the heads.
    config.lrpe = (True, False)  # Learnable rotary phases (doubling the q/k width), per layer; the last value repeats.
    config.norm_epsilon = 1e-6
    return config


def check(rules: Rules) -> None:
    """Raises ConfigError for options that the layer cannot be built with."""
    rules.whole("heads", "head_dim")
    rules.whole("value_dim", least=0)
    rules.one_of("decay", ("alibi", "paper", "minimax", "none"))
    rules.one_of("activation", ("silu", "elu1", "none"))
    rules.one_of("gate", ("plain", "sigmoid", "none"))
    rules.switch("layer_factor", "activate_values", "norm_gain", "lrpe")
    rules.number("norm_epsilon", above=0)
