"""Perplexity of local files, by word, byte and token, in the three ways that are reported.

Source: lm-evaluation-harness's wikitext task (rolling); evaluations of long contexts on PG-19 (the first c tokens of
each book; a sliding window of c tokens).
"""

import hashlib
import re
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from data import readers, sources
from data.errors import DataError
from evaluation import statistics
from evaluation.contract import EvalContext, EvaluationError, Metric, Task, TaskResult, Units
from evaluation.scoring import Scorer, Window, rolling_windows

MODES = ("rolling", "first", "sliding")


def run(context: EvalContext) -> TaskResult:
    """Scores every document of `files` (paths, folders, globs; .txt is one document, .jsonl and .parquet one a record).

    A window begins with BOS where its document begins, and holds `length` tokens (0: the model's longest; `first` must
    be told).
    - "rolling": windows that do not overlap in what they score, each token once; words are counted as
      `re.split(r"\\s+", text)` counts them, as the harness's wikitext does.
    - "first": the first `length` tokens of each document, or all where it has fewer; the words and bytes of those.
    - "sliding": windows of `length` that move by `stride`; after the first each scores its last `stride` tokens.

    Perplexities are of sums over all documents: exp(-LL / words), exp(-LL / bytes), exp(-LL / tokens), and
    -LL / bytes / ln 2. Words and bytes are those of the text as the file holds it. Raises EvaluationError.
    """
    params, tokenizer = context.params, context.tokenizer
    mode, length = params["mode"], params["length"] or context.longest
    if mode not in MODES:
        raise EvaluationError(f"perplexity.mode must be one of {', '.join(MODES)}, got {mode!r}")
    if mode == "first" and not params["length"]:
        raise EvaluationError("perplexity.mode=first needs perplexity.length, the tokens of each document to score")
    if not 1 <= length <= context.longest:
        raise EvaluationError(f"perplexity.length must be between 1 and the model's {context.longest}, got {length}")
    stride = params["stride"] if mode == "sliding" else length
    if not 1 <= stride <= length:
        raise EvaluationError(f"perplexity.stride must be between 1 and the window of {length}, got {stride}")
    documents = list(_documents(params["files"], params["text_field"]))
    windows: list[Window] = []
    owner: list[int] = []
    rows: list[dict[str, Any]] = []
    for index, (name, text) in context.select(documents):
        ids, size, words = tokenizer.encode(text), len(text.encode("utf-8")), len(re.split(r"\s+", text))
        if mode != "rolling":
            words = len(text.split())
        if mode == "first" and len(ids) > length:
            ids = ids[:length]
            size, words = tokenizer.byte_length(ids), len(tokenizer.decode(ids).split())
        if not ids:
            continue
        own = rolling_windows(ids, tokenizer.bos_id, length, length - stride + 1)
        windows += own
        owner += [len(rows)] * len(own)
        digest = hashlib.sha256(text.encode("utf-8")).hexdigest()
        counts = {"tokens": len(ids), "bytes": size, "words": words}
        rows.append({"doc_id": index, "name": name, "doc_hash": digest, **counts})
    if not rows:
        raise EvaluationError("every document of perplexity.files is empty")
    scorer = Scorer(context.model, batch_size=context.batch_size, layout=context.layout)
    scores = scorer(windows, length=length, report=lambda done, total: context.report("perplexity", done, total))
    losses = np.zeros(len(rows))
    for document, (values, _) in zip(owner, scores, strict=True):
        losses[document] -= values.astype(np.float64).sum()
    if not np.isfinite(losses).all():
        name = rows[int(np.flatnonzero(~np.isfinite(losses))[0])]["name"]
        raise EvaluationError(f"the model gives no finite log-probability to {name}: its weights are damaged")
    for row, loss in zip(rows, losses, strict=True):
        row["nll"] = float(loss)
    metrics = {} if context.predict_only else _metrics(context, losses, rows)
    ids = [row["doc_hash"] for row in rows]
    units = Units("bits_per_byte", ids, list(losses / np.log(2)), [row["bytes"] for row in rows])
    return TaskResult("perplexity", metrics, rows, effective=len(rows), original=len(documents), units=units)


def _documents(specs: Sequence[str], text_field: str) -> Iterator[tuple[str, str]]:
    """(name, text) of every document; EvaluationError for a record that cannot be read."""
    if not any(specs):
        raise EvaluationError("perplexity needs files: --params=perplexity.files=a.txt,b.jsonl")
    for spec in specs:
        try:
            found = sources.find(spec).files
        except DataError as error:
            raise EvaluationError(f"perplexity.files: {error}".replace("; correct config.data.sources", "")) from error
        for file in found:
            for record in readers.read(file, text_field):
                name = f"{file.name}:{record.number}" if record.number else file.name
                if record.reason:
                    reason = record.reason.replace("config.data.text_field", "perplexity.text_field")
                    raise EvaluationError(f"{name}: {reason}; repair or remove it")
                yield name, record.text.decode("utf-8")


def _metrics(context: EvalContext, losses: np.ndarray, rows: Sequence[dict[str, Any]]) -> dict[str, Metric]:
    metrics = {}
    for name, unit in (("word_perplexity", "words"), ("byte_perplexity", "bytes"), ("token_perplexity", "tokens")):
        counts = np.array([row[unit] for row in rows], np.float64)
        metrics[name] = _metric(context, losses, counts, np.exp, np.exp)
        if unit == "bytes":
            metrics["bits_per_byte"] = _metric(
                context, losses, counts, lambda rate: rate / np.log(2), lambda rate: 1 / np.log(2)
            )
    return metrics


def _metric(context: EvalContext, losses: np.ndarray, counts: np.ndarray, transform: Any, slope: Any) -> Metric:
    """`transform` of losses per count, with an error over documents by bootstrap or, without one, the delta method."""
    if not counts.sum():
        return Metric(float("nan"), None, False)
    rate, error = statistics.ratio(losses, counts)
    drawn = statistics.bootstrap(
        lambda losses, counts: transform(losses.sum(-1) / counts.sum(-1)),
        losses,
        counts,
        iterations=context.bootstrap_iterations,
        seed=context.seed,
    )
    if error is not None:
        error = float(error * slope(rate)) if drawn is None else float(drawn)
    return Metric(float(transform(rate)), error, False)


TASKS = (
    Task(
        "perplexity",
        run,
        output_type="loglikelihood_rolling",
        description="perplexity of local files: rolling, of the first tokens, or with a sliding window",
        defaults={"files": ("",), "mode": "rolling", "length": 0, "stride": 256, "text_field": "text"},
    ),
)
