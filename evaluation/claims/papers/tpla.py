"""TPLA (arXiv 2508.15881): what slicing the latent of a trained MLA costs, by rotation, by factor and by mode."""

from collections.abc import Iterator
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from configs.papers import tpla
from evaluation import plots
from evaluation.claims import (
    Check,
    Claim,
    ClaimContext,
    Rule,
    Table,
    at_most,
    drawing,
    less,
    number,
    of,
    ordered,
)
from evaluation.claims.record import Record
from evaluation.claims.texts import rows_of
from models.conversion import convert_to_tpla
from models.conversion.report import log_probabilities, measured

TRANSFORMS = ("identity", "hadamard", "pca")
#: What is measured for every rotation: mode, norm factor, logit factor.
FORMS = {
    "norm only, 1/e": ("tpla_norm_only", "inv_energy", "one"),
    "norm only, g": ("tpla_norm_only", "balanced", "one"),
    "softmax only, 1": ("tpla_softmax_only", "auto", "one"),
    "softmax only, 1/e": ("tpla_softmax_only", "auto", "inv_energy"),
    "softmax only, e": ("tpla_softmax_only", "auto", "energy"),
    "softmax only, lsq": ("tpla_softmax_only", "auto", "lsq"),
    "both, 1": ("tpla", "inv_energy", "one"),
    "both, 1/e": ("tpla", "inv_energy", "inv_energy"),
    "both, lsq": ("tpla", "inv_energy", "lsq"),
}
CHOSEN = "both, lsq"


