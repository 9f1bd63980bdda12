"""MLA -> TPLA (arXiv 2508.15881, sections 3, 4): fold the norm's gain, rotate the latent, set each slice's factors."""

import argparse
import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from configs import attention as presets
from configs.errors import unknown
from layers.attention.tpla import MODES as SLICED_MODES
from models.conversion import calibration, latent, networks, report
from models.conversion.contract import Conversion
from models.conversion.latent import ConversionError, LatentWeights
from models.conversion.report import Report
from models.decoder import DecoderLM
from models.plan import layer_specs

#: What can come out: MLA itself (rotated; every device with all of the latent), GLA, the modes of the layer `tpla`, and
#: MLA with its cache split by tokens.
MODES = ("mla_tp", "gla", *SLICED_MODES, "sequence")
TRANSFORMS = ("identity", "hadamard", "pca")
LOGIT_FACTORS = ("lsq", "one", "energy", "inv_energy")
NORM_FACTORS = ("auto", "inv_energy", "balanced")
_CAP = 8.0  # Of 1 / energy as a factor of logits.


def convert_to_tpla(
    model: DecoderLM,
    config: Mapping[str, Any],
    *,
    slices: int = 2,
    mode: str = "tpla",
    transform: str = "pca",
    logit_factor: str = "lsq",
    norm_factor: str = "auto",
    norm: str = "",
    out_mode: str = "allreduce",
    pca_center: bool = False,
    calibration_ids: Int[np.ndarray, "N T"] | None = None,
    logit_rows: int = 8,
    report_ids: Int[np.ndarray, "M T"] | None = None,
    seed: int = 0,
    progress: Callable[[str, int, int], None] | None = None,
) -> Conversion:
    """TPLA of a network whose attention is MLA, without training.

    `config` is the network's `config.model`. In every layer of MLA the norm's gain is folded into W_UK and W_UV, the
    latent is rotated by `transform` ("identity", "hadamard": random signs from `seed`; "pca": principal directions of
    the latents of `calibration_ids`, largest first, about their mean if `pca_center`), all in float64 and cast back
    once. Up to here the function is the same. Then the layer becomes that of `mode`:

    - "mla_tp": MLA, which tensor parallelism holds whole on every device; "sequence": its cache split by tokens.
    - "tpla", "tpla_norm_only", "tpla_softmax_only", "tpla_pd", "score_sum": `layers.attention.tpla.MODES`; `norm`
      ("slice", "whole") overrides the mode's.
    - "gla": head group j reads slice j alone.

    Slice j of energy e_j (its share of the mean square) gets the norm factor alpha_j = 1 / e_j ("inv_energy") or g
    ("balanced"); "auto" is the first for pca and the second otherwise. The paper's equation 25 names e_j, its
    condition 1 needs the reciprocal, which is ours [inferred]. Its logit factor mu_j is not settled by the paper
    either: "one"; "energy" e_j; "inv_energy" 1 / e_j, at most 8; "lsq" (ours) fits the whole logits by the slice's in
    least squares on the first `logit_rows` rows of `calibration_ids`, with latents as the mode normalises them.
    `report_ids` measures every stage on other text; without it only the conversion is done.

    Raises `ConversionError`: layers that are not MLA, sizes that do not divide, a Hadamard rotation of a width that is
    no power of two, no calibration text where it is needed, or fewer tokens than the latent has channels.
    """
    for name, value, known in (
        ("mode", mode, MODES),
        ("transform", transform, TRANSFORMS),
        ("logit_factor", logit_factor, LOGIT_FACTORS),
        ("norm_factor", norm_factor, NORM_FACTORS),
    ):
        if value not in known:
            raise ConversionError(unknown(name, value, known))
    options_of_model: dict[str, Any] = networks.plain(config)
    specs = layer_specs(options_of_model)
    places = networks.places(model, specs, _convertible)
    _check(specs, places, slices, mode, transform)
    sliced = mode in SLICED_MODES
    fitted = sliced and logit_factor == "lsq" and slices > 1
    measured = transform == "pca" or fitted or logit_factor in ("energy", "inv_energy") or norm_factor == "inv_energy"
    if (measured and calibration_ids is None) or (fitted and not len(calibration_ids[:logit_rows])):
        raise ConversionError(
            f"transform={transform!r} with logit_factor={logit_factor!r} needs calibration_ids: [rows, length] of text"
        )

    source = networks.arrays(model)
    folded = {
        layer: latent.weights_of(source, *place, specs[layer]["attention"]["heads"]).folded()
        for layer, place in places.items()
    }
    plain_model = networks.like(model, None, latent.named(folded))
    told = None if progress is None else (lambda done, total: progress("latents", done, total))
    found = calibration.moments(plain_model, calibration_ids, list(places), told) if measured else {}
    rotated, energies, spectra = {}, {}, {}
    for layer, weights in folded.items():
        width = weights.down.shape[1]
        if found and found[layer].count < width:
            raise ConversionError(
                f"{found[layer].count} calibration tokens cannot tell {width} channels of a latent apart: give at "
                f"least {width}, better 100 times as many"
            )
        rotation = _rotation(transform, width, found.get(layer), pca_center, np.random.default_rng([seed, layer]))
        rotated[layer] = weights.rotated(rotation)
        if found:
            spectra[layer] = _shares(rotation, found[layer])
            energies[layer] = spectra[layer].reshape(slices, -1).sum(1)
    options = dict(SLICED_MODES.get(mode, {}), **({"norm": norm} if norm and sliced else {}))
    balanced = norm_factor == "balanced" or (norm_factor == "auto" and transform != "pca")
    alphas = {layer: _norm_factors(energies.get(layer), slices, balanced) for layer in places}
    whole = options.get("norm") == "whole" or options.get("prefill") == "whole"  # What most of the cache will hold.
    rows = None if calibration_ids is None else calibration_ids[:logit_rows]
    turned = networks.like(model, None, latent.named(rotated))
    if fitted:
        mus = _fitted(turned, rows, rotated, specs, None if whole else alphas, slices)
    else:
        mus = {layer: _logit_factors(logit_factor, energies.get(layer), slices) for layer in places}

    def made(mode: str) -> tuple[DecoderLM, dict[str, Any]]:
        changes = dict(SLICED_MODES.get(mode, {}), out_mode=out_mode)
        changes |= {"norm": norm} if norm and mode in SLICED_MODES else {}
        return _converted(model, options_of_model, rotated, mode, slices, changes, alphas, mus)

    result, result_config = made(mode)
    asked = dict(slices=slices, mode=mode, transform=transform, logit_factor=logit_factor, norm_factor=norm_factor,
                 norm=norm, out_mode=out_mode, pca_center=pca_center, seed=seed)  # fmt: skip
    stages: list[report.Stage] = []
    if report_ids is not None:
        split = report_ids.shape[1] // 2 if mode == "tpla_pd" else 0
        original = report.log_probabilities(model, report_ids)
        kinds = [("original", model), ("gain folded", plain_model), ("rotated", turned)]
        if mode in ("tpla", "tpla_pd") and slices > 1:
            kinds += [(name, made(name)[0]) for name in ("tpla_norm_only", "tpla_softmax_only")]
        for name, one in [*kinds, (mode, result)]:
            last = one is result
            logs = report.log_probabilities(one, report_ids, split=split if last else 0)
            stages.append(report.measured(name, logs, original, report_ids, max(split - 1, 0)))
            if progress is not None:
                progress("stages", len(stages), len(kinds) + 1)
    listed = lambda by_layer: tuple(tuple(map(float, by_layer.get(layer, ()))) for layer in places)  # noqa: E731
    return Conversion(
        result, result_config,
        Report(asked, tuple(stages), listed(spectra), listed(energies), listed(alphas), listed(mus)),
    )  # fmt: skip


