"""TransMLA (arXiv 2502.07864): what making MLA of a trained GQA costs, stage by stage, and what training gives back."""

import json
import pathlib
from collections.abc import Callable, Iterator
from typing import Any

import ml_collections
import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from configs import fields
from configs.papers import transmla as configs
from evaluation import plots, runs
from evaluation.claims import (
    Check,
    Claim,
    ClaimContext,
    Comparison,
    Rule,
    Table,
    Trained,
    at_least,
    at_most,
    drawing,
    less,
    number,
    of,
)
from evaluation.claims.record import Record
from evaluation.claims.texts import rows_of
from models.conversion import convert_to_transmla, rotary_basis
from models.conversion.merged import affine
from models.conversion.report import log_probabilities, measured
from models.conversion.streams import Stream
from models.conversion.transmla import Work, plan_of

METHODS = ("dropped", "RoRoPE", "RoRoPE + FreqFold", "RoRoPE, strongest pairs")
LATENTS = ("BKV", "no BKV", "PCA of weights")
KEPT = 32, 16, 8  # Rotated channels of the 128 that a merged key has.
RANKS = 4, 8, 16  # Channels of the latent; with 16 rotated ones the least are 8% of the cache, as in the paper.


def run(context: ClaimContext) -> Iterator[Any]:
    """One seed: trains GQA, takes its positions away in three ways, compresses it in three, and trains on."""
    p = context.params
    trained = context.train(_short(configs.get_config(), p["steps"], p))
    calibration, ids = rows_of(context, trained, p["rows"], p["calibration"])
    original = log_probabilities(trained.model, ids)
    done, total = 0, 2 + len(p["kept"]) * len(METHODS) + len(p["ranks"]) * len(LATENTS)

    def perplexity(logs: np.ndarray) -> float:
        return measured("", logs, original, ids).perplexity

    def told(each: Any) -> Any:
        nonlocal done
        done += 1
        context.report("conversions", done, total)
        return each

    yield number("perplexity", perplexity(original), form="GQA")
    positions = Positions(trained, calibration, ids)
    for stage in ("merged", "rotated"):
        apart = np.abs(positions.whole(stage == "rotated") - original).max() / np.abs(original).max()
        yield told(number("relative difference", apart, stage=stage))
    for kept in p["kept"]:
        for method in METHODS:
            yield told(number("partial RoPE", positions.perplexity(method, kept), kept=kept, method=method))
    shared = dict(qk_mqa_dim=p["rotated"], freqfold=positions.folds[p["rotated"]])
    for rank in p["ranks"]:
        for latent in LATENTS:
            made = convert_to_transmla(
                trained.model, trained.config.model, kv_lora_rank=rank, calibration_ids=calibration,
                balance_kv_ratio=float(latent != "no BKV"),
                pca="weights" if latent == "PCA of weights" else "activations", **shared,
            )  # fmt: skip
            found = perplexity(log_probabilities(made.model, ids))
            yield told(number("low rank", found, rank=rank, latent=latent))
            if (rank, latent) == (p["ranks"][0], "BKV"):
                low = found
    tight = dict(kv_lora_rank=p["ranks"][0], rows=p["calibration"], **shared)
    sources = {
        "GQA": trained.config.run_dir,
        "MLA": context.convert(trained, to="transmla", report_rows=0, **tight),
        "GQA + up-projections": context.convert(trained, to="mha_latent", factor="svd", report_rows=0),
    }
    after = {}
    for form, folder in sources.items():
        went_on = context.train(_going_on(str(folder), p))
        after[form] = perplexity(log_probabilities(went_on.model, ids))
        yield number("perplexity trained on", after[form], form=form)
        yield number("training loss", _last_losses(went_on), "nats", form=form)
    share = np.log(low / after["MLA"]) / np.log(low / after["GQA"])
    yield number("share of the gap that training closes", share)


