"""RULER's eight needle tasks and the pass key, generated for any tokenizer; nothing is downloaded.

Source: Hsieh et al., arXiv:2404.06654 (`data.procedural.needle`); Mohtashami and Jaggi, arXiv:2305.16300.
"""

import functools

import numpy as np

from data import DataError
from data.procedural import needle as procedural
from evaluation import retrieval
from evaluation.contract import EvalContext, EvaluationError, Metric, Task, TaskResult


def ruler(name: str, context: EvalContext) -> TaskResult:
    """One RULER task: `samples` questions per length; the metric of a length is called by the length, as in lm-eval.

    A length counts the prompt with the tokens of the answer. `average` is the mean over lengths.
    """
    params, samples = context.params, []
    for length in _lengths(name, context):
        try:
            made = procedural.generate(
                name,
                context.tokenizer,
                length=length,
                count=params["samples"],
                seed=params["seed"],
                new_tokens=params["max_new_tokens"],
            )
        except DataError as error:
            raise EvaluationError(f"task {name}: {error}") from error
        chosen = context.select(made)
        samples += [{**sample, "context_length": length} for _, sample in chosen]
    rows = retrieval.answer(context, samples, max_new_tokens=params["max_new_tokens"])
    total = params["samples"] * len(_lengths(name, context))
    if context.predict_only:
        return TaskResult(name, {}, rows, effective=len(rows), original=total)
    metrics = {
        str(length): retrieval.mean_of([row for row in rows if row["doc"]["context_length"] == length], "match")
        for length in _lengths(name, context)
    }
    metrics["average"] = _average(list(metrics.values()))
    return TaskResult(name, metrics, rows, effective=len(rows), original=total, units=retrieval.units(rows, "match"))


def passkey(context: EvalContext) -> TaskResult:
    """Five digits hidden at each depth of repeated noise; `match` is the share of keys named exactly."""
    params, samples = context.params, []
    for length in _lengths("passkey", context):
        try:
            made = procedural.passkey(
                context.tokenizer,
                length=length,
                depths=[depth for depth in params["depths"] for _ in range(params["samples"])],
                seed=params["seed"],
                new_tokens=params["max_new_tokens"],
            )
        except DataError as error:
            raise EvaluationError(f"task passkey: {error}") from error
        samples += made
    samples = [{**sample, "index": index} for index, sample in enumerate(samples)]
    chosen = [sample for _, sample in context.select(samples)]
    rows = retrieval.answer(context, chosen, max_new_tokens=params["max_new_tokens"])
    if context.predict_only:
        return TaskResult("passkey", {}, rows, effective=len(rows), original=len(samples))
    return TaskResult(
        "passkey",
        {"match": retrieval.mean_of(rows, "match")},
        rows,
        effective=len(rows),
        original=len(samples),
        units=retrieval.units(rows, "match"),
        grids={"match": retrieval.by_place(rows, "match", "pass key named")},
    )


def _lengths(name: str, context: EvalContext) -> list[int]:
    """The lengths asked for; 0 stands for the model's."""
    lengths = [int(length) or context.longest for length in context.params["lengths"]]
    for length in lengths:
        if not 0 < length <= context.longest:
            raise EvaluationError(
                f"task {name} was asked for a length of {length}, this model takes {context.longest} tokens"
            )
    return sorted(set(lengths))


def _average(parts: list[Metric]) -> Metric:
    errors = [part.stderr for part in parts]
    error = None if None in errors else float(np.sqrt(np.sum(np.square(errors))) / len(parts))
    return Metric(float(np.mean([part.value for part in parts])), error)


TASKS = (
    *(
        Task(
            name,
            functools.partial(ruler, name),
            output_type="generate_until",
            description=f"RULER: {settings.keys} key(s), {settings.values} value(s), {settings.haystack} haystack",
            defaults={"lengths": (0,), "samples": 500, "max_new_tokens": 128, "seed": 42},
            group="niah",
        )
        for name, settings in procedural.TASKS.items()
    ),
    Task(
        "passkey",
        passkey,
        output_type="generate_until",
        description="five digits hidden in repeated noise (heat map)",
        defaults={
            "lengths": (0,),
            "depths": (0.0, 25.0, 50.0, 75.0, 100.0),
            "samples": 4,
            "max_new_tokens": 8,
            "seed": 42,
        },
    ),
)
