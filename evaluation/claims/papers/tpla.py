"""TPLA (arXiv 2508.15881): what slicing the latent of a trained MLA costs, by rotation, by factor and by mode."""

from collections.abc import Iterator
from typing import Any

import numpy as np
from jaxtyping import Int
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
    Trained,
    at_most,
    drawing,
    less,
    number,
    of,
    ordered,
)
from evaluation.claims.record import Record
from evaluation.contract import EvaluationError
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
CHOSEN, PREFILL = "both, lsq", "prefill MLA, lsq"
RANKS = (16, 64)


def run(context: ClaimContext) -> Iterator[Any]:
    """One seed: trains MLA, converts it in every way, and measures each on the same held-out text; for every rank."""
    ranks = context.params["ranks"]
    for done, rank in enumerate(ranks):
        yield from _of_rank(context, rank, done, len(ranks))


def _of_rank(context: ClaimContext, rank: int, before: int, ranks: int) -> Iterator[Any]:
    p = context.params
    config = tpla.get_config(f"rank={rank}")
    with config.unlocked():
        config.train.steps, config.data.max_files = p["steps"], p["files"]
        config.optimizer.warmup_steps = max(1, p["steps"] // 20)
        config.checkpoint.every, config.eval.tasks, config.eval.sample_prompts = 0, (), ()
    trained = context.train(config)
    calibration, ids = _texts(context, trained, p["rows"], p["calibration"])
    original = log_probabilities(trained.model, ids)
    half = ids.shape[1] // 2
    forms = {"rotated": ("mla_tp", "auto", "one"), **FORMS, PREFILL: ("tpla_pd", "inv_energy", "lsq")}
    total = 1 + len(TRANSFORMS) * len(forms)
    done = total * before

    def perplexity(logs: np.ndarray, transform: str, form: str, late: bool = False) -> Any:
        value = measured("", logs, original, ids, half - 1 if late else 0).perplexity
        return number("second half" if late else "perplexity", value, transform=transform, form=form, rank=rank)

    def converted(**options: Any) -> Any:
        given = dict(slices=p["slices"], calibration_ids=calibration, seed=context.seed)
        return convert_to_tpla(trained.model, trained.config.model, **given, **options)

    yield perplexity(original, "-", "MLA")
    yield perplexity(original, "-", "MLA", late=True)
    for transform in TRANSFORMS:
        for form, (mode, norm_factor, logit_factor) in forms.items():
            made = converted(mode=mode, transform=transform, norm_factor=norm_factor, logit_factor=logit_factor)
            logs = log_probabilities(made.model, ids, split=half if form == PREFILL else 0)
            yield perplexity(logs, transform, form, late=form == PREFILL)
            if form == "rotated":
                apart = np.max(np.abs(logs - original)) / np.max(np.abs(original))
                yield number("rotated, relative difference", apart, transform=transform, rank=rank)
            if form == CHOSEN:
                first = np.mean([energies[0] for energies in made.report.energies])
                yield number("energy of the first slice", first, transform=transform, rank=rank)
                yield perplexity(log_probabilities(made.model, ids, split=half), transform, form, late=True)
            done += 1
            context.report("conversions", done, total * ranks)
    grouped = converted(mode="gla", transform="identity", logit_factor="one")
    yield perplexity(log_probabilities(grouped.model, ids), "identity", "GLA")
    context.report("conversions", done + 1, total * ranks)


def _texts(
    context: ClaimContext, trained: Trained, rows: int, calibration: int
) -> tuple[Int[np.ndarray, "C T"], Int[np.ndarray, "N T"]]:
    """Rows of held-out text as long as those of training: for calibration, and, from other documents, for measuring."""
    length = trained.config.data.length
    cut: tuple[list, list] = [], []
    for place, document in enumerate(context.pipeline(trained).heldout_documents()):
        ids = np.asarray(trained.tokenizer.encode(document.text))
        ids = ids[: len(ids) // length * length].reshape(-1, length)
        cut[place % 2].extend(ids)
    rng = np.random.default_rng(0)  # The same text for every seed.
    if len(cut[0]) < calibration or len(cut[1]) < rows:
        raise EvaluationError(
            f"the held-out text has {len(cut[0])} and {len(cut[1])} rows of {length} tokens, too few for "
            f"tpla.calibration={calibration} and tpla.rows={rows}: make these smaller, or tpla.files larger"
        )
    first, second = (
        np.stack([part[i] for i in rng.permutation(len(part))[:count]])
        for part, count in zip(cut, (calibration, rows), strict=True)
    )
    return first.astype(np.int32), second.astype(np.int32)


def _of(transform: str, form: str, rank: int, name: str = "perplexity") -> Any:
    return of(name, transform=transform, form=form, rank=rank)


def _checks(rank: int) -> tuple[Check, ...]:
    """The same for every rank."""
    mla, gla = _of("-", "MLA", rank), _of("identity", "GLA", rank)
    sliced = {transform: _of(transform, CHOSEN, rank) for transform in TRANSFORMS}
    late_mla = _of("-", "MLA", rank, "second half")
    return (
        Check(
            f"rotation is exact, {rank} channels",
            "Folded and rotated, but not cut, the model is the original.",
            tuple(at_most(of("rotated, relative difference", transform=t, rank=rank), 1e-5) for t in TRANSFORMS),
            "paper, section 4.1",
            Rule.EXACT,
        ),
        Check(
            f"order of rotations, {rank} channels",
            "MLA is better than TPLA with principal directions, which is better than with Hadamard's rotation, which "
            "is better than without one.",
            ordered(mla, sliced["pca"], sliced["hadamard"], sliced["identity"]),
            "paper, figure 2",
        ),
        Check(
            f"far from GLA, {rank} channels",
            "Every TPLA is far better than the model cut into latent heads.",
            tuple(less(sliced[t], gla, times=1.5) for t in TRANSFORMS),
            "paper, table 1",
        ),
        Check(
            f"the softmax loses more, {rank} channels",
            "Slicing the norm alone costs less than slicing the softmax alone.",
            tuple(less(_of(t, "norm only, 1/e", rank), _of(t, "softmax only, lsq", rank)) for t in TRANSFORMS),
            "paper, figure 2",
        ),
        Check(
            f"the factor of the norm is 1 / e, {rank} channels",
            "With principal directions the norm's factor is the reciprocal of a slice's energy, not the number of "
            "slices.",
            (less(_of("pca", "norm only, 1/e", rank), _of("pca", "norm only, g", rank)),),
            "paper, condition 1 (its equation 25 names e itself)",
        ),
        Check(
            f"prefill as MLA, {rank} channels",
            "With the prompt computed as MLA, the continuation lies between MLA's and TPLA's.",
            tuple(
                comparison
                for t in TRANSFORMS
                for comparison in (
                    less(late_mla, _of(t, PREFILL, rank, "second half")),
                    less(_of(t, PREFILL, rank, "second half"), _of(t, CHOSEN, rank, "second half")),
                )
            ),
            "paper, section 4.4 and table 1",
        ),
    )


def draw(record: Record) -> Figure:
    """What each form costs: perplexity over MLA's, less one, on a log scale; a colour per rotation."""
    forms = ["norm only, 1/e", "norm only, g", *[form for form in FORMS if form.startswith("softmax")]]
    forms += [form for form in FORMS if form.startswith("both")] + [PREFILL, "GLA"]
    rows = [(rank, form) for rank in RANKS for form in forms]
    figure, drawn = drawing.axes(7.6, 0.6 + 0.3 * len(rows))
    least = 1e-2
    for place, (rank, form) in enumerate(rows):
        name = "second half" if form == PREFILL else "perplexity"
        base = record.measured[_of("-", "MLA", rank, name)]
        for i, transform in enumerate(("identity",) if form == "GLA" else TRANSFORMS):
            cost = 100 * (record.measured[_of(transform, form, rank, name)] / base - 1)
            height, colour = -place - (i - 1) * 0.22, plots.colour_of(i)
            drawn.plot(np.maximum(cost, least), [height] * len(cost), "o", color=colour, markersize=3, alpha=0.4)
            drawn.plot([max(cost.mean(), least)], [height], "D", color=colour, markersize=5)
    drawn.set_xscale("log")
    drawn.set_yticks([-float(place) for place in range(len(rows))], [f"{form}  ({rank})" for rank, form in rows])
    drawn.tick_params(axis="y", labelcolor=plots.INK, length=0)
    drawn.set_ylim(0.6 - len(rows), 0.6)
    drawn.axhline(0.5 - len(forms), color=plots.LINE, linewidth=1.2)
    drawn.set_xlabel(f"perplexity above MLA's, % (at the left edge: {least} or less)", color=plots.SOFT)
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
        "Byte-level language models of 4 layers, width 128 and 8 heads on Python's standard library, with a tight "
        "latent of 16 channels and a roomy one of 64, cut into 2 slices. Perplexity per byte on held-out rows of 128 "
        "bytes; the second half of a row follows a first half that is its prompt."
    ),
    run=run,
    defaults={"seeds": (0, 1, 2), "steps": 800, "ranks": RANKS, "slices": 2, "rows": 256, "calibration": 64,
              "files": 0},
    smoke={"seeds": (0, 1), "steps": 4, "rows": 8, "calibration": 8, "files": 200},
    checks=tuple(check for rank in RANKS for check in _checks(rank)),
    tables=tuple(
        Table(f"{title}, {rank} channels", name, rows=rows, columns=columns, where={"rank": str(rank)})
        for rank in RANKS
        for title, name, rows, columns in (
            ("Perplexity of the whole row", "perplexity", "form", "transform"),
            ("Perplexity of the second half", "second half", "form", "transform"),
            ("Energy of the first slice", "energy of the first slice", "transform", ""),
        )
    ),
    draw=draw,
    version=2,
)  # fmt: skip
