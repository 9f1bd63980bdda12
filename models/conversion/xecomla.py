"""GQA -> MLA by singular values (X-EcoMLA, arXiv 2503.11132): a first guess, which distillation then repairs."""

import argparse
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from flax import nnx
from jaxtyping import Float, Int

from configs import attention as presets
from configs.errors import unknown
from layers.rope import Rope
from models import build
from models.conversion import networks, report
from models.conversion.contract import Conversion
from models.conversion.latent import ConversionError
from models.conversion.networks import Weights
from models.conversion.report import Report
from models.conversion.svd import Heads, factorised, heads_of, truncated
from models.decoder import DecoderLM
from models.plan import layer_specs

CHOICES = {
    "sigma": ("down", "up"),
    "rope": ("released", "matched"),
    "latent_norm": ("none", "rms"),
    "init": ("svd", "random"),
    "count": ("released", "paper"),
}
_NOT_OF_MLA = {"learned_sinks": False, "qk_norm": False, "sink_tokens": 0}


@dataclasses.dataclass(frozen=True)
class Ranks:
    """How ranks are chosen; the fields are those of `upcycle`."""

    kv: int | Sequence[int]
    q: int | Sequence[int] | None
    kv_energy: float
    q_energy: float
    fixed_ends: bool
    count: str
    divisor: int

    def __post_init__(self) -> None:
        for which, given, least in (("kv_rank", self.kv, 1), ("q_rank", self.q, 0)):
            if any(rank is not None and rank < least for rank in (given if isinstance(given, Sequence) else (given,))):
                raise ConversionError(f"{which} must be {least} or more, not {given}")
        for which, share in (("kv_energy", self.kv_energy), ("q_energy", self.q_energy)):
            if not 0 <= share <= 1:
                raise ConversionError(f"{which} must be a share of 0 to 1, not {share:g}")
        if self.divisor < 1:
            raise ConversionError(f"divisor must be 1 or more, not {self.divisor}")

    def check(self, layers: int) -> None:
        """Raises `ConversionError` unless lists of ranks are as long as the list of layers to be converted."""
        for which, given in (("kv_rank", self.kv), ("q_rank", self.q)):
            if isinstance(given, Sequence) and len(given) != layers:
                raise ConversionError(f"{len(given)} numbers in {which} for {layers} layers: give one, or one each")

    def of(self, heads: Heads, number: int, end: bool, options: Mapping[str, Any]) -> tuple[int, int]:
        """(r_q, r_kv) of a layer, the `number`-th of those converted; `end` says whether it is the network's first or
        last, `options` are its new ones but for the ranks. Raises `ConversionError` for ranks no matrix has."""
        fixed = end and self.fixed_ends
        kv = self._rank("kv_rank", _each(self.kv, number), 0 if fixed else self.kv_energy, heads.joint.values)
        q, share = _each(self.q, number), 0 if fixed else self.q_energy
        if q == 0 and not share:
            return 0, kv
        if q is None:
            q = max(1, matching_rank(heads, {**options, "kv_lora_rank": kv}) // self.divisor * self.divisor)
        return self._rank("q_rank", q, share, heads.queries.values), kv

    def _rank(self, which: str, fixed: int, share: float, values: Float[np.ndarray, " R"]) -> int:
        if share:
            fixed = self.by_energy(values, share)
        elif fixed > len(values):
            raise ConversionError(f"{which}={fixed} is above the rank of the matrices, {len(values)}")
        return min(-(-fixed // self.divisor) * self.divisor, len(values))

    def by_energy(self, values: Float[np.ndarray, " R"], share: float) -> int:
        """How many of these singular values the share takes, at least 1; not yet rounded."""
        energies = np.cumsum(values.astype(np.float64) ** 2)
        reached = energies / energies[-1]
        return max(1, int(np.sum(reached <= share) if self.count == "released" else 1 + np.sum(reached < share)))


def upcycle(
    model: DecoderLM,
    config: Mapping[str, Any],
    *,
    kv_rank: int | Sequence[int] = 64,
    q_rank: int | Sequence[int] | None = None,
    kv_energy: float = 0.0,
    q_energy: float = 0.0,
    fixed_ends: bool = False,
    count: str = "released",
    divisor: int = 8,
    nope: int = 0,
    rotary: int = 0,
    sigma: str = "down",
    rope: str = "released",
    latent_norm: str = "none",
    init: str = "svd",
    layers: Sequence[int] = (),
    report_ids: Int[np.ndarray, "M T"] | None = None,
    seed: int = 0,
    progress: Callable[[str, int, int], None] | None = None,
) -> Conversion:
    """MLA in `layers` (all, if none are named) of a network of MHA, GQA or MQA, whose `config.model` is `config`.

    In each layer, with heads of width d_h and keys and values repeated for all query heads (section 3 of the paper):

    - W_Q cut to rank r_q gives W_DQ, and W_UQ with `nope` unrotated and `rotary` rotated channels of each head (0: half
      of d_h each). With `q_rank` 0 the queries keep one full matrix.
    - [W_K, W_V], cut together to rank r_kv, give W_DKV, W_UK with the unrotated channels, and W_UV.
    - W_KR, the one rotated key, is the mean over heads of the rotated channels of W_K.
    - All else is copied. Biases: those of queries are cut as W_Q is; those of values become one of the output, which is
      the same function; of those of keys the rotated channels stay, and the others cancel in the softmax.

    Ranks: one number, or one per converted layer. `q_rank` None is the widest latent with which a layer has no more
    numbers in its matrices than before. With `kv_energy` or `q_energy` above 0 a rank is how many singular values that
    share of the sum of their squares takes, with `fixed_ends` not in the network's first and last layer: the smallest
    number that reaches the share (`count` "paper"), or, one less, those up to which it is not exceeded ("released", the
    authors' code, whose last layer then takes the rank of the layer before it: a slip that is not followed). All ranks
    are rounded up to a multiple of `divisor`.

    `sigma`: singular values go into the down projection (the code's choice) or "up" (the paper's): the same products,
    which train differently. `latent_norm` "none" is the paper's choice, "rms" its ablation. `init` "random" (by `seed`)
    is its comparison: new weights but for W_O.

    `rope` "released": of each head the first channels are unrotated and the last rotated, in neighbouring pairs, with
    YaRN of the same factor (and an original length of 4096) where positions were stretched. The authors' checkpoints
    are so; but in heads that were turned in pairs (i, i + d_h / 2) the new pairs have nothing to do with the old ones.
    "matched" is ours: every (d_h / `rotary`)-th pair stays rotated, which turns as fast as before; the unrotated
    channels are others, the slowest first; stretched positions stay as they were.

    A softmax scale other than the usual one stays in proportion. Even at full rank the logits are not the original's,
    since one rotated key serves all heads and fewer channels are rotated. With `report_ids` the stages are "ranks"
    (matrices cut, attention as before) and "x-ecomla"; the spectra are those of [W_K, W_V].

    Raises `ConversionError`: options that MLA lacks (sinks, a norm of queries and keys, positions on a share of a
    head), ranks above those of the matrices, widths that do not fit, layers there are not.
    """
    given = dict(sigma=sigma, rope=rope, latent_norm=latent_norm, init=init, count=count)
    for option, value in given.items():
        if value not in CHOICES[option]:
            raise ConversionError(unknown(option, value, CHOICES[option]))
    ranks = Ranks(kv_rank, q_rank, kv_energy, q_energy, fixed_ends, count, divisor)
    plain: dict[str, Any] = networks.plain(config)
    specs = layer_specs(plain)
    chosen = _chosen(layers, len(specs))
    ranks.check(len(chosen))
    options = {
        layer: new_options(layer, specs[layer]["attention"], nope, rotary, rope, latent_norm) for layer in chosen
    }
    arrays, places = networks.arrays(model), networks.places(model, specs)
    made: dict[int, Weights] = {}
    cut: dict[int, Weights] = {}
    spectra: list[tuple[float, ...]] = []
    for number, layer in enumerate(chosen):
        own = networks.layer_arrays(arrays, places[layer])
        heads, dtype = heads_of(own, specs[layer]["attention"]), own["query.weight"].dtype
        q, kv = ranks.of(heads, number, layer in (0, len(specs) - 1), options[layer])
        options[layer] |= {"q_lora_rank": q, "kv_lora_rank": kv}
        if init == "svd":
            made[layer] = _cast(factorised(heads, options[layer], sigma, rope), dtype)
            cut |= {} if report_ids is None else {layer: _cast(truncated(heads, q, kv), dtype)}
        spectra.append(tuple(map(float, heads.joint.values**2 / np.sum(heads.joint.values**2))))
        del heads, own  # With their decompositions, before the next layer's are made.
        if progress is not None:
            progress("layers", number + 1, len(chosen))
    new_config = configured(plain, options)
    if init == "random":
        biased = any(name.endswith(".attention.out.bias") for name in arrays)
        made = _drawn(
            model.vocab_size, new_config, chosen, seed, ("out.weight", "out.bias") if biased else ("out.weight",)
        )
    result = networks.like(model, new_config, made)
    stages = []
    if report_ids is not None:
        original = report.log_probabilities(model, report_ids)
        stages.append(report.measured("original", original, original, report_ids))
        kinds = [("ranks", networks.like(model, None, cut))] if cut else []
        for name, one in [*kinds, ("x-ecomla", result)]:
            stages.append(report.measured(name, report.log_probabilities(one, report_ids), original, report_ids))
            if progress is not None:
                progress("stages", len(stages) - 1, len(kinds) + 1)
    found = {str(layer): (each["q_lora_rank"], each["kv_lora_rank"]) for layer, each in options.items()}
    asked = given | dataclasses.asdict(ranks) | dict(nope=nope, rotary=rotary, seed=seed, ranks=found)
    return Conversion(result, new_config, Report(asked, tuple(stages), tuple(spectra)))


def new_options(
    layer: int, source: Mapping[str, Any], nope: int = 0, rotary: int = 0, rope: str = "released", norm: str = "none"
) -> dict[str, Any]:
    """The options of MLA for a layer of MHA with these, but for its ranks; what `upcycle` raises."""
    if source["layer"] != "mha":
        raise ConversionError(
            f"layer {layer} is {source['layer']}, and only mha (gqa, mqa, sliding) can be converted so"
        )
    unlike = next((field for field, absent in _NOT_OF_MLA.items() if source[field] != absent), None)
    if unlike or source["rope"]["share"] != 1:
        raise ConversionError(f"layer {layer} has {unlike or 'rope.share'}, for which latent attention has no place")
    width = source["head_dim"]
    nope, rotary = nope or width // 2, rotary or width // 2
    if not (1 <= nope <= width and 1 <= rotary <= width) or rotary % 2:
        raise ConversionError(
            f"nope={nope} and rotary={rotary} do not fit the heads of layer {layer}: give 1 to {width} channels, an "
            "even number of them rotated"
        )
    if rope == "matched" and width % rotary:
        raise ConversionError(
            f"rope='matched' needs rotary={rotary} to divide the heads of layer {layer}, {width} wide"
        )
    turned = new_rope(source["rope"], width, rope)
    scale, again = source["scale"] * np.sqrt(width / (nope + rotary)), Rope(**turned).logit_factor
    if again != 1:  # MHA did not apply it.
        scale = (scale or (nope + rotary) ** -0.5) / again
    biased = source["qkv_bias"]
    return presets.get("mla").to_dict() | dict(
        heads=source["heads"], qk_nope_head_dim=nope, qk_rope_head_dim=rotary, v_head_dim=source["value_dim"] or width,
        latent_norm=norm, window=source["window"], soft_cap=source["soft_cap"], scale=float(scale), query_bias=biased,
        latent_bias=biased, out_bias=biased or source["out_bias"], rope=turned,
    )  # fmt: skip


def new_rope(source: Mapping[str, Any], width: int, rope: str) -> dict[str, Any]:
    """The positions of the rotated channels, out of those of heads of this width."""
    own = dict(source)
    if rope == "released":
        stretched = dict(scaling="yarn", original_length=4096, beta_fast=32.0, beta_slow=1.0, mscale=1.0)
        stretched |= dict(mscale_all_dim=0.0)
        return own | {"layout": "interleaved"} | (stretched if own["theta"] and own["scaling"] != "none" else {})
    if own["scaling"] == "ntk":  # What it makes of the base depends on the width of a head.
        own |= dict(scaling="none", theta=own["theta"] * own["factor"] ** (width / (width - 2)), factor=1.0)
    return own


def matching_rank(heads: Heads, options: Mapping[str, Any]) -> int:
    """The largest r_q with which a layer has no more numbers in its matrices than before (the paper: about as many)."""
    width, count, kv_rank = len(heads.query), options["heads"], options["kv_lora_rank"]
    nope, rotary, value = (options[name] for name in ("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"))
    left = heads.query.size + heads.key.size + heads.value.size
    left -= width * (kv_rank + rotary) + kv_rank * count * (nope + value)
    return min(left // (width + count * (nope + rotary)), *heads.query.shape)


def configured(config: dict[str, Any], new: Mapping[int, dict[str, Any]]) -> dict[str, Any]:
    """`config.model` with these options of attention in these layers: where all are new, the shared options, with a
    tuple in each field in which layers differ; else exceptions in `per_layer`."""
    if len(new) < config["depth"]:
        exceptions = tuple((str(layer), {"attention": options}) for layer, options in sorted(new.items()))
        return config | {"per_layer": (*config["per_layer"], *exceptions)}
    others = []
    for chosen, fields in config["per_layer"]:
        kept = {field: value for field, value in dict(fields).items() if field.partition(".")[0] != "attention"}
        others += [(chosen, kept)] if kept else []
    return config | {"attention": _merged([new[layer] for layer in sorted(new)]), "per_layer": tuple(others)}


def _merged(options: Sequence[Any]) -> Any:
    if isinstance(options[0], dict):
        return {field: _merged([each[field] for each in options]) for field in options[0]}
    return options[0] if all(each == options[0] for each in options) else tuple(options)


def _each(ranks: Any, number: int) -> Any:
    return ranks[number] if isinstance(ranks, Sequence) else ranks


def _cast(weights: Weights, dtype: Any) -> Weights:
    return {name: np.ascontiguousarray(array, dtype) for name, array in weights.items()}  # No views of what is wider.


def _chosen(layers: Sequence[int], depth: int) -> list[int]:
    wrong = next((layer for layer in layers if not 0 <= layer < depth), None)
    if wrong is not None:
        raise ConversionError(f"there is no layer {wrong}: the network has layers 0 to {depth - 1}")
    return sorted(set(layers)) or list(range(depth))


def _drawn(
    vocab_size: int, config: dict[str, Any], chosen: Sequence[int], seed: int, kept: Sequence[str]
) -> dict[int, Weights]:
    """The attention of these layers in a new network, without the arrays that are to be kept."""
    fresh = build(config, vocab_size=vocab_size, rngs=nnx.Rngs(seed))
    arrays, places = networks.arrays(fresh), networks.places(fresh, layer_specs(config))
    return {
        layer: {name: array for name, array in networks.layer_arrays(arrays, places[layer]).items() if name not in kept}
        for layer in chosen
    }


def _numbers(text: str) -> int | tuple[int, ...]:
    numbers = tuple(int(part) for part in text.split(","))
    return numbers[0] if len(numbers) == 1 else numbers


def flags(parser: argparse.ArgumentParser) -> None:
    """The flags of `eval.py convert --to=x-ecomla`."""
    several = "one number, or one for each layer that is converted, as 64,32,32"
    parser.add_argument("--kv_rank", type=_numbers, default=64, help=f"width of the latent: {several}")
    parser.add_argument("--q_rank", type=_numbers, default=None, help="of the query's latent, as kv_rank; 0: none; by "
                        "default what keeps the number of parameters")  # fmt: skip
    parser.add_argument("--kv_energy", type=float, default=0.0, help="a rank per layer: the share of energy it takes")
    parser.add_argument("--q_energy", type=float, default=0.0, help="the same of the query's latent")
    parser.add_argument("--fixed_ends", action="store_true", help="the first and last layer take the fixed ranks")
    parser.add_argument("--count", default="released", choices=CHOICES["count"], help="how energy is counted")
    parser.add_argument("--divisor", type=int, default=8, help="ranks are multiples of it")
    parser.add_argument("--nope", type=int, default=0, help="unrotated channels of a head; 0 is half of them")
    parser.add_argument("--rotary", type=int, default=0, help="rotated channels of a head; 0 is half of them")
    parser.add_argument("--sigma", default="down", choices=CHOICES["sigma"], help="where singular values go")
    parser.add_argument("--rope", default="released", choices=CHOICES["rope"], help="which channels stay rotated")
    parser.add_argument("--latent_norm", default="none", choices=CHOICES["latent_norm"])
    parser.add_argument("--init", default="svd", choices=CHOICES["init"], help="random: to compare with")
    parser.add_argument("--layers", type=lambda text: tuple(int(part) for part in text.split(",")), default=(),
                        help="numbers of layers, as 1,3,5; all by default")  # fmt: skip
    parser.add_argument("--seed", type=int, default=0, help="of random weights")
