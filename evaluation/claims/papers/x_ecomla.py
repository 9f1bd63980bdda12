"""X-EcoMLA (arXiv 2503.11132): GQA made into MLA by singular values and distilled, against other ways to do it."""

import json
import pathlib
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from flax import nnx
from jaxtyping import Float

import data
from configs import fields
from configs.papers import x_ecomla
from data.procedural import preferences
from evaluation.claims import Check, Claim, ClaimContext, Rule, Table, Trained, at_least, at_most, less, number, of
from evaluation.claims.running import HOME
from evaluation.claims.texts import loss, rows_of
from kernels import tokens

#: What is trained besides singular values at every rank: name -> (rank, options of the conversion, of the training).
MIDDLE, LEAST = 32, 16
FORMS: dict[str, tuple[int, dict[str, Any], dict[str, Any]]] = {
    "random, 64": (64, {"init": "random"}, {}),
    "random, 16": (16, {"init": "random"}, {}),
    "text alone": (MIDDLE, {}, {"divergence": 0.0, "cross_entropy": 1.0}),
    "larger teacher": (LEAST, {}, {"teacher": True}),
    "latents normed": (MIDDLE, {"latent_norm": "rms"}, {}),
    "dynamic ranks": (MIDDLE, {"dynamic": True}, {}),
    "matched pairs": (MIDDLE, {"rope": "matched"}, {}),
}


