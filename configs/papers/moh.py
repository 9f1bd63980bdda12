"""MoH (arXiv 2410.11842): a byte-level language model whose tokens take a few of its heads.

    python train.py --config=configs/papers/moh.py
    python train.py --config=configs/papers/moh.py:attention=mha
    python eval.py --claim=moh

    # A trained model, converted (no new parameters) and trained on with the load-balance loss.
    python eval.py convert runs/moh-mha --to=moh --active=0.75 --output=runs/moh-converted

Arguments:
    attention       moh, or mha to compare with
    heads           of 16 channels each
    shared          heads that serve every token
    routed          how many of the others a token takes
    smoke           a model of two blocks for 20 steps
"""

import ml_collections

from configs import attention, base, lm
from configs.command_line import arguments


def get_config(text: str = "") -> ml_collections.ConfigDict:
    """The config that `attention=...,heads=...,shared=...,routed=...,smoke` describes."""
    args = arguments(text, attention="moh", heads=8, shared=2, routed=4, smoke=False)
    config = base.get_config()
    config.name = f"moh-{args.attention}"
    config.model.width = 128
    config.model.depth = 4
    config.model.max_length = 128
    config.model.mlp.width = 352
    options = config.model.attention = attention.get(args.attention)
    options.heads, options.kv_heads, options.head_dim = args.heads, args.heads, 16
    if args.attention == "moh":
        options.shared_heads, options.routed_active = args.shared, args.routed
        options.balance = 0.01 / config.model.depth  # The paper's 0.01, as a mean over layers.
    config.data.tokenizer = "byte"
    config.data.length = 128
    config.data.batch_size = 16
    config.optimizer.learning_rate = 3e-3
    config.optimizer.warmup_steps = 40
    config.train.steps = 800
    return lm.smoke(config) if args.smoke else config
