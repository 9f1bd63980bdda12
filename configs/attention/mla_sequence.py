"""MLA whose cache is spread over devices by tokens (decode context parallelism): exact."""

import ml_collections

from configs.attention import mla
from configs.rules import Rules


def get_config() -> ml_collections.ConfigDict:
    config = mla.get_config()
    config.layer = "mla_sequence"
    del config.latents
    config.parts = 2  # Of the cache; the preset tpla of config.sharding gives each its devices.
    return config


def check(rules: Rules) -> None:
    """Raises ConfigError for options that the layer cannot be built with."""
    mla.check_shared(rules)
    rules.whole("parts")
