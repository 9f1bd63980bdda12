"""GLA: MLA with two latents of half the width, each for half of the heads (arXiv 2505.21487)."""

import ml_collections

from configs.attention import mla


def get_config() -> ml_collections.ConfigDict:
    config = mla.get_config()
    config.latents = 2
    config.kv_lora_rank = 32
    return config
