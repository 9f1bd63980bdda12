"""What a config means before it runs: every field, the size of the model, the cost of a token, the mesh."""

from typing import Any

import ml_collections

import sharding
from configs import fields
from data import load_tokenizer
from training import setup


def text(config: ml_collections.ConfigDict) -> str:
    """Several lines for a person. Nothing is allocated and no data is read; a BPE not yet trained counts as full."""
    layout = sharding.build(config.sharding)
    vocabulary = vocabulary_of(config.data.tokenizer)
    structure = setup.network(config, vocabulary)
    training = setup.build(config, structure, layout, vocabulary)
    account = setup.account(config, vocabulary.vocab_size, layout)
    values = [f"{name} = {value!r}" for name, value in fields.flat(config).items()]
    tokens = config.data.batch_size * config.data.length
    lines = [
        *values,
        "",
        *account.lines(),
        f"tokens                {tokens:,} a step, {tokens * config.train.steps:,} in {config.train.steps:,} steps",
        f"memory, per device    {setup.bytes_per_device(training.abstract) / 2**20:,.1f} MiB of state at rest",
        "",
        layout.describe(),
    ]
    return "\n".join(lines)


def vocabulary_of(spec: str) -> Any:
    """Something with the `vocab_size` of the tokenizer `spec`, without training one."""
    if spec.startswith("bpe:"):
        return ml_collections.FrozenConfigDict({"vocab_size": int(spec.removeprefix("bpe:"))})
    return load_tokenizer(spec)
