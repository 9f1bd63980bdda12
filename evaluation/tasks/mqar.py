"""Multi-query associative recall as a probe: a small model of the run's attention is trained on it, then tested.

Source: Arora et al., "Zoology", arXiv:2312.04927. The trained weights of the run play no part; its attention does.
"""

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax
from flax import nnx
from jaxtyping import Array, Bool, Float

from configs import fields, validate
from configs.sizes import resize
from data import DataError
from data.procedural import mqar as procedural
from data.procedural.mqar import MQAR
from evaluation import statistics
from evaluation.contract import EvalContext, EvaluationError, Grid, Metric, Task, TaskResult, Units

_TRAIN, _CHOOSE, _TEST = 0, 1, 2  # Streams of examples that never meet.


def run(context: EvalContext) -> TaskResult:
    """Trains one model per learning rate on a mixture of the (N, K) slices, keeps the best on examples drawn for that
    choice, and reports its accuracy on `test_examples` fresh ones per slice: `accuracy` over all, and one per slice.

    Chance is 2 / vocab_size. Errors are over examples, whose queries share a context.
    """
    if context.config is None:
        raise EvaluationError("task mqar trains a model of a config's attention: give a run or a config")
    params, slices = context.params, _slices(context)
    config = model_config(context.config, params, max(task.input_seq_len for task in slices))
    best, best_score, history = None, -1.0, {}
    for number, rate in enumerate(params["learning_rates"]):
        context.report(f"mqar, learning rate {rate:g}", number, len(params["learning_rates"]))
        graph, state = _train(context, config, slices, float(rate))
        correct = [_test(graph, state, task, params, (context.seed, _CHOOSE, i)) for i, task in enumerate(slices)]
        history[f"{rate:g}"] = score = float(np.mean([part.mean() for part in correct]))
        if score > best_score:
            best, best_score = (graph, state, rate), score
    graph, state, rate = best
    rows: list[dict[str, Any]] = []
    metrics = {}
    for number, task in enumerate(slices):
        right = _test(graph, state, task, params, (context.seed, _TEST, number))
        name = f"n{task.input_seq_len}_k{task.num_kv_pairs}"
        metrics[f"accuracy_{name}"] = Metric(*statistics.mean(right))
        rows += [
            {
                "doc_id": len(rows) + i,
                "doc": dataclasses.asdict(task),
                "doc_hash": f"{name}/{i}",
                "accuracy": float(value),
                "learning_rate": float(rate),
                "accuracy_when_chosen": history,
            }
            for i, value in enumerate(right)
        ]
    values = [row["accuracy"] for row in rows]
    metrics = {"accuracy": Metric(*statistics.mean(np.array(values)))} | metrics
    unit_ids = [row["doc_hash"] for row in rows]
    return TaskResult(
        "mqar",
        {} if context.predict_only else metrics,
        rows,
        effective=len(rows),
        original=len(rows),
        units=Units("accuracy", unit_ids, values, [1.0] * len(values)),
        grids={"accuracy": _grid(slices, metrics)} if len(slices) > 1 else {},
    )