def _check(specs: list[dict], places: dict[int, Any], slices: int, mode: str, transform: str) -> None:
    if not places:
        raise ConversionError("the network has no layer of MLA with one latent: convert it to MLA first")
    for layer in places:
        options = specs[layer]["attention"]
        rank, heads = options["kv_lora_rank"], options["heads"]
        if slices < 1 or rank % slices:
            raise ConversionError(f"{slices} slices do not divide the latent of {rank} channels (layer {layer})")
        if mode == "gla" and heads % slices:
            raise ConversionError(f"{slices} groups do not divide the {heads} heads of layer {layer}")
        if transform == "hadamard":
            latent.hadamard(rank, np.random.default_rng(0))


def _rotation(
    transform: str, width: int, found: calibration.Moments | None, center: bool, rng: np.random.Generator
) -> Float[np.ndarray, "d d"]:
    if transform == "identity":
        return np.eye(width)
    return latent.hadamard(width, rng) if transform == "hadamard" else latent.principal(found.second(center))


def _shares(rotation: Float[np.ndarray, "d d"], found: calibration.Moments) -> Float[np.ndarray, " d"]:
    """Each rotated channel's share of the mean square."""
    squares = np.maximum(np.einsum("ce,cd,de->e", rotation, found.second(False), rotation), 0)
    return squares / squares.sum()


def _norm_factors(energies: np.ndarray | None, slices: int, balanced: bool) -> Float[np.ndarray, " g"]:
    # A slice without energy has nothing to normalise; its factor must only be finite.
    return np.full(slices, float(slices)) if balanced or energies is None else 1 / np.maximum(energies, 1e-6)


def _logit_factors(kind: str, energies: np.ndarray | None, slices: int) -> Float[np.ndarray, " g"]:
    if kind in ("one", "lsq") or energies is None:
        return np.ones(slices)
    return energies if kind == "energy" else np.minimum(1 / np.maximum(energies, 1e-6), _CAP)


