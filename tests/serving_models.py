"""Models, prompts and layouts that the tests of serving share."""

import functools
from typing import Any

import jax
from flax import nnx

import sharding
from configs import base
from models.decoder import DecoderLM
from tests.models_oracle import built, options, small, some_ids

# Shorter and longer than a page, a window and a bucket of prompts; one token alone.
PROMPTS = [some_ids(1, length, seed=length)[0].tolist() for length in (4, 17, 1, 9)]
NEW = 9
CHANGES: dict[str, dict[str, Any]] = {"mha": dict(kv_heads=4), "tpla_pd": dict(prefill="whole")}


@functools.cache
def network(variant: str, depth: int = 1) -> DecoderLM:
    """A small model; "tpla_pd" is TPLA that reads prompts as MLA does, with constants that make it differ."""
    preset = variant.removesuffix("_pd")
    model = built(small(preset, depth=depth, attention=options(preset, **CHANGES.get(variant, {}))))
    if variant == "tpla_pd":
        attention = model.stacks[0].blocks[0].attention
        for constant, values in ((attention.norm_factor, (1.5, 3.0)), (attention.logit_factor, (1.2, 0.7))):
            constant[...] = 0 * constant[...] + jax.numpy.array(values)
    return model


@functools.cache
def as_mla(variant: str, depth: int = 1) -> DecoderLM:
    """The MLA with the weights of a TPLA."""
    _, weights, _ = nnx.split(network(variant, depth), nnx.Param, ...)
    definition, own, rest = nnx.split(built(small("mla", depth=depth)), nnx.Param, ...)
    return nnx.merge(definition, jax.tree.unflatten(jax.tree.structure(own), jax.tree.leaves(weights)), rest)


def layout(preset: str, devices: list[jax.Device], **fields: int) -> sharding.Layout:
    """A preset on some devices."""
    config = base.sharding()
    config.update(dict(preset=preset, **fields))
    return sharding.build(config, devices)
