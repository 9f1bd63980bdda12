"""X-EcoMLA (arXiv 2503.11132): a trained GQA model made into MLA by singular values, distilled, then preference-tuned.

    python train.py --config=configs/papers/x_ecomla.py:stage=base
    python train.py --config=configs/papers/x_ecomla.py:stage=teacher      # Optional: a larger teacher.
    python eval.py convert runs/x-ecomla-base --to=x-ecomla --kv_rank=32 --output=runs/upcycled
    python train.py --config=configs/papers/x_ecomla.py:stage=distill,kv_rank=32 \
        --config.train.init_from=runs/upcycled --config.objective.teacher=runs/x-ecomla-teacher
    python train.py --config=configs/papers/x_ecomla.py:stage=dpo,kv_rank=32 \
        --config.train.init_from=runs/x-ecomla-distill-32 --config.data.sources=pairs.jsonl
    python eval.py --claim=x-ecomla

Arguments:
    stage       base | teacher | distill | dpo
    kv_rank     distill, dpo: channels of the latent, in every layer (dynamic ranks and hybrids: set
                config.model.attention.kv_lora_rank, q_lora_rank, config.model.per_layer as the converted run has them)
    q_rank      distill, dpo: of the query's latent; -1 is what `eval.py convert` takes by itself
    smoke       a model of two blocks for 20 steps
"""

import ml_collections

from configs import attention, base, lm
from configs.command_line import arguments
from configs.errors import ConfigError, unknown

STAGES = ("base", "teacher", "distill", "dpo")
HEADS, KV_HEADS, HEAD_DIM = 8, 4, 32


def get_config(text: str = "") -> ml_collections.ConfigDict:
    """The config that `stage=...,kv_rank=...,smoke` describes."""
    args = arguments(text, stage="base", kv_rank=32, q_rank=-1, smoke=False)
    if args.stage not in STAGES:
        raise ConfigError(unknown("stage", args.stage, STAGES))
    config = base.get_config()
    config.name = f"x-ecomla-{args.stage}"
    config.model.width, config.model.depth, config.model.mlp.width = 128, 4, 352
    config.model.max_length = config.data.length = 128
    config.model.attention = attention.get("gqa")
    config.model.attention.update(heads=HEADS, kv_heads=KV_HEADS, head_dim=HEAD_DIM)
    config.data.batch_size = 16
    config.optimizer.learning_rate, config.optimizer.warmup_steps = 3e-3, 40
    config.train.steps = 800
    if args.stage == "teacher":
        config.model.width, config.model.depth, config.model.mlp.width = 192, 8, 512
        config.optimizer.learning_rate = 2e-3
    if args.smoke:
        config = lm.smoke(config)
    if args.stage in ("distill", "dpo"):
        config.name += f"-{args.kv_rank}"
        config.model.attention = upcycled(config.model, args.kv_rank, args.q_rank)
    if args.stage == "distill":
        # The paper: sums over positions divided by rows, AdamW (0.9, 0.98), 8e-5 for models of 1B and below, warm-up
        # over 1%, of billions of tokens; a small model with few steps wants a larger rate.
        config.objective.name, config.objective.reduction = "distillation", "row"
        config.optimizer.learning_rate, config.optimizer.b2 = 1e-3, 0.98
        config.train.steps, config.optimizer.warmup_steps = (20, 1) if args.smoke else (400, 4)
    if args.stage == "dpo":
        # The paper: beta 0.01, 5e-7 with warm-up over 10%, rows of 1024 with prompts of 512, for models of billions.
        config.objective.name, config.objective.beta = "dpo", 0.1
        config.data.form = "preferences"
        config.optimizer.learning_rate, config.optimizer.weight_decay = 1e-4, 0.0
        config.train.steps, config.optimizer.warmup_steps = (20, 2) if args.smoke else (100, 10)
    return config


def upcycled(model: ml_collections.ConfigDict, kv_rank: int, q_rank: int = -1) -> ml_collections.ConfigDict:
    """The attention that `eval.py convert --to=x-ecomla --kv_rank=...` makes of `config.model`'s heads."""
    source, made = model.attention, attention.get("mla")
    heads, kv_heads, width = source.heads, source.kv_heads, source.head_dim
    if q_rank < 0:
        left = model.width * (heads + 2 * kv_heads) * width
        left -= model.width * (kv_rank + width // 2) + kv_rank * heads * (width // 2 + width)
        q_rank = max(8, min(left // (model.width + heads * width), model.width) // 8 * 8)
    made.update(heads=heads, q_lora_rank=q_rank, kv_lora_rank=kv_rank, v_head_dim=width, latent_norm="none")
    made.update(qk_nope_head_dim=width // 2, qk_rope_head_dim=width // 2)
    made.rope.layout = "interleaved"
    return made
