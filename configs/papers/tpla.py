"""TPLA (arXiv 2508.15881): a byte-level language model of MLA with a tight latent, to be cut into slices.

    python train.py --config=configs/papers/tpla.py
    python train.py --config=configs/papers/tpla.py:attention=tpla
    python eval.py --claim=tpla

    # Alignment (section 7 of the paper's recipe): a converted run goes on, taught by the run it was converted from.
    python eval.py convert runs/tpla-mla-16 --mode=tpla --output=runs/sliced
    python train.py --config=configs/papers/tpla.py:attention=tpla,align=layerwise \
        --config.train.init_from=runs/sliced --config.objective.teacher=runs/tpla-mla-16

Arguments:
    attention   mla | tpla | gla: what is trained (the claim trains mla and converts it)
    rank        d_c, channels of the latent: 16 is tight for 8 heads; with 64 most of them hold next to nothing
    align       layerwise (each block's outputs) | logits (end to end): the objective of alignment; none by default
    smoke       a model of two blocks for 20 steps
"""

import ml_collections

from configs import attention, base, lm
from configs.command_line import arguments
from configs.errors import ConfigError, unknown

ALIGNMENTS = {"none": "next_token", "layerwise": "layerwise", "logits": "distillation"}


def get_config(text: str = "") -> ml_collections.ConfigDict:
    """The config that `attention=...,rank=...,smoke` describes."""
    args = arguments(text, attention="mla", rank=16, align="none", smoke=False)
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
    config.data.batch_size = 16
    config.optimizer.learning_rate = 3e-3
    config.optimizer.warmup_steps = 40
    config.train.steps = 800
    if args.align not in ALIGNMENTS:
        raise ConfigError(unknown("align", args.align, ALIGNMENTS))
    if args.align != "none":
        config.name += f"-{args.align}"
        config.objective.name = ALIGNMENTS[args.align]
        # The paper aligns models of billions of weights at 1e-6 (layers) and 2e-5 (logits).
        config.optimizer.name = "muon" if args.align == "layerwise" else "adamw"
        config.optimizer.learning_rate = 3e-4
        config.optimizer.weight_decay = 0.0
        config.optimizer.warmup_steps = 6
        config.train.steps = 200
    return lm.smoke(config) if args.smoke else config
