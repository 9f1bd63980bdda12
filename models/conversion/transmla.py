"""GQA or MHA -> MLA (TransMLA, arXiv 2502.07864): merge heads, gather positions in few channels, compress the rest."""

import argparse
import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from configs import attention as presets
from configs.errors import unknown
from layers.rope import Rope
from models.conversion import networks, report, rotary_basis
from models.conversion.contract import Conversion
from models.conversion.latent import ConversionError
from models.conversion.merged import ListedRope, Merged, affine, merged_query
from models.conversion.report import Report
from models.conversion.rotary_basis import Fold
from models.conversion.streams import Stream, module
from models.decoder import DecoderLM
from models.plan import layer_specs

PCA = ("activations", "weights")
Progress = Callable[[str, int, int], None]


def convert_to_transmla(
    model: DecoderLM,
    config: Mapping[str, Any],
    *,
    kv_lora_rank: int = 512,
    qk_mqa_dim: int = 64,
    q_lora_rank: int = 0,
    freqfold: int | str = "auto",
    collapse: int | str = "auto",
    balance_kv_ratio: float = 1.0,
    norms: bool = False,
    pca: str = "activations",
    calibration_ids: Int[np.ndarray, "N T"] | None = None,
    report_ids: Int[np.ndarray, "M T"] | None = None,
    progress: Progress | None = None,
) -> Conversion:
    """MLA of a network whose attention is GQA, MQA or MHA (layer `mha`), without training; other layers stay.

    `config` is the network's `config.model`. All work is in float64, layer by layer, cast once:

    1. Merge (exact): the keys of all heads are one, of L = g d channels, the values too; every query head reads its own
       block through W_UK, W_UV.
    2. RoRoPE and FreqFold (`models.conversion.rotary_basis`): an orthogonal basis of the merged key in which positions
       matter in few channels; exact for freqfold 1. "auto" doubles it from `collapse` on while the perplexity of the
       calibration text with stage 3 gets better.
    3. Partial RoPE (approximate): only the first r = d / collapse channels are rotated; collapse "auto" is
       d / `qk_mqa_dim`. Their frequencies are those of a rotary width r with the same theta.
    4. BKV: keys without positions are divided by the quotient of their mean norm and that of the values times
       `balance_kv_ratio` (exact; 0 leaves them as they are).
    5. Joint PCA of these keys and the values, about zero, to `kv_lora_rank` channels (exact at 2 L - r), on the network
       of stage 3.
    6. Queries: of each head the d channels it has and the r rotated ones, times sqrt((d + r) / d) (more generally what
       makes of MLA's softmax scale the one there was). `q_lora_rank` (0: none) makes them of as many principal channels
       of all heads' queries; their bias stays as it is.
    7. `norms`: latents get the norms of a DeepSeek model with the one gain that keeps their mean size, mean(rms). (The
       published code sets mean(1 / rms), which reads inverted: a norm divides by rms already.)

    `pca` "weights" does stages 4, 5 and 6 by the weights alone, as if inputs were white (and stage 2 where there are no
    `calibration_ids`): worse, to compare with.
    `report_ids` measures every stage on other text; without it only the conversion is done. The memory needed beyond
    both networks is that of one layer's weights and of the hidden states of the calibration text.

    Raises `ConversionError`: what merged keys cannot do (qk_norm, sinks, positions whose frequencies depend on the
    width as yarn's do, or that turn a part of a head), sizes that do not fit, or no calibration text (or too little).
    """
    if pca not in PCA:
        raise ConversionError(unknown("pca", pca, PCA))
    specs = layer_specs(networks.plain(config))
    plans = {
        layer: plan_of(layer, spec["attention"], qk_mqa_dim, collapse, freqfold)
        for layer, spec in enumerate(specs)
        if spec["attention"]["layer"] == "mha"
    }
    if not plans:
        raise ConversionError("the network has no layer of softmax attention on heads (mha, gqa, mqa) to convert")
    for layer, plan in plans.items():
        plan.check(layer, kv_lora_rank, q_lora_rank)
    weighed = pca == "weights"
    if calibration_ids is None and (not weighed or freqfold == "auto" or norms):
        raise ConversionError(f"pca={pca!r} with freqfold={freqfold!r} needs calibration_ids: [rows, length] of text")
    most = max(kv_lora_rank, q_lora_rank)
    if not weighed and calibration_ids.size < most:
        raise ConversionError(
            f"{calibration_ids.size} calibration tokens cannot tell {most} channels of a latent apart: give at least "
            f"{most}, better 100 times as many"
        )
    tell = progress or (lambda what, done, total: None)
    work = Work(model, plans, calibration_ids, tell)
    work.mix(keep=freqfold == "auto")
    tried = work.search(calibration_ids) if freqfold == "auto" else {}
    weights, ratios, spectra = work.compress(kv_lora_rank, q_lora_rank, balance_kv_ratio, norms, weighed)
    new = {layer: plan.options(kv_lora_rank, q_lora_rank, norms) for layer, plan in plans.items()}
    new_config = networks.with_layers(networks.plain(config), new)
    result = networks.like(model, new_config, weights)
    stages = [] if report_ids is None else work.stages(report_ids, result)
    asked: dict[str, object] = dict(
        kv_lora_rank=kv_lora_rank, qk_mqa_dim=qk_mqa_dim, q_lora_rank=q_lora_rank, freqfold=freqfold,
        collapse=collapse, balance_kv_ratio=balance_kv_ratio, norms=norms, pca=pca,
    )  # fmt: skip
    first = next(iter(work.plans.values())).fold
    found: dict[str, object] = dict(
        freqfold=first.freqfold, collapse=first.collapse, perplexity_by_freqfold=tried, balance=ratios
    )
    return Conversion(result, new_config, Report(asked, tuple(stages), spectra=spectra, found=found))


