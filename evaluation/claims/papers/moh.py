"""MoH (arXiv 2410.11842): tokens that take a few of their heads, against all heads, fewer heads, and heads dropped."""

import json
import pathlib
from collections.abc import Iterator
from typing import Any

import jax
import ml_collections
import numpy as np
from flax import nnx
from jaxtyping import Float, Int

from configs import fields
from configs.papers import moh as configs
from evaluation.claims import Check, Claim, ClaimContext, Rule, Table, Trained, at_least, at_most, less, number, of
from evaluation.claims.texts import loss, rows_of
from layers.hooks import Hooks, Tap

#: What is trained: name -> arguments of the config, changes of the attention.
FORMS: dict[str, tuple[str, dict[str, Any]]] = {
    "MHA, 8 heads": ("attention=mha", {}),
    "MHA, 6 heads": ("attention=mha,heads=6", {}),
    "MHA, 4 heads": ("attention=mha,heads=4", {}),
    "MoH, 75%": ("shared=2,routed=4", {}),
    "MoH, 50%": ("shared=2,routed=2", {}),
    "50%, one stage": ("shared=2,routed=2", {"two_stage": False}),
    "50%, none shared": ("shared=0,routed=4", {}),
    "50%, not balanced": ("shared=2,routed=2", {"balance": 0.0}),
}
MHA, MOH, SPARSE, DROPPED = "MHA, 8 heads", "MoH, 75%", "MoH, 50%", "MHA, half of the heads dropped"


def run(context: ClaimContext) -> Iterator[Any]:
    """One seed: every form from the same budget; MHA with heads taken away, and converted and trained on."""
    p = context.params
    trained = {}
    for done, (form, (text, changes)) in enumerate(FORMS.items()):
        context.report("trainings", done, len(FORMS) + 3)
        trained[form] = context.train(_config(text, p["steps"], p, changes))
    _, ids = rows_of(context, trained[MHA], p["rows"], 1)
    for form, one in trained.items():
        yield number("loss", loss(one.model, ids), "nats per byte", form=form)
        if "attention=mha" not in FORMS[form][0]:
            yield from _use(one.model, ids, form)
    yield number("loss", loss(_dropped(trained[MHA].model, context.seed), ids), "nats per byte", form=DROPPED)
    for done, (form, options) in enumerate((
        ("trained on", None), ("norms", {"router": "query_norm"}), ("new routers", {"router": "learned"})
    )):  # fmt: skip
        context.report("trainings", len(FORMS) + done, len(FORMS) + 3)
        folder = pathlib.Path(trained[MHA].config.run_dir)
        if options is not None:
            folder = context.convert(trained[MHA], to="moh", active=0.75, shared=0.5, report_rows=0, **options)
        went_on = context.train(_going_on(folder, p))
        for share, value in _course(went_on).items():
            yield number("training loss", value, "nats per byte", form=form, share=share)
        yield number("loss after going on", loss(went_on.model, ids), "nats per byte", form=form)
    context.report("trainings", len(FORMS) + 3, len(FORMS) + 3)


