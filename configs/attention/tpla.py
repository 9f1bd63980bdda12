"""Tensor-parallel latent attention (TPLA, arXiv 2508.15881): MLA's latent in slices, one per device."""

import ml_collections

from configs.attention import mla
from configs.rules import Rules

OUT_MODES = ("allreduce", "scatter_heads")


def get_config() -> ml_collections.ConfigDict:
    config = mla.get_config()
    config.layer = "tpla"
    del config.latents
    config.slices = 2  # g; each has a softmax of its own. The preset tpla of config.sharding gives each its devices.
    config.norm = "slice"  # Mean square of the latent: slice (times a constant) | whole (summed over slices).
    config.softmax = "slice"  # slice | whole (scores summed over slices: exact, and slow).
    config.prefill = "slice"  # Tokens with nothing cached before them: slice | whole (as MLA computes them).
    config.out_mode = "allreduce"  # allreduce (of outputs) | scatter_heads (values first: W_O is not held twice).
    return config


def check(rules: Rules) -> None:
    """Raises ConfigError for options that the layer cannot be built with."""
    mla.check_shared(rules)
    rules.whole("slices")
    rules.divides("slices", "kv_lora_rank")
    for field in ("norm", "softmax", "prefill"):
        rules.one_of(field, ("slice", "whole"))
    rules.one_of("out_mode", OUT_MODES)