@dataclasses.dataclass(frozen=True)
class Plan:
    """What becomes of one layer: its options, and how its pairs are folded."""

    source: dict[str, Any]
    fold: Fold

    @property
    def rotary(self) -> int:
        """r."""
        return self.fold.head_dim // self.fold.collapse

    @property
    def scale(self) -> float:
        """The softmax scale there is."""
        return self.source["scale"] or self.source["head_dim"] ** -0.5

    @property
    def latent(self) -> int:
        """Channels of all that is not rotated: 2 L - r where values are as wide as keys."""
        values = self.source["value_dim"] or self.source["head_dim"]
        return self.fold.heads * (self.fold.head_dim + values) - self.rotary

    def folded(self, freqfold: int) -> "Plan":
        """With another freqfold."""
        return Plan(self.source, dataclasses.replace(self.fold, freqfold=freqfold))

    def check(self, layer: int, kv_lora_rank: int, q_lora_rank: int) -> None:
        """Raises `ConversionError` for ranks that this layer cannot have."""
        queries = self.source["heads"] * self.source["head_dim"]
        if not 0 < kv_lora_rank <= self.latent:
            raise ConversionError(f"kv_lora_rank must be 1 to {self.latent} in layer {layer}, not {kv_lora_rank}")
        if not 0 <= q_lora_rank <= queries:
            raise ConversionError(f"q_lora_rank must be 0 to {queries} in layer {layer}, not {q_lora_rank}")

    def merged(self, arrays: Mapping[str, np.ndarray], basis: np.ndarray, rotary: int, scale: float = 1.0) -> Merged:
        """The layer merged, in a basis, its queries multiplied by `scale`."""
        return Merged.of(arrays, self.source["heads"], self.source["kv_heads"], basis, rotary, scale)

    def options(self, kv_lora_rank: int, q_lora_rank: int, norms: bool) -> dict[str, Any]:
        """Those of the layer `mla`."""
        source, bias = self.source, self.source["qkv_bias"]
        return presets.get("mla").to_dict() | dict(
            heads=source["heads"], kv_lora_rank=kv_lora_rank, q_lora_rank=q_lora_rank,
            qk_nope_head_dim=source["head_dim"], qk_rope_head_dim=self.rotary,
            v_head_dim=source["value_dim"] or source["head_dim"], latent_norm="rms" if norms else "none",
            query_bias=bias, latent_bias=bias,
            rope=_narrow(source["rope"], source["head_dim"]),
            **{name: source[name] for name in ("window", "soft_cap", "out_bias")},
        )  # fmt: skip

    def stage(
        self, setting: Any, arrays: Mapping[str, np.ndarray], basis: np.ndarray, rotary: int, frequencies: np.ndarray
    ) -> Any:
        """A layer `mla` in which the first `rotary` channels of the merged key in this basis are rotated, and nothing
        is compressed; for `Stream.advance`. `frequencies` are those of its pairs."""
        options = self.options(self.latent + self.rotary - rotary, 0, norms=False)
        options |= dict(qk_rope_head_dim=rotary, scale=self.scale)
        weights = self.merged(arrays, basis, rotary).arrays(arrays, self.source["qkv_bias"])
        weights["rope.listed"] = frequencies[: rotary // 2]
        return module(setting, options, weights, lambda: ListedRope(rotary // 2))

    def frequencies(self) -> Float[np.ndarray, " P"]:
        """Of all pairs of the merged key, as the fold lays them out."""
        return self.fold.frequencies(Rope(**self.source["rope"]).frequencies(self.fold.head_dim))


class Work:
    """The stages on one network: what is known of its layers so far."""

    def __init__(
        self, model: DecoderLM, plans: dict[int, Plan], ids: Int[np.ndarray, "N T"] | None, tell: Progress
    ) -> None:
        self.model, self.plans, self.ids, self.tell = model, plans, ids, tell
        self.energies: dict[int, np.ndarray] = {}
        self.mixings: dict[int, np.ndarray] = {}
        self.places = networks.places(model)

    def arrays(self, layer: int) -> dict[str, np.ndarray]:
        """Those of one layer's attention, on the host."""
        return networks.attention_of(self.model, self.places[layer])

    def inputs(self, stream: Stream | None, width: int) -> Any:
        """Inputs of the layer that is next, with a column of ones for biases; without text, white ones without it."""
        if stream is None:
            return [np.eye(width, width + 1)]
        return (np.concatenate([x, np.ones((len(x), 1))], axis=1) for x in stream.inputs())

    def basis(self, layer: int) -> Float[np.ndarray, "L L"]:
        """The basis of stage 2."""
        return self.plans[layer].fold.basis(self.mixings[layer])

    def mix(self, keep: bool) -> None:
        """Stage 2 for every layer, by the keys of the original network; `keep`: the energies too."""
        stream = None if self.ids is None else Stream(self.model, self.ids)
        for layer in range(self.model.depth):
            if layer in self.plans:
                fold, key = self.plans[layer].fold, affine("key", self.arrays(layer))
                energy = np.zeros((key.shape[1] // 2, key.shape[1] // 2))
                for x in self.inputs(stream, len(key) - 1):
                    energy += rotary_basis.pair_energy(x @ key, fold.heads, fold.layout)
                self.mixings[layer] = fold.mixing(energy)
                if keep:
                    self.energies[layer] = energy
            if stream is not None:
                stream.advance()
            self.tell("rotating", layer + 1, self.model.depth)

    def search(self, ids: Int[np.ndarray, "N T"]) -> dict[str, float]:
        """Doubles freqfold while the perplexity of partial RoPE gets better, and keeps the best; what was tried."""
        tried: dict[str, float] = {}
        best = (self.plans, self.mixings)
        while True:
            stream = Stream(self.model, ids)
            for layer in range(self.model.depth):
                stream.advance(self.partial(layer) if layer in self.plans else None)
            first = next(iter(self.plans.values())).fold
            before = min(tried.values(), default=np.inf)
            tried[str(first.freqfold)] = stream.perplexity()
            self.tell("freqfold", first.freqfold, first.head_dim // 2)
            if tried[str(first.freqfold)] >= before:
                break
            best = (self.plans, self.mixings)
            if any(2 * plan.fold.freqfold > plan.fold.head_dim // 2 for plan in self.plans.values()):
                break
            self.plans = {layer: plan.folded(2 * plan.fold.freqfold) for layer, plan in self.plans.items()}
            self.mixings = {layer: plan.fold.mixing(self.energies[layer]) for layer, plan in self.plans.items()}
        self.plans, self.mixings = best
        self.energies = {}
        return tried

    def partial(self, layer: int) -> Any:
        """Stage 3 of a layer."""
        plan = self.plans[layer]
        return plan.stage(
            self.model.setting,
            self.arrays(layer),
            self.basis(layer),
            plan.rotary,
            plan.frequencies()[: plan.rotary // 2],
        )

    def compress(
        self, rank: int, q_rank: int, balance: float, norms: bool, weighed: bool
    ) -> tuple[dict[int, networks.Weights], list[float], tuple[tuple[float, ...], ...]]:
        """Stages 4 to 7, by the keys and values of the network of stage 3 (`weighed`: by the weights alone): arrays,
        ratios and spectra of the layers."""
        stream = None if weighed and not norms else Stream(self.model, self.ids)
        measured = None if weighed else stream
        weights: dict[int, networks.Weights] = {}
        ratios: list[float] = []
        spectra: list[tuple[float, ...]] = []
        for layer in range(self.model.depth):
            if layer in self.plans:
                weights[layer], ratio, spectrum = self._compressed(
                    layer, rank, q_rank, balance, norms, measured, stream
                )
                ratios.append(ratio)
                spectra.append(tuple(map(float, spectrum)))
            if stream is not None:
                stream.advance(self.partial(layer) if layer in self.plans else None)
            self.tell("compressing", layer + 1, self.model.depth)
        return weights, ratios, tuple(spectra)

    def _compressed(
        self,
        layer: int,
        rank: int,
        q_rank: int,
        balance: float,
        norms: bool,
        measured: Stream | None,
        stream: Stream | None,
    ) -> tuple[networks.Weights, float, np.ndarray]:
        """One layer's arrays but for those of the output, its ratio and spectrum."""
        plan, arrays = self.plans[layer], self.arrays(layer)
        scale = plan.scale * (plan.source["head_dim"] + plan.rotary) ** 0.5
        merged, dtype = plan.merged(arrays, self.basis(layer), plan.rotary, scale), self.model.setting.param_dtype
        merged = dataclasses.replace(merged, query=merged.query.astype(dtype))  # The largest, and done with.
        moment = _moment(merged.latent, self.inputs(measured, len(merged.latent) - 1))
        keys = merged.latent.shape[1] - arrays["value.weight"].shape[1]
        down, up, ratio, spectrum = _joint(moment, keys, balance, rank)
        merged = merged.reduced(down, up)
        made = merged.arrays({}, plan.source["qkv_bias"])
        if q_rank:
            made |= self._queries(layer, q_rank, scale, measured)
        if norms:
            made |= _gains(merged.latent, made, q_rank, self.inputs(stream, len(merged.latent) - 1))
        return {name: np.asarray(array).astype(dtype) for name, array in made.items()}, ratio, spectrum

    def _queries(self, layer: int, rank: int, scale: float, stream: Stream | None) -> dict[str, np.ndarray]:
        """Stage 6 with a rank: the arrays of the two matrices."""
        plan, query = self.plans[layer], affine("query", self.arrays(layer))
        moment = _moment(query, self.inputs(stream, len(query) - 1))
        directions = np.linalg.eigh(moment)[1][:, ::-1][:, :rank]
        up = merged_query(directions.T, self.basis(layer), plan.source["heads"], plan.source["kv_heads"], plan.rotary)
        return {"query_down.weight": query[:-1] @ directions, "query.weight": scale * up.reshape(rank, -1)}

    def stages(self, ids: Int[np.ndarray, "M T"], result: DecoderLM) -> list[report.Stage]:
        """Every stage measured, the networks between the first and the last run layer by layer."""
        original = report.log_probabilities(self.model, ids)
        streams = {name: Stream(self.model, ids) for name in ("merged", "rotated", "partial RoPE")}
        for layer in range(self.model.depth):
            for name, stream in streams.items():
                stream.advance(self._stage(name, layer) if layer in self.plans else None)
            self.tell("stages", layer + 1, self.model.depth)
        logs = {"original": original} | {name: stream.log_probabilities() for name, stream in streams.items()}
        logs["low rank"] = report.log_probabilities(result, ids)
        return [report.measured(name, found, original, ids) for name, found in logs.items()]

    def _stage(self, name: str, layer: int) -> Any:
        if name == "partial RoPE":
            return self.partial(layer)
        plan = self.plans[layer]
        basis = plan.fold.basis(None if name == "merged" else self.mixings[layer])
        return plan.stage(self.model.setting, self.arrays(layer), basis, len(basis), plan.frequencies())


def plan_of(layer: int, options: dict[str, Any], qk_mqa_dim: int, collapse: int | str, freqfold: int | str) -> Plan:
    """Raises `ConversionError` for a layer whose keys cannot be merged, or sizes that do not fit."""
    width, rope = options["head_dim"], Rope(**options["rope"])
    refused = {
        "qk_norm": "each key head has a norm, which no mixing of heads commutes with",
        "sink_tokens": "latent attention has none",
        "learned_sinks": "latent attention has none",
    }
    for name, why in refused.items():
        if options[name]:
            raise ConversionError(f"layer {layer} has {name}: {why}")
    if not rope.theta or rope.share != 1:
        raise ConversionError(
            f"layer {layer} does not rotate whole heads (rope.theta {rope.theta}, share {rope.share})"
        )
    for name, value in (("collapse", collapse), ("freqfold", freqfold)):
        if value != "auto" and (not isinstance(value, int) or value < 1):
            raise ConversionError(f"{name} must be a whole number from 1 on, or auto, not {value!r}")
    if collapse == "auto":
        if not 0 < qk_mqa_dim <= width or width % qk_mqa_dim:
            raise ConversionError(
                f"qk_mqa_dim {qk_mqa_dim} does not divide the {width} channels of a head: give another"
            )
        collapse = width // qk_mqa_dim
    fold = Fold(
        options["kv_heads"], width, rope.layout, int(collapse if freqfold == "auto" else freqfold), int(collapse)
    )
    narrow = Rope(**_narrow(options["rope"], width)).frequencies(width // fold.collapse)
    if rope.scaling == "yarn" or not np.allclose(narrow, rope.frequencies(width)[:: fold.collapse], rtol=1e-9, atol=0):
        raise ConversionError(
            f"layer {layer} has rope scaling {rope.scaling!r}, whose frequencies depend on the width of a head: only "
            "none, linear, ntk and llama3 can be converted"
        )
    return Plan(options, fold)


def _narrow(rope: dict[str, Any], width: int) -> dict[str, Any]:
    """The options of positions for the first pairs of merged keys; ntk's change of base is fixed at the old width."""
    new = rope | dict(layout="interleaved")
    if rope["scaling"] == "ntk" and width > 2:
        new |= dict(scaling="none", theta=rope["theta"] * rope["factor"] ** (width / (width - 2)))
    return new


def _moment(matrix: Float[np.ndarray, "E w"], inputs: Any) -> Float[np.ndarray, "w w"]:
    """Sum over tokens of c^T c, c = [x, 1] times the matrix."""
    total = np.zeros((matrix.shape[1], matrix.shape[1]))
    for x in inputs:
        made = x @ matrix
        total += made.T @ made
    return total


def _joint(
    moment: Float[np.ndarray, "w w"], keys: int, balance: float, rank: int
) -> tuple[np.ndarray, np.ndarray, float, np.ndarray]:
    """Stages 4 and 5: what multiplies the latent, what undoes it, the ratio, and each channel's share of the energy."""
    sizes = np.sqrt(np.diagonal(moment))
    ratio = 1.0
    if keys and balance and sizes[keys:].any() and sizes[:keys].any():
        ratio = float(sizes[:keys].mean() / (sizes[keys:].mean() * balance))
    factors = np.where(np.arange(len(moment)) < keys, 1 / ratio, 1.0)
    # The published code adds a hundredth of the mean to the diagonal, which changes no eigenvector.
    values, vectors = np.linalg.eigh(moment * factors * factors[:, None])
    directions = vectors[:, ::-1][:, :rank]
    shares = np.maximum(values[::-1], 0)
    return factors[:, None] * directions, directions.T / factors, ratio, shares / max(shares.sum(), 1e-300)


def _gains(
    latent: Float[np.ndarray, "E k"], made: dict[str, np.ndarray], q_rank: int, inputs: Any
) -> dict[str, np.ndarray]:
    """Stage 7: gains that keep the mean size of latents."""
    matrices = {"latent_norm.gain": latent}
    if q_rank:
        matrices["query_norm.gain"] = affine("query_down", made)
    epsilon = presets.get("mla").norm_epsilon
    sums, count = dict.fromkeys(matrices, 0.0), 0
    for x in inputs:
        count += len(x)
        for name, matrix in matrices.items():
            sums[name] += float(np.sqrt(np.mean((x @ matrix) ** 2, axis=1) + epsilon).sum())
    return {name: np.full(matrix.shape[1], sums[name] / count) for name, matrix in matrices.items()}


def flags(parser: argparse.ArgumentParser) -> None:
    """The flags of `eval.py convert --to=transmla`."""

    def number(text: str) -> int | str:
        return text if text == "auto" else int(text)

    parser.add_argument("--kv_lora_rank", type=int, default=512, help="channels of the latent")
    parser.add_argument("--qk_mqa_dim", type=int, default=64, help="rotated channels; must divide a head's")
    parser.add_argument("--q_lora_rank", type=int, default=0, help="of the queries; 0 is one full matrix")
    parser.add_argument("--freqfold", type=number, default="auto", help="frequencies treated as one, or auto")
    parser.add_argument(
        "--collapse", type=number, default="auto", help="a head's channels over the rotated ones, or auto"
    )
    parser.add_argument("--balance_kv_ratio", type=float, default=1.0, help="0 leaves keys and values as they are")
    parser.add_argument("--norms", action="store_true", help="norms on the latents, as DeepSeek's models have")
    parser.add_argument("--pca", default="activations", choices=PCA)
