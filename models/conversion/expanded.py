"""GQA -> the same function with an up-projection per query head (TransMLA, arXiv 2502.07864, first version)."""

import argparse
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from configs import attention as presets
from configs.errors import unknown
from models.conversion import networks, report
from models.conversion.contract import Conversion
from models.conversion.latent import ConversionError
from models.conversion.merged import affine
from models.conversion.report import Report
from models.decoder import DecoderLM
from models.plan import layer_specs

FACTORS = ("selector", "svd")


def convert_to_mha_latent(
    model: DecoderLM,
    config: Mapping[str, Any],
    *,
    factor: str = "selector",
    report_ids: Int[np.ndarray, "M T"] | None = None,
    progress: Callable[[str, int, int], None] | None = None,
) -> Conversion:
    """Layers `mha` made into `mha_latent`: the same function and the same cache, but the keys and values of the query
    heads of a group are free to become different in training.

    The keys repeated for every query head are x W with W [D, h d] of rank g d; W = A B, where A [D, g d] makes what is
    cached and B is the up-projection. `factor` "selector": A is W_K, and B copies; "svd": A = U S^(1/2),
    B = S^(1/2) V^T of the singular value decomposition of W, the bias a row of it. The same for the values.

    Raises `ConversionError`: no layer to convert, or one with sinks, which the new layer has not.
    """
    if factor not in FACTORS:
        raise ConversionError(unknown("factor", factor, FACTORS))
    specs = layer_specs(networks.plain(config))
    sources = {i: spec["attention"] for i, spec in enumerate(specs) if spec["attention"]["layer"] == "mha"}
    if not sources:
        raise ConversionError("the network has no layer of softmax attention on heads (mha, gqa, mqa) to convert")
    for layer, options in sources.items():
        for name in ("sink_tokens", "learned_sinks"):
            if options[name]:
                raise ConversionError(f"layer {layer} has {name}: mha_latent has none")
    places = networks.places(model)
    weights, new = {}, {}
    for done, (layer, options) in enumerate(sources.items(), 1):
        weights[layer] = _weights(networks.attention_of(model, places[layer]), options, factor)
        kept = presets.get("mha_latent").to_dict()
        ranks = {f"{part}_rank": len(weights[layer][f"{part}_up.weight"]) for part in ("key", "value")}
        new[layer] = kept | {name: options[name] for name in kept if name in options} | ranks | {"layer": "mha_latent"}
        if progress is not None:
            progress("factors", done, len(sources))
    new_config = networks.with_layers(networks.plain(config), new)
    result = networks.like(model, new_config, weights)
    stages = []
    if report_ids is not None:
        original = report.log_probabilities(model, report_ids)
        found = {"original": original, factor: report.log_probabilities(result, report_ids)}
        stages = [report.measured(name, logs, original, report_ids) for name, logs in found.items()]
    return Conversion(result, new_config, Report(dict(factor=factor), tuple(stages)))


def _weights(arrays: Mapping[str, np.ndarray], options: dict[str, Any], factor: str) -> networks.Weights:
    heads, kv_heads = options["heads"], options["kv_heads"]
    downs, made = [], dict(arrays)
    for part in ("key", "value"):
        down, up = _factors(affine(part, arrays), heads, kv_heads, factor)
        downs.append(down)
        made[f"{part}_up.weight"] = up
    down = np.concatenate(downs, axis=1)
    made |= {"latent.weight": down[:-1]} | ({"latent.bias": down[-1]} if options["qkv_bias"] else {})
    return {name: np.asarray(array).astype(arrays["query.weight"].dtype) for name, array in made.items()}


def _factors(
    matrix: Float[np.ndarray, "E gd"], heads: int, kv_heads: int, factor: str
) -> tuple[Float[np.ndarray, "E gd"], Float[np.ndarray, "gd hd"]]:
    """A and B. The decomposition is that of the narrow matrix: repeating its blocks only scales what is behind it."""
    width = matrix.shape[1]
    copies = np.eye(width).reshape(width, kv_heads, -1)[:, np.arange(heads) * kv_heads // heads].reshape(width, -1)
    if factor == "selector":
        return matrix, copies
    left, values, right = np.linalg.svd(matrix, full_matrices=False)
    missing = width - len(values)  # More channels than inputs: the rest of the latent stays empty.
    left, right = np.pad(left, ((0, 0), (0, missing))), np.pad(right, ((0, missing), (0, 0)))
    group = heads / kv_heads
    root = np.sqrt(np.pad(values, (0, missing)) * group**0.5)
    return left * root, root[:, None] * (right @ copies) / group**0.5


def flags(parser: argparse.ArgumentParser) -> None:
    """The flags of `eval.py convert --to=mha_latent`."""
    parser.add_argument("--factor", default="selector", choices=FACTORS, help="how the projections are factored")