def run(context: ClaimContext) -> Iterator[Any]:
    """One seed: trains MLA, converts it in every way, and measures each on the same held-out text."""
    p = context.params
    config = tpla.get_config(f"rank={p['rank']}")
    with config.unlocked():
        config.train.steps, config.data.max_files = p["steps"], p["files"]
        config.optimizer.warmup_steps = max(1, p["steps"] // 20)
        config.checkpoint.every, config.eval.tasks, config.eval.sample_prompts = 0, (), ()
    trained = context.train(config)
    calibration, ids = rows_of(context, trained, p["rows"], p["calibration"])
    original = log_probabilities(trained.model, ids)
    half = ids.shape[1] // 2

    def perplexity(logs: np.ndarray, first: int = 0) -> float:
        return measured("", logs, original, ids, first).perplexity

    yield number("perplexity", perplexity(original), transform="-", form="MLA")
    yield number("second half", perplexity(original, half - 1), transform="-", form="MLA")
    shared = dict(slices=p["slices"], calibration_ids=calibration, seed=context.seed)
    total, done = 1 + len(TRANSFORMS) * (2 + len(FORMS)), 0
    for transform in TRANSFORMS:
        for form, (mode, norm_factor, logit_factor) in {
            "rotated": ("mla_tp", "auto", "one"),
            **FORMS,
            "prefill MLA, lsq": ("tpla_pd", "inv_energy", "lsq"),
        }.items():
            made = convert_to_tpla(
                trained.model, trained.config.model, mode=mode, transform=transform, norm_factor=norm_factor,
                logit_factor=logit_factor, **shared,
            )  # fmt: skip
            logs = log_probabilities(made.model, ids, split=half if mode == "tpla_pd" else 0)
            if mode == "tpla_pd":
                yield number("second half", perplexity(logs, half - 1), transform=transform, form=form)
            else:
                yield number("perplexity", perplexity(logs), transform=transform, form=form)
            if form == "rotated":
                apart = np.max(np.abs(logs - original)) / np.max(np.abs(original))
                yield number("rotated, relative difference", apart, transform=transform)
            if form == CHOSEN:
                first = np.mean([energies[0] for energies in made.report.energies])
                yield number("energy of the first slice", first, transform=transform)
                again = log_probabilities(made.model, ids, split=half)
                yield number("second half", perplexity(again, half - 1), transform=transform, form="both, lsq")
            done += 1
            context.report("conversions", done, total)
    grouped = convert_to_tpla(
        trained.model, trained.config.model, mode="gla", transform="identity", logit_factor="one", **shared
    )
    yield number("perplexity", perplexity(log_probabilities(grouped.model, ids)), transform="identity", form="GLA")
    context.report("conversions", total, total)


def _form(transform: str, form: str) -> Any:
    return of("perplexity", transform=transform, form=form)


MLA, GLA = _form("-", "MLA"), _form("identity", "GLA")
SLICED = {transform: _form(transform, CHOSEN) for transform in TRANSFORMS}
LATE = {transform: of("second half", transform=transform, form="prefill MLA, lsq") for transform in TRANSFORMS}


def draw(record: Record) -> Figure:
    """What each form costs: perplexity over MLA's, less one, on a log scale; a colour per rotation."""
    forms, least = [*FORMS, "prefill MLA, lsq", "GLA"], 1e-1
    figure, drawn = drawing.axes(7.6, 0.8 + 0.36 * len(forms))
    for place, form in enumerate(forms):
        name = "second half" if form.startswith("prefill") else "perplexity"
        base = record.measured[of(name, transform="-", form="MLA")]
        for i, transform in enumerate(("identity",) if form == "GLA" else TRANSFORMS):
            cost = 100 * (record.measured[of(name, transform=transform, form=form)] / base - 1)
            height, colour = -place - (i - 1) * 0.22, plots.colour_of(i)
            drawn.plot(np.maximum(cost, least), [height] * len(cost), "o", color=colour, markersize=3, alpha=0.4)
            drawn.plot([max(cost.mean(), least)], [height], "D", color=colour, markersize=5)
    drawn.set_xscale("log")
    drawn.set_yticks([-float(place) for place in range(len(forms))], forms)
    drawn.tick_params(axis="y", labelcolor=plots.INK, length=0)
    drawn.set_ylim(0.6 - len(forms), 0.6)
    drawn.set_xlabel(f"perplexity above MLA's, % (at the left edge: {least:g} or less)", color=plots.SOFT)
    handles = [Line2D([], [], marker="D", linestyle="", color=plots.colour_of(i)) for i in range(len(TRANSFORMS))]
    drawn.legend(handles, TRANSFORMS, loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False, labelcolor=plots.INK)
    return figure


CLAIM = Claim(
    "tpla",
    "TPLA: each device keeps a slice of MLA's latent, and every head uses all of them",
    paper="2508.15881",
    says=(
        "A trained MLA model becomes TPLA without training, at a small cost in perplexity where cutting it into latent "
        "heads (GLA) destroys it; an orthogonal rotation before the cut makes the cost smaller, principal directions "
        "most; what the softmax loses weighs more than what the norm loses; and computing the prompt as MLA does "
        "(prefill/decode separation) gives back most of it."
    ),
    setting=(
        "A byte-level language model of 4 layers, width 128 and 8 heads on Python's standard library, with a tight "
        "latent of 16 channels, cut into 2 slices. Perplexity per byte on held-out rows of 128 bytes; the second half "
        "of a row follows a first half that is its prompt."
    ),
    run=run,
    defaults={"seeds": (0, 1, 2), "steps": 800, "rank": 16, "slices": 2, "rows": 256, "calibration": 64, "files": 0},
    smoke={"seeds": (0, 1), "steps": 4, "rows": 8, "calibration": 8, "files": 200},
    checks=(
        Check(
            "rotation is exact",
            "Folded and rotated, but not cut, the model is the original.",
            tuple(at_most(of("rotated, relative difference", transform=t), 1e-5) for t in TRANSFORMS),
            "paper, section 4.1",
            Rule.EXACT,
        ),
        Check(
            "order of rotations",
            "MLA is better than TPLA with principal directions, which is better than with Hadamard's rotation, which "
            "is better than without one.",
            ordered(MLA, SLICED["pca"], SLICED["hadamard"], SLICED["identity"]),
            "paper, figure 2",
        ),
        Check(
            "far from GLA",
            "Every TPLA is far better than the model cut into latent heads.",
            tuple(less(SLICED[t], GLA, times=1.5) for t in TRANSFORMS),
            "paper, table 1",
        ),
        Check(
            "the softmax loses more",
            "Slicing the norm alone costs less than slicing the softmax alone.",
            tuple(less(_form(t, "norm only, 1/e"), _form(t, "softmax only, lsq")) for t in TRANSFORMS),
            "paper, figure 2",
        ),
        Check(
            "the factor of the norm is 1 / e",
            "With principal directions the norm's factor is the reciprocal of a slice's energy, not the number of "
            "slices.",
            (less(_form("pca", "norm only, 1/e"), _form("pca", "norm only, g")),),
            "paper, condition 1 (its equation 25 names e itself)",
        ),
        Check(
            "prefill as MLA",
            "With the prompt computed as MLA, the continuation lies between MLA's and TPLA's.",
            tuple(
                comparison
                for t in TRANSFORMS
                for comparison in (
                    less(of("second half", transform="-", form="MLA"), LATE[t]),
                    less(LATE[t], of("second half", transform=t, form=CHOSEN)),
                )
            ),
            "paper, section 4.4 and table 1",
        ),
    ),
    tables=(
        Table("Perplexity of the whole row", "perplexity", rows="form", columns="transform"),
        Table("Perplexity of the second half", "second half", rows="form", columns="transform"),
        Table("Energy of the first slice", "energy of the first slice", rows="transform"),
    ),
    draw=draw,
)  # fmt: skip