def _short(config: ml_collections.ConfigDict, steps: int, p: Any) -> ml_collections.ConfigDict:
    with config.unlocked():
        config.train.steps, config.data.max_files = steps, p["files"]
        config.optimizer.warmup_steps = max(1, steps // 20)
        config.checkpoint.every, config.eval.tasks, config.eval.sample_prompts = 0, (), ()
    return config


def _going_on(folder: str, p: Any) -> ml_collections.ConfigDict:
    """A short run from the weights in a run folder, whatever its attention."""
    config = _short(configs.get_config(f"kv_lora_rank={p['ranks'][0]},qk_mqa_dim={p['rotated']}"), p["more"], p)
    stored = json.loads((pathlib.Path(folder) / "config.json").read_text())
    config = fields.from_plain(fields.plain(config) | {"model": stored["model"]})
    with config.unlocked():
        config.train.init_from = folder
    return config


def _last_losses(run: Trained) -> float:
    """The mean training loss of the second half of a run."""
    losses = [row["loss"] for row in runs.read([pathlib.Path(run.config.run_dir)])[0].metrics if "loss" in row]
    return float(np.mean(losses[len(losses) // 2 :]))


class Positions:
    """A network with rotary positions in so many channels of its merged keys only, by method: chosen by `calibration`,
    measured on `ids`."""

    def __init__(self, trained: Trained, calibration: np.ndarray, ids: np.ndarray) -> None:
        self.model, self.calibration, self.ids = trained.model, calibration, ids
        self.options = fields.plain(trained.config.model)["attention"]
        self.folds: dict[int, int] = {}  # What FreqFold chose.
        self.work = self._work(1, 1)
        self.work.mix(keep=True)
        self.query_energies = list(self._query_energies())

    def _work(self, freqfold: int, collapse: int) -> Work:
        plan = plan_of(0, self.options, 0, collapse, freqfold)
        return Work(self.model, dict.fromkeys(range(self.model.depth), plan), self.calibration, lambda *_: None)

    def _query_energies(self) -> Iterator[np.ndarray]:
        """Of each layer's pairs (key/value head, j), the mean over the query heads that read it."""
        stream, fold = Stream(self.model, self.calibration), self.work.plans[0].fold
        for layer in range(self.model.depth):
            query, heads = affine("query", self.work.arrays(layer)), self.options["heads"]
            found = np.zeros(query.shape[1] // 2)
            for x in self.work.inputs(stream, len(query) - 1):
                found += np.diagonal(rotary_basis.pair_energy(x @ query, heads, fold.layout))
            stream.advance()
            yield found.reshape(fold.heads, heads // fold.heads, -1).mean(1).ravel()

    def whole(self, rotated: bool) -> np.ndarray:
        """Log-probabilities of the merged network with all channels rotated, in the basis of RoRoPE if `rotated`."""
        plan = self.work.plans[0]
        bases = [plan.fold.basis(self.work.mixings[layer] if rotated else None) for layer in self.work.plans]
        return self._run(
            self.ids, lambda layer: (bases[layer], len(bases[layer]), plan.frequencies())
        ).log_probabilities()

    def perplexity(self, method: str, kept: int) -> float:
        """Of the held-out text, with `kept` channels rotated. "RoRoPE" folds no more frequencies than it must."""
        if method in ("RoRoPE", "RoRoPE + FreqFold"):
            return self._folded(kept, search=method != "RoRoPE")
        return self._run(self.ids, lambda layer: self._strongest(layer, kept, method != "dropped")).perplexity()

    def _strongest(self, layer: int, kept: int, mixed: bool) -> tuple[np.ndarray, int, np.ndarray]:
        """The strongest pairs first, each with its own frequency; those of the heads as they are (as many of each, by
        the norms of keys and queries: as MHA2MLA drops positions) or `mixed` over heads."""
        fold, energy, heads = self.work.plans[0].fold, self.work.energies[layer], self.work.plans[0].fold.heads
        if mixed:
            members, mixing = fold.members(), self.work.mixings[layer]
            groups = energy[members[:, :, None], members[:, None, :]]
            strength = np.einsum("gnp,gnm,gmp->pg", mixing, groups, mixing).ravel()
        else:
            strength = np.sqrt(np.diagonal(energy) * self.query_energies[layer])
        order = rotary_basis.strongest_first(strength, heads, kept // 2, each_head=not mixed)
        basis = fold.basis(self.work.mixings[layer] if mixed else None)
        columns = (2 * order[:, None] + np.arange(2)).ravel()
        return basis[:, columns], kept, self.work.plans[0].frequencies()[order]

    def _folded(self, kept: int, search: bool) -> float:
        """With the freqfold that is best on the text of calibration, doubled while it gets better; or the smallest."""
        collapse = max(1, self.options["head_dim"] // kept)
        best, chosen, freqfold = np.inf, None, collapse
        while freqfold <= self.options["head_dim"] // 2:
            plan = plan_of(0, self.options, 0, collapse, freqfold)
            mixings = [plan.fold.mixing(energy) for energy in self.work.energies.values()]

            def of_layer(layer: int, plan: Any = plan, mixings: Any = mixings) -> tuple[np.ndarray, int, np.ndarray]:
                return plan.fold.basis(mixings[layer]), kept, plan.frequencies()

            found = self._run(self.calibration, of_layer).perplexity()
            if found >= best:
                break
            best, chosen, self.folds[kept] = found, of_layer, freqfold
            if not search:
                break
            freqfold *= 2
        return self._run(self.ids, chosen).perplexity()

    def _run(self, ids: np.ndarray, of_layer: Callable[[int], tuple[np.ndarray, int, np.ndarray]]) -> Stream:
        stream, plan = Stream(self.model, ids), self.work.plans[0]
        for layer in range(self.model.depth):
            stream.advance(plan.stage(self.model.setting, self.work.arrays(layer), *of_layer(layer)))
        return stream


def _partial(kept: int, method: str) -> Any:
    return of("partial RoPE", kept=kept, method=method)


def _no_worse(a: Any, b: Any) -> Comparison:
    return Comparison(f"{a} ≤ {b}", lambda measured: measured[b] - measured[a], inclusive=True)


def _low(rank: int, latent: str) -> Any:
    return of("low rank", rank=rank, latent=latent)


def draw(record: Record) -> Figure:
    """Left: perplexity by channels that stay rotated, a line per method. Right: by the rank of the latent."""
    base = record.measured[of("perplexity", form="GQA")].mean()
    figure = Figure(figsize=(9.2, 3.6), layout="constrained", facecolor="none")
    panels = [drawing.styled(axes) for axes in figure.subplots(1, 2)]
    kinds = (
        (METHODS, record.parameters["kept"], _partial, "rotated channels of 128"),
        (LATENTS, record.parameters["ranks"], _low, "channels of the latent"),
    )
    for axes, (names, sizes, key, label) in zip(panels, kinds, strict=True):
        for i, name in enumerate(names):
            values = np.stack([record.measured[key(size, name)] for size in sizes])
            axes.plot(sizes, values, "o", color=plots.colour_of(i), markersize=3, alpha=0.4)
            axes.plot(sizes, values.mean(1), color=plots.colour_of(i), linewidth=1.4)
        axes.axhline(base, color=plots.SOFT, linewidth=0.9, linestyle="--")
        axes.set_xscale("log", base=2)
        axes.set_xticks(sizes, [str(size) for size in sizes])
        axes.set_xlabel(label, color=plots.SOFT)
        axes.set_title("perplexity per byte (GQA dashed)", fontsize=9.5, color=plots.SOFT)
        handles = [Line2D([], [], color=plots.colour_of(i)) for i in range(len(names))]
        axes.legend(handles, names, frameon=False, labelcolor=plots.INK, fontsize=8.5)
    return figure


CLAIM = Claim(
    "transmla",
    "TransMLA: a trained GQA becomes MLA, with a smaller cache and little training",
    paper="2502.07864",
    says=(
        "Grouped-query attention can be written as latent attention without loss. Mixing heads so that few channels "
        "carry the positions (RoRoPE), and treating adjacent frequencies as one (FreqFold), costs far less than "
        "dropping positions head by head; balancing keys and values before a joint PCA of activations costs less than "
        "not balancing, or than a PCA of weights; a short training gives back most of what is lost. And with the same "
        "cache, up-projections per query head learn better than GQA."
    ),
    setting=(
        "A byte-level language model of 4 layers, width 128, 8 query and 4 key/value heads of 32 channels on Python's "
        "standard library. Perplexity per byte on held-out rows of 128 bytes. A merged key has 128 channels; the cache "
        "has 256 numbers per token before, and after it 16 rotated ones and the latent's."
    ),
    run=run,
    defaults={
        "seeds": (0, 1, 2), "steps": 400, "more": 80, "kept": KEPT, "ranks": RANKS, "rotated": 16, "rows": 64,
        "calibration": 48, "files": 0,
    },
    smoke={
        "seeds": (0, 1), "steps": 4, "more": 2, "kept": KEPT, "ranks": RANKS, "rows": 8, "calibration": 8,
        "files": 200,
    },
    checks=(
        Check(
            "merged and rotated are exact",
            "Heads merged, and mixed by RoRoPE with all channels rotated, the model is the original.",
            tuple(at_most(of("relative difference", stage=stage), 1e-5) for stage in ("merged", "rotated")),
            "paper, sections 4.1 and 4.2",
            Rule.EXACT,
        ),
        Check(
            "RoRoPE is better than dropping",
            "With as many rotated channels, mixing heads is better than keeping the strongest pairs of each head.",
            tuple(less(_partial(kept, "RoRoPE"), _partial(kept, "dropped")) for kept in KEPT),
            "paper, figure 2b",
        ),
        Check(
            "both are better than dropping",
            "So is RoRoPE with FreqFold.",
            tuple(less(_partial(kept, "RoRoPE + FreqFold"), _partial(kept, "dropped")) for kept in KEPT),
            "paper, figure 2b and table 1 (58.20 against 37.90)",
        ),
        Check(
            "FreqFold is no worse",
            "Folding more frequencies, as many as the calibration text says, is no worse than RoRoPE alone.",
            tuple(_no_worse(_partial(kept, "RoRoPE + FreqFold"), _partial(kept, "RoRoPE")) for kept in KEPT),
            "paper, figure 2b",
        ),
        Check(
            "balanced keys and values",
            "The joint PCA is better with keys and values balanced.",
            tuple(less(_low(rank, "BKV"), _low(rank, "no BKV")) for rank in RANKS),
            "paper, figure 3b",
        ),
        Check(
            "activations, not weights",
            "The PCA of activations is better than that of weights.",
            tuple(less(_low(rank, "BKV"), _low(rank, "PCA of weights")) for rank in RANKS),
            "paper, figure 3b",
        ),
        Check(
            "recovery",
            "A short training closes most of the gap between the converted model and the original trained on as long.",
            at_least(of("share of the gap that training closes"), 0.5),
            "paper, table 1",
        ),
        Check(
            "same cache, more expressive",
            "Trained on the same text, GQA with up-projections has a lower training loss than GQA.",
            less(of("training loss", form="GQA + up-projections"), of("training loss", form="GQA")),
            "paper, first version, experiments",
        ),
    ),
    tables=(
        Table("Positions in so many channels: perplexity", "partial RoPE", rows="kept", columns="method"),
        Table("Latents of so many channels: perplexity", "low rank", rows="rank", columns="latent"),
        Table("Trained on for a while", ("perplexity trained on", "training loss"), rows="form"),
    ),
    draw=draw,
)  # fmt: skip
