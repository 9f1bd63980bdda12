"""A decoder language model on text, in three sizes, with any attention.

    python train.py --config=configs/lm.py:attention=mla,size=small
    python train.py --config=configs/lm.py:attention=lightning,smoke

Arguments (`--print` shows what they resolve to):
    attention   a preset of configs/attention/: gqa, mha, mla, lightning, ...
    size        tiny | small | base
    tokenizer   byte | bpe:<vocabulary size> | path to a tokenizer.json
    smoke       20 steps of a model of two blocks: does everything work?

EXPECTED
"""

import dataclasses

import ml_collections

from configs import attention, base
from configs.command_line import arguments
from configs.errors import ConfigError, unknown
from configs.sizes import resize


@dataclasses.dataclass(frozen=True)
class Size:
    """What a size decides; the rest is `configs/base.py`."""

    width: int
    depth: int
    heads: int
    head_dim: int
    mlp_width: int
    length: int  # Tokens per row, and the longest sequence of the model.
    batch_size: int
    steps: int
    learning_rate: float


SIZES = {
    "tiny": Size(128, 4, 4, 32, 352, length=256, batch_size=16, steps=500, learning_rate=3e-3),
    "small": Size(256, 8, 8, 32, 704, length=512, batch_size=16, steps=2000, learning_rate=2e-3),
    "base": Size(768, 12, 12, 64, 2048, length=1024, batch_size=64, steps=20000, learning_rate=6e-4),
}


def get_config(text: str = "") -> ml_collections.ConfigDict:
    """The config that `attention=...,size=...,smoke` describes."""
    args = arguments(text, attention="gqa", size="small", tokenizer="byte", smoke=False)
    if args.size not in SIZES:
        raise ConfigError(unknown("size", args.size, SIZES))
    size = SIZES[args.size]
    config = base.get_config()
    config.name = f"lm-{args.attention}-{'smoke' if args.smoke else args.size}"
    config.model.width = size.width
    config.model.depth = size.depth
    config.model.max_length = size.length
    config.model.mlp.width = size.mlp_width
    config.model.attention = resize(attention.get(args.attention), heads=size.heads, head_dim=size.head_dim)
    config.data.tokenizer = args.tokenizer
    config.data.length = size.length
    config.data.batch_size = size.batch_size
    config.optimizer.learning_rate = size.learning_rate
    config.optimizer.warmup_steps = size.steps // 20
    config.train.steps = size.steps
    return smoke(config) if args.smoke else config


def smoke(config: ml_collections.ConfigDict) -> ml_collections.ConfigDict:
    """The same run as a matter of seconds: two blocks, short rows, few files, 20 steps."""
    config.model.width = 64
    config.model.depth = 2
    config.model.max_length = 128
    config.model.mlp.width = 176
    config.model.attention = resize(config.model.attention, heads=4, head_dim=16)
    config.data.max_files = 24
    config.data.length = 64
    config.data.batch_size = 8
    config.optimizer.warmup_steps = 2
    config.train.steps = 20
    config.checkpoint.every = 10
    config.log.every = 5
    config.eval.limit = 8.0
    config.eval.batch_size = 8
    config.eval.sample_tokens = 32
    return config