def _config(text: str, steps: int, p: Any, changes: dict[str, Any] | None = None) -> ml_collections.ConfigDict:
    config = configs.get_config(text)
    with config.unlocked():
        config.model.attention.update(changes or {})
        config.train.steps, config.data.max_files = steps, p["files"]
        config.optimizer.warmup_steps = max(1, steps // 20)
        config.checkpoint.every, config.eval.tasks, config.eval.sample_prompts = 0, (), ()
        config.log.tensorboard, config.log.every = False, 1
    return config


def _going_on(folder: pathlib.Path, p: Any) -> ml_collections.ConfigDict:
    """A short run from the weights in a run folder, whatever its attention."""
    config = _config("attention=mha", p["more"], p)
    stored = json.loads((folder / "config.json").read_text())
    config = fields.from_plain(fields.plain(config) | {"model": stored["model"]})
    with config.unlocked():
        config.train.init_from, config.optimizer.learning_rate = str(folder), 1e-3
    return config


def _course(trained: Trained) -> dict[str, float]:
    """The text's cross-entropy in the first step, and over the tenth of all steps that ends at a quarter or the end."""
    lines = (pathlib.Path(trained.config.run_dir) / "metrics.jsonl").read_text().splitlines()
    losses = [row["cross_entropy"] for row in map(json.loads, lines) if "cross_entropy" in row]
    window, count = max(1, len(losses) // 10), len(losses)
    ends = {"a quarter": max(1, count // 4), "all": count}
    return {"none": losses[0]} | {
        name: float(np.mean(losses[max(0, end - window) : end])) for name, end in ends.items()
    }


def _dropped(model: Any, seed: int) -> Any:
    """The network without a random half of each layer's heads: what the output projection takes from them is zero."""
    definition, state = nnx.split(model)
    rng = np.random.default_rng(seed)

    def without(path: tuple, leaf: jax.Array) -> jax.Array:
        if "attention.out.weight" not in ".".join(str(getattr(key, "key", key)) for key in path):
            return leaf
        weight = np.array(leaf).reshape(len(leaf), 8, -1, leaf.shape[-1])
        for layer in weight:
            layer[rng.permutation(8)[:4]] = 0
        return jax.numpy.asarray(weight.reshape(leaf.shape))

    return nnx.merge(definition, jax.tree_util.tree_map_with_path(without, state))


def _use(model: Any, ids: Int[np.ndarray, "N T"], form: str) -> Iterator[Any]:
    """How evenly the routed heads of each layer are chosen: entropy over its largest value, and the largest share."""
    definition, state = nnx.split(model)
    hooks = Hooks(taps={"gates": Tap()})
    aux = jax.jit(lambda state, ids: nnx.merge(definition, state)(ids, hooks=hooks).aux)(state, ids)
    gates = [np.asarray(value) for name, value in sorted(aux.items()) if name.startswith("tap/gates")]
    shares = _shares(np.concatenate([gate.reshape(-1, *gate.shape[-3:]) for gate in gates]), FORMS[form][0])
    entropy = -np.sum(np.where(shares > 0, shares * np.log(np.maximum(shares, 1e-30)), 0), axis=-1)
    yield number("entropy of the choices", np.mean(entropy) / np.log(shares.shape[1]), form=form)
    yield number("largest share", np.max(shares) * shares.shape[1], "times an even share", form=form)
    yield number("active heads", np.mean(np.concatenate([(gate > 0).ravel() for gate in gates])), form=form)


def _shares(gates: Float[np.ndarray, "L N T H"] | np.ndarray, text: str) -> Float[np.ndarray, "L R"]:
    """Of each layer's choices, the share that fell on each routed head."""
    shared = int(text.split("shared=")[1].split(",")[0])
    gates = gates.reshape(len(gates), -1, gates.shape[-1])[..., shared:] > 0
    counts = gates.sum(1)
    return counts / counts.sum(-1, keepdims=True)


def _form(form: str) -> Any:
    return of("loss", form=form)


CLAIM = Claim(
    "moh",
    "MoH: each token takes a few of its heads, and loses nothing",
    paper="2410.11842",
    says=(
        "With 50% to 90% of the heads active, chosen token by token with some heads shared by all, a model is as good "
        "as one with all heads, or better; shared heads and the two stages of routing both help; the load-balance "
        "loss keeps all heads in use; and a trained model goes over to it in a short training, best with a router "
        "that needs no parameters."
    ),
    setting=(
        "Byte-level language models of 4 layers, width 128 and 8 heads of 16 channels on Python's standard library, "
        "all trained for as many steps on the same batches; 2 heads shared, 4 or 2 of the other 6 chosen. Loss per "
        "byte on held-out rows of 128 bytes. Converted: 4 heads shared, 2 of the other 4 chosen by the norms of "
        "queries."
    ),
    run=run,
    defaults={"seeds": (0, 1, 2), "steps": 400, "more": 80, "rows": 128, "files": 0},
    smoke={"seeds": (0, 1), "steps": 3, "more": 3, "rows": 8, "files": 60},
    checks=(
        Check(
            "as good with 75%",
            "With 75% of the heads active the loss is within 1% of that with all heads.",
            less(_form(MOH), _form(MHA), times=0.99),
            "paper, tables 1 to 4; 1% is ours",
        ),
        Check(
            "better than heads dropped",
            "With 50% active it is far below that of the trained model without half of its heads.",
            less(_form(SPARSE), _form(DROPPED)),
            "paper, section 1",
        ),
        Check(
            "better than fewer heads",
            "With 50% or 75% active it is below that of a model with as many heads as are active.",
            (less(_form(SPARSE), _form("MHA, 4 heads")), less(_form(MOH), _form("MHA, 6 heads"))),
            "paper, sections 1 and 3",
        ),
        Check(
            "shared heads and two stages",
            "Without the second stage the loss is higher, and without shared heads higher than that.",
            (
                less(_form(SPARSE), _form("50%, one stage")),
                less(_form("50%, one stage"), _form("50%, none shared")),
            ),
            "paper, ablation (75.6, 78.3, 78.6)",
        ),
        Check(
            "balance",
            "With the load-balance loss choices are more even than without it.",
            less(
                of("entropy of the choices", form="50%, not balanced"), of("entropy of the choices", form=SPARSE)
            ),
            "paper, equation 6",
        ),
        Check(
            "converted",
            "Trained on for a while, the converted model is within 2% of the original trained on as long, and its "
            "first steps are better than with new routers.",
            (
                less(of("loss after going on", form="norms"), of("loss after going on", form="trained on"), times=0.98),
                less(
                    of("training loss", form="norms", share="a quarter"),
                    of("training loss", form="new routers", share="a quarter"),
                ),
            ),
            "paper, section 4.4 (95% of the quality within a tenth of the tokens); 2% is ours",
        ),
        Check(
            "active heads",
            "Of 8 heads 6 and 4 are active.",
            (
                at_most(of("active heads", form=MOH), 0.75), at_least(of("active heads", form=MOH), 0.75),
                at_most(of("active heads", form=SPARSE), 0.5), at_least(of("active heads", form=SPARSE), 0.5),
            ),
            "arithmetic",
            Rule.EXACT,
        ),
    ),
    tables=(
        Table("Loss on held-out text", "loss", rows="form"),
        Table("Choices of heads", ("entropy of the choices", "largest share", "active heads"), rows="form"),
        Table("A trained model converted and trained on: loss after a share of the steps", "training loss",
              rows="form", columns="share"),
        Table("Held-out text after it", "loss after going on", rows="form"),
    ),
)  # fmt: skip
