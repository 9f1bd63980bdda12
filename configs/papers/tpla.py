"""TPLA (arXiv 2508.15881): a byte-level language model of MLA with a tight latent, to be cut into slices.

    python train.py --config=configs/papers/tpla.py
    python train.py --config=configs/papers/tpla.py:attention=tpla
    python eval.py --claim=tpla

Arguments:
    attention   mla | tpla | gla: what is trained (the claim trains mla and converts it)
    rank        d_c, channels of the latent: 16 is tight for 8 heads; with 64 most of them hold next to nothing
    smoke       a model of two blocks for 20 steps
"""

import ml_collections

from configs import attention, base, lm
from configs.command_line import arguments
from configs.errors import ConfigError, unknown


def get_config(text: str = "") -> ml_collections.ConfigDict:
    """The config that `attention=...,rank=...,smoke` describes."""
    args = arguments(text, attention="mla", rank=16, smoke=False)
    if args.attention not in ("mla", "tpla", "gla"):
        raise ConfigError(unknown("attention", args.attention, ("mla", "tpla", "gla")))
    config = base.get_config()
    config.name = f"tpla-{args.attention}-{args.rank}"
    config.model.width = 128
    config.model.depth = 4
    config.model.max_length = 128
    config.model.mlp.width = 352
    options = config.model.attention = attention.get(args.attention)
    options.heads = 8
    options.kv_lora_rank = args.rank // options.get("latents", 1)
    config.data.tokenizer = "byte"
    config.data.length = 128
    config.data.batch_size = 32
    config.optimizer.learning_rate = 3e-3
    config.optimizer.warmup_steps = 40
    config.train.steps = 800
    return lm.smoke(config) if args.smoke else config
