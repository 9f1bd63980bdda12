"""Sliding-window attention with sink tokens (StreamingLLM, Xiao et al. 2023) on grouped key/value heads."""

import ml_collections

from configs.attention import gqa


def get_config() -> ml_collections.ConfigDict:
    config = gqa.get_config()
    config.window = 64
    config.sink_tokens = 4
    return config
