"""Whole networks put together from layers, and what one does with them outside training."""

from collections.abc import Mapping
from typing import Any

from flax import nnx

from layers.setting import Setting
from models.accounting import Account, account
from models.decoder import DecoderLM, ModelOutput
from models.generation import generate
from models.plan import layer_specs
from models.pretrained import Pretrained, load_pretrained, save_pretrained


def build(config: Mapping[str, Any], *, vocab_size: int, rngs: nnx.Rngs) -> DecoderLM:
    """The model that `config.model` describes, for a tokenizer of `vocab_size` tokens, initialised from `rngs`.

    Raises:
        ValueError: options that contradict each other, named.
    """
    setting = Setting(
        width=config["width"],
        depth=config["depth"],
        max_length=config["max_length"],
        param_dtype=config["param_dtype"],
        compute_dtype=config["compute_dtype"],
        init_std=config["init_std"],
        implementation=config["attention_implementation"] or None,
    )
    multiple = config["vocab_multiple"]
    vocab_size = config["vocab_size"] or vocab_size
    specs = layer_specs(config)
    return DecoderLM(
        setting,
        specs,
        vocab_size=vocab_size,
        rows=-(-vocab_size // multiple) * multiple,
        norm=specs[-1]["norm"],  # After the last layer comes a norm of its kind.
        tie_embeddings=config["tie_embeddings"],
        embedding_scale=config["embedding_scale"],
        logit_cap=config["logit_cap"],
        scan_layers=config["scan_layers"],
        remat=config["remat"],
        rngs=rngs,
    )


def abstract(config: Mapping[str, Any], vocab_size: int) -> tuple[nnx.GraphDef, nnx.State]:
    """The model's definition and the shapes of its state, without allocating anything."""
    model = nnx.eval_shape(lambda: build(config, vocab_size=vocab_size, rngs=nnx.Rngs(0)))
    return nnx.split(model)


__all__ = [
    "Account",
    "DecoderLM",
    "ModelOutput",
    "Pretrained",
    "abstract",
    "account",
    "build",
    "generate",
    "load_pretrained",
    "save_pretrained",
]
