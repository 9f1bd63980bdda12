"""Grouped-query attention (Ainslie et al. 2023): several query heads share a key/value head."""

import ml_collections

from configs.attention import mha


def get_config() -> ml_collections.ConfigDict:
    config = mha.get_config()
    config.kv_heads = 2
    return config
