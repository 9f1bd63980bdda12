"""MLA without norms of its latents, as MLA with them that computes the same: what other programs can read."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from models.conversion import networks
from models.decoder import DecoderLM
from models.plan import layer_specs

#: What a latent is made smaller by: a power of two, so that weights stay what they were, bit for bit, but for it.
_SMALLER = 2.0**-30


def with_latent_norms(model: DecoderLM, config: Mapping[str, Any]) -> tuple[DecoderLM, dict[str, Any]]:
    """The network and its `config.model` with `latent_norm` "rms" in every layer of MLA that had "none".

    x / sqrt(mean(x^2) + epsilon) is x / sqrt(epsilon) where x is small enough. So latents are made smaller by a power
    of two and the gain makes up for both: the function is the same to mean(x^2) 2^-60 / (2 epsilon), which is below
    float32 for latents up to a thousand, and to the rounding of the gain (up to 2^-9 where parameters are bfloat16).
    Networks without such layers come back as they are.
    """
    plain = networks.plain(config)
    specs = layer_specs(plain)
    new, weights = {}, {}
    for layer, place in networks.places(model, specs, _unnormed).items():
        options = specs[layer]["attention"]
        own = networks.attention_of(model, place)
        gain = np.sqrt(options["norm_epsilon"]) / _SMALLER
        new[layer], weights[layer] = options | {"latent_norm": "rms"}, {}
        for latent, norm in (("latent", "latent_norm"), ("query_down", "query_norm")):
            if f"{latent}.weight" not in own:
                continue
            for part in ("weight", "bias"):
                if f"{latent}.{part}" in own:
                    weights[layer][f"{latent}.{part}"] = own[f"{latent}.{part}"].astype(np.float64) * _SMALLER
            weights[layer][f"{norm}.gain"] = np.full(own[f"{latent}.weight"].shape[1], gain)
    if not new:
        return model, plain
    made = networks.with_layers(plain, {layer: new.get(layer, spec["attention"]) for layer, spec in enumerate(specs)})
    return networks.like(model, made, weights), made


def _unnormed(options: Mapping[str, Any]) -> bool:
    return options["layer"] == "mla" and options["latent_norm"] == "none"