def run(context: ClaimContext) -> Iterator[Any]:
    """One seed: a base and a larger teacher, students of every form from the same budget, and one tuned on pairs."""
    p = context.params
    base, teacher = (context.train(_stage(context, stage)) for stage in ("base", "teacher"))
    _, ids = rows_of(context, base, p["rows"], 1)
    for name, one in (("base", base), ("teacher", teacher)):
        yield number("loss", loss(one.model, ids), "nats per byte", form=name)
    forms = {str(rank): (rank, {}, {}) for rank in p["ranks"]} | FORMS
    for done, (form, (rank, conversion, objective)) in enumerate(forms.items()):
        context.report("students", done, len(forms) + 1)
        options = {"to": "x-ecomla", "kv_rank": rank, "report_rows": 0, "seed": context.seed, **conversion}
        if options.pop("dynamic", False):
            options |= {"kv_energy": _energy(base, rank), "divisor": 4}
        folder = context.convert(base, **options)
        student = context.train(_distilled(context, folder, base, teacher, objective))
        ranks = json.loads((folder / "conversion.json").read_text())["options"]["ranks"].values()
        yield number("cache", sum(kv + x_ecomla.HEAD_DIM // 2 for _, kv in ranks), "numbers per token", form=form)
        yield number("loss", loss(student.model, ids), "nats per byte", form=form)
        for share, value in _course(student).items():
            yield number("loss on the way", value, "nats per byte", form=form, share=share)
        if form == str(MIDDLE):
            yield from _preferred(context, base, student)
    context.report("students", len(forms) + 1, len(forms) + 1)


def _stage(context: ClaimContext, stage: str) -> ml_collections.ConfigDict:
    config = x_ecomla.get_config(f"stage={stage}")
    steps = {"base": "base_steps", "teacher": "base_steps", "distill": "steps", "dpo": "dpo_steps"}[stage]
    with config.unlocked():
        config.train.steps, config.data.max_files = context.params[steps], context.params["files"]
        config.optimizer.warmup_steps = max(1, config.train.steps // 20)
        config.data.batch_size = context.params["batch"]
        config.checkpoint.every, config.eval.tasks, config.eval.sample_prompts = 0, (), ()
        config.log.tensorboard, config.log.every = False, 1
        config.train.compilation_cache = str(HOME / "compiled")  # Most of the runs are the same programs.
    return config


def _distilled(
    context: ClaimContext, folder: pathlib.Path, base: Trained, teacher: Trained, objective: dict[str, Any]
) -> ml_collections.ConfigDict:
    config = _stage(context, "distill")
    with config.unlocked():
        config.model = fields.from_plain(json.loads((folder / "config.json").read_text())).model
        config.train.init_from = str(folder)
        config.objective.teacher = (teacher if objective.get("teacher") else base).config.run_dir
        config.objective.update({name: value for name, value in objective.items() if name != "teacher"})
        if not config.objective.divergence:  # Of the size that the divergence of a row has, so that both meet the clip.
            config.objective.cross_entropy *= config.data.length
    return config


def _energy(base: Trained, rank: int) -> float:
    """The share of energy whose ranks come nearest to `rank` on average, from below."""
    from models.conversion import upcycle

    shares = np.linspace(0.3, 0.999, 200)
    spectra = [np.cumsum(each) for each in upcycle(base.model, base.config.model, kv_rank=rank).report.spectra]
    ranks = [sum(-(-max(1, int(np.sum(each <= share))) // 4) * 4 for each in spectra) for share in shares]
    return float(shares[[total <= rank * len(spectra) for total in ranks]][-1])


def _course(trained: Trained) -> dict[str, float]:
    """The text's cross-entropy in the first step, and as a mean over the steps before each third ends: a tenth of all.
    The batches are those of every other form."""
    lines = (pathlib.Path(trained.config.run_dir) / "metrics.jsonl").read_text().splitlines()
    losses = [row["cross_entropy"] for row in map(json.loads, lines) if "cross_entropy" in row]
    window, count = max(1, len(losses) // 10), len(losses)
    ends = {"1/3": count // 3, "2/3": 2 * count // 3, "end": count}
    return {"start": losses[0]} | {
        name: float(np.mean(losses[max(0, end - window) : max(1, end)])) for name, end in ends.items()
    }


def _preferred(context: ClaimContext, base: Trained, student: Trained) -> Iterator[Any]:
    """The student tuned on pairs of a line that follows and one that does not, and what it makes of held-out pairs."""
    texts = [document.text for document in context.pipeline(base).heldout_documents()]
    path = pathlib.Path(base.config.run_dir) / "pairs.jsonl"
    options: dict[str, Any] = dict(kind="elsewhere", prompt_lines=2)
    preferences.write(preferences.generate(texts, context.params["pairs"], context.seed, **options), path)
    config = _stage(context, "dpo")
    with config.unlocked():
        config.model, config.train.init_from = student.config.model, student.config.run_dir
        config.data.sources, config.data.heldout_share = (str(path),), 0.25
    tuned = context.train(config)
    pairs = data.build(tuned.config.data, seed=0)
    before, after = (_answers(one.model, pairs) for one in (student, tuned))
    for name, logs in (("before", before), ("after", after)):
        yield number("preferred", np.mean(logs[:, 0] > logs[:, 1]), form=name)
    margin = (after - before)[:, 0] - (after - before)[:, 1]
    yield number("margin of log-probabilities gained", np.mean(margin), "nats")


def _answers(model: Any, pipeline: Any) -> Float[np.ndarray, "N 2"]:
    """The log-probability of both answers of every held-out pair."""
    definition, state = nnx.split(model)

    @jax.jit
    def logs(state: Any, ids: jax.Array, segment: jax.Array, targets: jax.Array, completion: jax.Array) -> jax.Array:
        found = jax.nn.log_softmax(nnx.merge(definition, state)(ids, tokens.packed(segment)).logits)
        return jnp.sum(completion * jnp.take_along_axis(found, targets[..., None], axis=-1)[..., 0], axis=-1)

    found = []
    for batch in pipeline.heldout_pairs(16):
        columns = (batch[name] for name in ("inputs", "segment", "targets", "completion"))
        each = np.asarray(logs(state, *(column.reshape(-1, column.shape[-1]) for column in columns))).reshape(-1, 2)
        found.append(each[batch["weight"] > 0])
    return np.concatenate(found).astype(np.float64)


def _form(form: object) -> Any:
    return of("loss", form=form)


def _way(form: str, share: str) -> Any:
    return of("loss on the way", form=form, share=share)


SHARES = ("start", "1/3", "2/3", "end")
CLAIM = Claim(
    "x-ecomla",
    "X-EcoMLA: a trained GQA model becomes MLA by singular values and a short distillation",
    paper="2503.11132",
    says=(
        "Made from the singular values of its own matrices, MLA with a much smaller cache recovers by distilling the "
        "original, and far better than from random weights; distilling is better than training on the text alone; a "
        "larger teacher helps most where the cache is smallest; no norm on the latents is better than one; ranks "
        "chosen by energy are about as good as equal ones; and preference tuning follows, with the distilled model for "
        "its reference."
    ),
    setting=(
        "Byte-level language models on Python's standard library: a base of 4 layers, width 128 and 8 query heads on 4 "
        "key/value heads of 32 (256 numbers per token and layer in its cache), a teacher of 8 layers and width 192. "
        "Latents of 64, 32 and 16 channels with 16 unrotated and 16 rotated channels of each head, all students "
        "trained for as many steps on the same batches. Loss per byte on held-out rows of 128 bytes. Pairs for "
        "preference tuning: the line that follows two lines of code, and another one of the same file."
    ),
    run=run,
    defaults={
        "seeds": (0, 1, 2), "base_steps": 400, "steps": 200, "dpo_steps": 100, "ranks": (64, 32, 16), "batch": 8,
        "rows": 128, "pairs": 2000, "files": 0,
    },
    smoke={"seeds": (0, 1), "base_steps": 3, "steps": 3, "dpo_steps": 3, "rows": 8, "pairs": 60, "files": 60},
    checks=(
        Check(
            "singular values",
            "From singular values the loss is lower than from random weights, from the first step to the last.",
            tuple(less(_way(str(rank), share), _way(f"random, {rank}", share)) for rank in (64, 16) for share in SHARES)
            + tuple(less(_form(rank), _form(f"random, {rank}")) for rank in (64, 16)),
            "paper, table 2 (53.31 against 49.44)",
        ),
        Check(
            "distilling",
            "Distilling gives a lower loss than as many steps on the text alone.",
            less(_form(MIDDLE), _form("text alone")),
            "paper, loss ablation (50.84 against 48.54)",
        ),
        Check(
            "a larger teacher",
            "At the smallest rank, a larger teacher gives a lower loss than the original as its own teacher.",
            less(_form("larger teacher"), _form(LEAST)),
            "paper, tables 2 and 3",
        ),
        Check(
            "no norm",
            "Latents without a norm give no higher loss than normed ones.",
            less(_form(MIDDLE), _form("latents normed")),
            "paper, section 4 (52.12 against 51.68)",
        ),
        Check(
            "dynamic ranks",
            "Ranks by energy, with a cache that is no larger, come within 2% of the loss of equal ranks.",
            (
                less(_form("dynamic ranks"), _form(MIDDLE), times=0.98),
                less(_form(MIDDLE), _form("dynamic ranks"), times=0.98),
            ),
            "paper, table 2 (53.12 and 53.31); 2% is ours",
        ),
        Check(
            "preference tuning",
            "On held-out pairs the better answer is the likelier one more often after tuning than before it.",
            (
                less(of("preferred", form="before"), of("preferred", form="after")),
                at_least(of("margin of log-probabilities gained"), 0.0),
            ),
            "paper, section 3.3",
        ),
        Check(
            "smaller caches",
            "Caches are 31%, 19% and 13% of the original's.",
            tuple(at_most(of("cache", form=rank), 4 * (rank + 16)) for rank in (64, 32, 16)),
            "arithmetic",
            Rule.EXACT,
        ),
    ),
    tables=(
        Table("Loss on held-out text, and the cache of a token", ("loss", "cache"), rows="form"),
        Table("Loss on the way, before each step", "loss on the way", rows="form", columns="share"),
        Table("Share of held-out pairs whose better answer is the likelier one", "preferred", rows="form"),
    ),
)  # fmt: skip
