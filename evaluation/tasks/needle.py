"""The classic needle in a haystack: a sentence at each depth of contexts of each length, asked for afterwards.

Source: Kamradt's test. Besides the answer found or not, the task measures how much more likely the needle makes its
answer, which tells something of models far too small to answer.
"""

import numpy as np

from data import DataError
from data.procedural import needle as procedural
from evaluation import retrieval
from evaluation.contract import EvalContext, EvaluationError, Task, TaskResult
from evaluation.scoring import Scorer, Window


def run(context: EvalContext) -> TaskResult:
    """Metrics: `match`, the share of answers that hold the key phrase; `gain`, in bits per byte of the key phrase:
    log2-probability of the phrase after the question with the needle in the context, less that without it.
    """
    params, tokenizer = context.params, context.tokenizer
    needle, question, expected = params["needle"], params["question"], params["answer"]
    buffer = max(params["max_new_tokens"], len(tokenizer.encode(" " + expected)) + 4)
    lengths = [int(length) for length in params["lengths"] if length]
    if not lengths:
        shortest = buffer + len(tokenizer.encode(f" {needle}  Question: {question} Answer:")) + 24
        if shortest > context.longest:
            raise EvaluationError(
                f"task needle takes at least {shortest} tokens, this model {context.longest}: give a shorter "
                "needle.needle, needle.question and needle.answer"
            )
        lengths = [int(length) for length in retrieval.even(shortest, context.longest, params["points"])]
    if max(lengths) > context.longest or min(lengths) < 1:
        raise EvaluationError(
            f"task needle needs contexts of {min(lengths)} to {max(lengths)} tokens, this model takes {context.longest}"
        )
    try:
        samples = procedural.grid(
            tokenizer,
            lengths=lengths,
            depths=params["depths"],
            needle=needle,
            question=question,
            answer=expected,
            buffer=buffer,
        )
    except DataError as error:
        raise EvaluationError(f"task needle: {error}") from error
    chosen = [sample for _, sample in context.select(samples)]
    rows = retrieval.answer(context, chosen, max_new_tokens=params["max_new_tokens"])
    if context.predict_only:
        return TaskResult("needle", {}, rows, effective=len(rows), original=len(samples))
    for row, gain in zip(rows, _gains(context, chosen, needle, " " + expected), strict=True):
        row["gain"] = gain
        row["metrics"] = ["match", "gain"]
    return TaskResult(
        "needle",
        {"match": retrieval.mean_of(rows, "match"), "gain": retrieval.mean_of(rows, "gain")},
        rows,
        effective=len(rows),
        original=len(samples),
        units=retrieval.units(rows, "gain"),
        grids={
            "match": retrieval.by_place(rows, "match", "key phrase found"),
            "gain": retrieval.by_place(rows, "gain", "gain of the answer, bits per byte", None),
        },
    )


def _gains(context: EvalContext, samples: list[dict], needle: str, answer: str) -> list[float]:
    tokenizer, windows = context.tokenizer, []
    ids = tokenizer.encode(answer)
    for sample in samples:
        for text in (sample["input"], sample["input"].replace(needle, "", 1)):
            stream = [tokenizer.bos_id, *tokenizer.encode(text + sample["answer_prefix"]), *ids]
            windows.append(Window(stream[:-1], stream[1:], len(ids)))
    length = max(len(window.inputs) for window in windows)
    scores = Scorer(context.model, batch_size=context.batch_size, layout=context.layout)(windows, length=length)
    bits = [float(values.astype(np.float64).sum() / np.log(2) / len(answer.encode("utf-8"))) for values, _ in scores]
    return [there - absent for there, absent in zip(bits[::2], bits[1::2], strict=True)]


TASKS = (
    Task(
        "needle",
        run,
        output_type="generate_until",
        description="a sentence hidden at each depth of contexts of each length (heat map)",
        defaults={
            "lengths": (0,),  # 0: `points` lengths up to the model's.
            "points": 5,
            "depths": (0.0, 25.0, 50.0, 75.0, 100.0),
            "max_new_tokens": 60,
            "needle": procedural.CLASSIC_NEEDLE,
            "question": procedural.CLASSIC_QUESTION,
            "answer": procedural.CLASSIC_ANSWER,
        },
    ),
)