def _fitted(
    model: DecoderLM,
    rows: Int[np.ndarray, "N T"],
    weights: dict[int, LatentWeights],
    specs: list[dict],
    alphas: dict[int, np.ndarray] | None,
    slices: int,
) -> dict[int, Float[np.ndarray, " g"]]:
    """mu by least squares; `alphas` None: with latents as the whole norm leaves them."""
    sums = {layer: np.zeros((2, slices)) for layer in weights}
    for taps in calibration.tapped(model, rows, ("latent", "query_raw"), None):
        for layer, own in weights.items():
            options = specs[layer]["attention"]
            queries = taps[f"tap/query_raw/{layer}"][..., : options["qk_nope_head_dim"]].astype(np.float64)
            for content, cached in zip(queries, taps[f"tap/latent/{layer}"].astype(np.float64), strict=True):
                cached = cached.reshape(len(cached), -1)
                local = cached
                if alphas is not None and own.gain is not None:
                    local = calibration.normalised_slices(cached, alphas[layer], options["norm_epsilon"])
                sums[layer] += calibration.least_squares_factors(content, cached, local, own, slices)
    return {layer: np.where(own > 0, both / np.where(own > 0, own, 1), 1.0) for layer, (both, own) in sums.items()}


def _converted(
    model: DecoderLM,
    config: dict[str, Any],
    weights: dict[int, LatentWeights],
    mode: str,
    slices: int,
    changes: dict[str, Any],
    alphas: dict[int, np.ndarray],
    mus: dict[int, np.ndarray],
) -> tuple[DecoderLM, dict[str, Any]]:
    new_config = _new_config(config, mode, slices, changes)
    if mode == "gla":
        weights = {layer: _grouped(own, alphas[layer], mus[layer]) for layer, own in weights.items()}
    named = latent.named(weights)
    if mode in SLICED_MODES:
        for layer, arrays in named.items():
            arrays |= dict(norm_factor=alphas[layer], logit_factor=mus[layer])
    return networks.like(model, None if new_config == config else new_config, named), new_config


def _grouped(own: LatentWeights, alpha: np.ndarray, mu: np.ndarray) -> LatentWeights:
    """The weights of GLA: head group j keeps the rows of slice j. A latent's own norm has alpha = g; the rest of the
    factor goes into the weights behind it, whose first axis is then the channels of one slice."""
    groups = len(alpha)
    rest = np.ones(groups) if own.gain is None else np.sqrt(groups / alpha)

    def kept(up: np.ndarray, factor: np.ndarray) -> np.ndarray:
        cut = up.reshape(groups, -1, groups, up.shape[1] // groups, up.shape[2])
        own_rows = np.stack([factor[j] * cut[j, :, j] for j in range(groups)], axis=1)
        return own_rows.reshape(own_rows.shape[0], up.shape[1], up.shape[2])

    return dataclasses.replace(own, key_up=kept(own.key_up, rest * mu), value_up=kept(own.value_up, rest))


def _new_config(config: dict[str, Any], mode: str, slices: int, changes: dict[str, Any]) -> dict[str, Any]:
    def new(options: dict[str, Any]) -> dict[str, Any]:
        if options["layer"] != "mla" or mode == "mla_tp":
            return options
        if mode == "gla":
            return options | dict(latents=slices, kv_lora_rank=options["kv_lora_rank"] // slices)
        sequence = mode == "sequence"
        name, own = ("mla_sequence", dict(parts=slices)) if sequence else ("tpla", dict(changes, slices=slices))
        wanted = presets.get(name).to_dict()
        return wanted | {field: value for field, value in options.items() if field in wanted} | own | {"layer": name}

    return networks.with_attention(config, new)


def _convertible(options: dict[str, Any]) -> bool:
    return options["layer"] == "mla" and options["latents"] == 1


def flags(parser: argparse.ArgumentParser) -> None:
    """The flags of `eval.py convert --to=tpla`."""
    parser.add_argument("--mode", default="tpla_pd", choices=MODES)
    parser.add_argument("--slices", type=int, default=2, help="parts of the latent")
    parser.add_argument("--transform", default="pca", choices=TRANSFORMS)
    parser.add_argument("--logit_factor", default="lsq", choices=LOGIT_FACTORS)
    parser.add_argument("--norm_factor", default="auto", choices=NORM_FACTORS)
    parser.add_argument("--norm", default="", help="slice or whole, where it should not be the mode's")
    parser.add_argument("--out_mode", default="allreduce", help="allreduce or scatter_heads")
    parser.add_argument("--pca_center", action="store_true", help="principal directions about the mean")
    parser.add_argument("--seed", type=int, default=0, help="of the Hadamard rotation's signs")
