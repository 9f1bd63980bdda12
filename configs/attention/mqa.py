"""Multi-query attention (Shazeer 2019): one key/value head for all query heads."""

import ml_collections

from configs.attention import mha


def get_config() -> ml_collections.ConfigDict:
    config = mha.get_config()
    config.kv_heads = 1
    return config
