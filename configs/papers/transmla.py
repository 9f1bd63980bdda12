"""TransMLA (arXiv 2502.07864): a byte-level language model of grouped-query attention, to be made into MLA.

    python train.py --config=configs/papers/transmla.py
    python eval.py --claim=transmla

    # Converted, and recovered by training on (the paper: learning rate 2e-5, cosine, 3% warm-up, 6 billion tokens).
    python eval.py convert runs/transmla-gqa --to=transmla --qk_mqa_dim=16 --kv_lora_rank=32 --output=runs/mla
    python train.py --config=configs/papers/transmla.py:kv_lora_rank=32 --config.train.init_from=runs/mla

Arguments:
    kv_heads        of the 8 query heads'
    kv_lora_rank    not 0: the model that conversion to such a latent gives, and a short run to go on with
    qk_mqa_dim      its rotated channels
    smoke           a model of two blocks for 20 steps
"""

import ml_collections

from configs import attention, base, lm
from configs.command_line import arguments


def get_config(text: str = "") -> ml_collections.ConfigDict:
    """The config that `kv_heads=...,kv_lora_rank=...,qk_mqa_dim=...,smoke` describes."""
    args = arguments(text, kv_heads=4, kv_lora_rank=0, qk_mqa_dim=16, smoke=False)
    config = base.get_config()
    config.name = "transmla-gqa"
    config.model.width = 128
    config.model.depth = 4
    config.model.max_length = 128
    config.model.mlp.width = 352
    options = config.model.attention = attention.get("gqa")
    options.heads, options.kv_heads, options.head_dim = 8, args.kv_heads, 32
    config.data.tokenizer = "byte"
    config.data.length = 128
    config.data.batch_size = 16
    config.optimizer.learning_rate = 3e-3
    config.optimizer.warmup_steps = 40
    config.train.steps = 800
    if args.kv_lora_rank:
        config.name = "transmla-recovered"
        options = config.model.attention = attention.get("mla")
        options.heads, options.kv_lora_rank, options.qk_rope_head_dim = 8, args.kv_lora_rank, args.qk_mqa_dim
        options.latent_norm, options.rope.layout = "none", "interleaved"
        config.optimizer.learning_rate = 1e-3
        config.optimizer.warmup_steps = 6
        config.train.steps = 200
    return lm.smoke(config) if args.smoke else config