def model_config(
    config: ml_collections.ConfigDict, params: Mapping[str, Any], length: int
) -> ml_collections.ConfigDict:
    """`config.model` shrunk to the probe: its attention with `heads` of width / heads, and everything else small."""
    whole = ml_collections.ConfigDict(config.copy_and_resolve_references())
    if params["width"] % params["heads"]:
        raise EvaluationError(f"mqar.heads={params['heads']} must divide mqar.width={params['width']}")
    model = whole.model
    model.update(width=params["width"], depth=params["depth"], max_length=length, vocab_size=params["vocab_size"])
    model.update(per_layer=(), remat="none", param_dtype="float32", compute_dtype="float32")
    model.mlp.width = 2 * params["width"]
    model.update(init_std=params["width"] ** -0.5, tie_embeddings=False)  # Recall is learned several times sooner so.
    model.attention = resize(model.attention, heads=params["heads"], head_dim=params["width"] // params["heads"])
    if "kv_heads" in model.attention:
        model.attention.kv_heads = math.gcd(model.attention.kv_heads, params["heads"])
    whole.data.length = length
    overrides = dict(part.partition("=")[::2] for part in params["overrides"])
    whole = fields.apply(whole, {f"model.{name}": value for name, value in overrides.items()})
    validate.check(whole)
    return whole.model


def _slices(context: EvalContext) -> list[MQAR]:
    """The (N, K) pairs, given as `64x4`."""
    params, slices = context.params, []
    for text in params["slices"]:
        n, cross, k = str(text).partition("x")
        if not cross or not n.isdecimal() or not k.isdecimal():
            raise EvaluationError(f"mqar.slices must be pairs such as 64x4 (length x key-value pairs), got {text!r}")
        try:
            slices.append(
                MQAR(
                    vocab_size=params["vocab_size"],
                    input_seq_len=int(n),
                    num_kv_pairs=int(k),
                    power_a=params["power_a"],
                    num_passes=params["num_passes"],
                    random_non_queries=params["random_non_queries"],
                )
            )
        except DataError as error:
            raise EvaluationError(f"task mqar: {error}") from error
    return slices


def _train(
    context: EvalContext, config: ml_collections.ConfigDict, slices: list[MQAR], rate: float
) -> tuple[nnx.GraphDef, nnx.State]:
    import models

    params, steps = context.params, context.params["steps"]
    model = models.build(config, vocab_size=params["vocab_size"], rngs=nnx.Rngs(context.seed))
    graph, state = nnx.split(model)
    slots, value = _optimizer(steps).init(state), jnp.zeros(())
    for number in range(steps):
        task = slices[number % len(slices)]
        batch = procedural.batch(task, params["batch_size"], (context.seed, _TRAIN, number))
        columns = {name: batch[name] for name in ("inputs", "targets", "weight")}
        state, slots, value = _step(graph, steps, rate, state, slots, columns)
        if number % 20 == 0:
            context.report(f"mqar, learning rate {rate:g}", number, steps)
    if not np.isfinite(float(value)):
        raise EvaluationError(f"task mqar: the loss is not finite at learning rate {rate:g}: leave that rate out")
    return graph, state


def _optimizer(steps: int) -> optax.GradientTransformation:
    """AdamW with warm-up and cosine decay around a peak of 1; steps are scaled by the learning rate afterwards."""
    schedule = optax.warmup_cosine_decay_schedule(0.0, 1.0, max(1, steps // 10), max(2, steps), 0.05)
    return optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(schedule, b2=0.95, weight_decay=0.1))


@functools.partial(jax.jit, static_argnums=(0, 1))
def _step(
    graph: nnx.GraphDef, steps: int, rate: float, state: nnx.State, slots: optax.OptState, batch: dict[str, Array]
) -> tuple[nnx.State, optax.OptState, Float[Array, ""]]:
    """One update; the rate is an argument, so that one program serves all learning rates."""

    def loss(state: nnx.State) -> Float[Array, ""]:
        logits = nnx.merge(graph, state)(batch["inputs"]).logits
        nll = optax.softmax_cross_entropy_with_integer_labels(logits, batch["targets"])
        return jnp.sum(nll * batch["weight"]) / jnp.sum(batch["weight"])

    value, gradients = jax.value_and_grad(loss)(state)
    updates, slots = _optimizer(steps).update(gradients, slots, state)
    return optax.apply_updates(state, jax.tree.map(lambda update: rate * update, updates)), slots, value


def _test(
    graph: nnx.GraphDef, state: nnx.State, task: MQAR, params: Mapping[str, Any], seed: tuple[int, ...]
) -> Float[np.ndarray, " examples"]:
    """The share of right answers in each of `test_examples` examples."""
    inputs, labels = procedural.generate(task, params["test_examples"], seed)
    asked = labels != procedural.IGNORED
    size = min(params["batch_size"], len(inputs))
    right = []
    for start in range(0, len(inputs), size):
        rows = inputs[start : start + size]
        padded = np.concatenate([rows, np.repeat(rows[-1:], size - len(rows), axis=0)])
        right.append(np.asarray(_correct(graph, state, padded, labels[start : start + size])[: len(rows)]))
    return (np.concatenate(right) & asked).sum(1) / asked.sum(1)


def _correct(graph: nnx.GraphDef, state: nnx.State, inputs: np.ndarray, labels: np.ndarray) -> Bool[np.ndarray, "B T"]:
    best = np.asarray(_argmax(graph, state, inputs))
    return best[: len(labels)] == labels


def _grid(slices: list[MQAR], metrics: dict[str, Metric]) -> Grid:
    lengths = sorted({task.input_seq_len for task in slices})
    pairs = sorted({task.num_kv_pairs for task in slices})
    values = [
        [metrics[name].value if (name := f"accuracy_n{n}_k{k}") in metrics else float("nan") for n in lengths]
        for k in pairs
    ]
    return Grid(
        "accuracy", [str(k) for k in pairs], [str(n) for n in lengths], values, "key-value pairs", "length", (0.0, 1.0)
    )


_argmax = jax.jit(
    lambda graph, state, inputs: jnp.argmax(nnx.merge(graph, state)(inputs).logits, axis=-1), static_argnums=0
)

TASKS = (
    Task(
        "mqar",
        run,
        output_type="probe",
        description="multi-query associative recall: trains and tests a small model of the run's attention",
        defaults={
            "vocab_size": 256,
            "slices": ("64x4", "64x8"),  # (N, K); the original recipe: 64x4, 128x8, 256x16, 512x64 at vocabulary 8192.
            "power_a": 0.01,
            "num_passes": 1,
            "random_non_queries": True,
            "width": 64,
            "depth": 2,
            "heads": 2,
            "steps": 900,
            "batch_size": 32,
            "learning_rates": (5e-3,),
            "test_examples": 256,
            "overrides": (),  # Fields of config.model, such as attention.window=16.
        },
    ),
)
