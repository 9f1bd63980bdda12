"""Rotary positions and how they stretch beyond the trained length."""

import ml_collections

from configs.rules import Rules


def get_config() -> ml_collections.ConfigDict:
    """Fields of `layers.rope.Rope`."""
    config = ml_collections.ConfigDict()
    config.theta = 10000.0  # Base of the frequencies; 0 switches rotary positions off.
    config.layout = "half"  # half (i with i + d/2) | interleaved (2i with 2i + 1).
    config.share = 1.0  # The share of a head's channels, from the first, that is rotated.
    config.scaling = "none"  # none | linear | ntk | yarn | llama3.
    config.factor = 1.0  # How many times longer than original_length.
    config.original_length = 4096  # Length the frequencies were trained for.
    config.beta_fast = 32.0  # yarn: rotations above which a channel is left alone.
    config.beta_slow = 1.0  # yarn: rotations below which a channel is interpolated.
    config.mscale = 1.0  # yarn: numerator of the factor on cos and sin.
    config.mscale_all_dim = 0.0  # yarn: its denominator, and the square on the logits (MLA).
    config.low_freq_factor = 1.0  # llama3.
    config.high_freq_factor = 4.0  # llama3.
    return config


def check(rules: Rules) -> None:
    """Raises ConfigError for positions that cannot be computed."""
    rules.number("theta", least=0)
    if 0 < rules["theta"] <= 1:
        rules.fail("theta", "must be above 1, or 0 for no rotary positions")
    rules.one_of("layout", ("half", "interleaved"))
    rules.number("share", above=0, most=1)
    rules.one_of("scaling", ("none", "linear", "ntk", "yarn", "llama3"))
    rules.number("factor", least=1)
    rules.whole("original_length")
    rules.number("beta_fast", "beta_slow", "low_freq_factor", "high_freq_factor", above=0)
    rules.number("mscale", "mscale_all_dim", least=0)
    if rules["beta_fast"] < rules["beta_slow"]:  # Kimi-K2 has them equal.
        rules.fail("beta_fast", f"must not be below {rules.name}.beta_slow = {rules['beta_slow']}")
    if rules["high_freq_factor"] <= rules["low_freq_factor"]:
        rules.fail("high_freq_factor", f"must be above {rules.name}.low_freq_factor = {rules['low_freq_factor']}")


def check_width(rules: Rules, field: str) -> None:
    """Raises ConfigError if the rotated share of a head of that width is not pairs of channels."""
    share = rules["rope"].share
    if share == 1:
        rules.even(field, why="rotary positions turn pairs of channels")
    elif (rules[field] * share) % 2:
        rules.fail(field, f"times {rules.name}.rope.share = {share} must be even: rotary positions turn pairs")
