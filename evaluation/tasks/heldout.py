"""Held-out text: bits per byte and perplexities, every token scored once, errors over documents.

Source: the rolling log-likelihood of lm-evaluation-harness; bits per byte is comparable between tokenizers.
"""

import hashlib
from typing import Any

import numpy as np

from evaluation import statistics
from evaluation.contract import EvalContext, EvaluationError, Metric, Task, TaskResult, Units
from evaluation.scoring import Scorer, rolling_windows


def run(context: EvalContext) -> TaskResult:
    """Scores the held-out documents of the pipeline.

    Each document stands alone: BOS, then its tokens in windows of `context.length` (no end-of-document token, as the
    measured text ends there). Perplexities and bits per byte are ratios of sums over all documents, never averages of
    averages. A document is the unit of the standard errors: bootstrap over documents, or the delta method when
    `bootstrap_iterations` is 0.
    """
    if context.pipeline is None:
        raise EvaluationError("task heldout needs text: give a run, or a config whose config.data.sources exist")
    documents = list(context.pipeline.heldout_documents())
    if not documents:
        raise EvaluationError("there are no held-out documents: raise config.data.heldout_share or set heldout_sources")
    tokenizer, cap = context.tokenizer, context.params["max_tokens"]
    overlap = context.params["context"]
    if not 1 <= overlap <= context.length:
        raise EvaluationError(f"heldout.context must be between 1 and the window of {context.length}, got {overlap}")
    windows, owner, rows = [], [], []
    for index, document in context.select(documents):
        ids = tokenizer.encode(document.text)
        whole = not cap or len(ids) <= cap
        ids = ids if whole else ids[:cap]
        size = len(document.text.encode("utf-8")) if whole else tokenizer.byte_length(ids)
        if not ids or not size:
            continue
        own = rolling_windows(ids, tokenizer.bos_id, context.length, overlap)
        owner.extend([len(rows)] * len(own))
        windows.extend(own)
        rows.append(_row(index, document, len(ids), size))
    if not rows:
        raise EvaluationError("every held-out document that was selected is empty: raise the limit")
    scorer = Scorer(context.model, batch_size=context.batch_size, layout=context.layout)
    scores = scorer(windows, length=context.length, report=lambda done, total: context.report("heldout", done, total))
    nll, hits = np.zeros(len(rows)), np.zeros(len(rows))
    for document, (values, best) in zip(owner, scores, strict=True):
        nll[document] -= values.astype(np.float64).sum()
        hits[document] += best.sum()
    if not np.isfinite(nll).all():
        bad = rows[int(np.flatnonzero(~np.isfinite(nll))[0])]
        raise EvaluationError(
            f"the model gives no finite log-probability to held-out document {bad['name']}: its weights are damaged"
        )
    for row, loss, right in zip(rows, nll, hits, strict=True):
        row |= {"nll": float(loss), "bits_per_byte": float(loss / row["bytes"] / np.log(2)), "correct": int(right)}
    metrics = {} if context.predict_only else _metrics(context, rows, nll, hits)
    bits = Units(
        "bits_per_byte", [row["doc_hash"] for row in rows], list(nll / np.log(2)), [row["bytes"] for row in rows]
    )
    return TaskResult("heldout", metrics, rows, effective=len(rows), original=len(documents), units=bits)


def _row(index: int, document, tokens: int, size: int) -> dict:
    digest = hashlib.sha256(document.text.encode("utf-8")).hexdigest()
    return {
        "doc_id": index,
        "name": document.name,
        "source": document.source,
        "doc_hash": digest,
        "tokens": tokens,
        "bytes": size,
    }


def _metrics(context: EvalContext, rows: list[dict], nll: np.ndarray, hits: np.ndarray) -> dict[str, Metric]:
    tokens = np.array([row["tokens"] for row in rows], np.float64)
    sizes = np.array([row["bytes"] for row in rows], np.float64)

    transforms: dict[str, Any] = {  # Metric: (sums, units, value of the rate, its derivative there, higher is better).
        "bits_per_byte": (nll, sizes, lambda rate: rate / np.log(2), lambda rate: 1 / np.log(2), False),
        "byte_perplexity": (nll, sizes, np.exp, np.exp, False),
        "token_perplexity": (nll, tokens, np.exp, np.exp, False),
        "token_accuracy": (hits, tokens, lambda rate: rate, lambda rate: 1.0, True),
    }
    drawn = statistics.bootstrap(
        lambda nll, hits, tokens, sizes: np.stack(
            [
                nll.sum(-1) / sizes.sum(-1) / np.log(2),
                np.exp(nll.sum(-1) / sizes.sum(-1)),
                np.exp(nll.sum(-1) / tokens.sum(-1)),
                hits.sum(-1) / tokens.sum(-1),
            ],
            axis=-1,
        ),
        nll,
        hits,
        tokens,
        sizes,
        iterations=context.bootstrap_iterations,
        seed=context.seed,
    )
    metrics = {}
    for index, (name, (sums, units, transform, slope, higher)) in enumerate(transforms.items()):
        rate, error = statistics.ratio(sums, units)
        if error is not None:
            error = float(error * slope(rate)) if drawn is None else float(drawn[index])  # type: ignore[index]
        metrics[name] = Metric(float(transform(rate)), error, higher)
    return metrics


TASKS = (
    Task(
        "heldout",
        run,
        output_type="loglikelihood_rolling",
        description="bits per byte and perplexity of held-out documents",
        needs_text=True,
        defaults={"max_tokens": 0, "context": 1},  # First tokens of each document (0: all); least context of a token.
    ),
)
