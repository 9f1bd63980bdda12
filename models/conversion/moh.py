"""Softmax attention -> mixture of its heads (MoH, arXiv 2410.11842, section 3.4), to be trained on."""

import argparse
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from flax import nnx
from jaxtyping import Int

from configs import attention as presets
from configs.errors import unknown
from models import build
from models.conversion import networks, report
from models.conversion.contract import Conversion
from models.conversion.latent import ConversionError
from models.conversion.report import Report
from models.decoder import DecoderLM
from models.plan import layer_specs

ROUTERS = ("query_norm", "learned")


def convert_to_moh(
    model: DecoderLM,
    config: Mapping[str, Any],
    *,
    active: float = 0.75,
    shared: float = 0.5,
    router: str = "query_norm",
    balance: float = 0.01,
    report_ids: Int[np.ndarray, "M T"] | None = None,
    seed: int = 0,
    progress: Callable[[str, int, int], None] | None = None,
) -> Conversion:
    """Layers `mha` made into `moh`: of each layer's heads the share `active` serves a token, the first of them, the
    share `shared` of all heads, every token. Numbers of heads are rounded down, as in the released code.

    `router` "query_norm" (the paper's) adds no parameters and weighs heads by 0 and 1; "learned" draws new routers by
    `seed`, to compare with. Nothing is trained here: the loss rises, and further training with the load-balance loss
    (`balance`, as a mean over these layers) brings it down again.

    Raises `ConversionError`: no layer to convert, or shares that leave no head to route.
    """
    if router not in ROUTERS:
        raise ConversionError(unknown("router", router, ROUTERS))
    specs = layer_specs(networks.plain(config))
    sources = {i: spec["attention"] for i, spec in enumerate(specs) if spec["attention"]["layer"] == "mha"}
    if not sources:
        raise ConversionError("the network has no layer of softmax attention on heads (mha, gqa, mqa) to convert")
    new = {}
    for layer, options in sources.items():
        always = int(options["heads"] * shared)
        routed = int(options["heads"] * active) - always
        if not 0 <= always < always + routed <= options["heads"]:
            raise ConversionError(
                f"layer {layer} has {options['heads']} heads: active={active:g} of them and shared={shared:g} leave "
                f"{routed} to be routed to, of {options['heads'] - always}"
            )
        new[layer] = presets.get("moh").to_dict() | options | dict(
            layer="moh", shared_heads=always, routed_active=routed, router=router, balance=balance / len(sources)
        )  # fmt: skip
    made = networks.with_layers(networks.plain(config), new)
    weights = {} if router == "query_norm" else _drawn(model.vocab_size, made, new, seed)
    result = networks.like(model, made, weights)
    stages = []
    if report_ids is not None:
        original = report.log_probabilities(model, report_ids)
        found = {"original": original, "moh": report.log_probabilities(result, report_ids)}
        stages = [report.measured(name, logs, original, report_ids) for name, logs in found.items()]
    if progress is not None:
        progress("layers", len(new), len(new))
    return Conversion(result, made, Report(dict(active=active, shared=shared, router=router), tuple(stages)))


def _drawn(vocab_size: int, config: dict[str, Any], layers: Mapping[int, Any], seed: int) -> dict[int, Any]:
    """The routers of these layers in a new network."""
    fresh = build(config, vocab_size=vocab_size, rngs=nnx.Rngs(seed))
    places = networks.places(fresh)
    return {
        layer: {name: a for name, a in networks.attention_of(fresh, places[layer]).items() if "_router." in name}
        for layer in layers
    }


def flags(parser: argparse.ArgumentParser) -> None:
    """The flags of `eval.py convert --to=moh`."""
    parser.add_argument("--active", type=float, default=0.75, help="share of the heads that serve a token")
    parser.add_argument("--shared", type=float, default=0.5, help="share of the heads, the first, for all tokens")
    parser.add_argument("--router", default="query_norm", choices=ROUTERS, help="learned: drawn anew")
    parser.add_argument("--balance", type=float, default=0.01, help="of the load-balance loss, in further training")
    parser.add_argument("--seed", type=int, default=0, help="of routers drawn anew")
