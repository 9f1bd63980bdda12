"""What the needle tasks share: questions answered, matched, and tabulated by context length and depth."""

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from evaluation import statistics
from evaluation.completion import clean, complete, string_match_all
from evaluation.contract import EvalContext, Grid, Metric, Units


def answer(context: EvalContext, samples: Sequence[Mapping[str, Any]], *, max_new_tokens: int) -> list[dict[str, Any]]:
    """One row per sample in lm-evaluation-harness's layout: prompt, answer, and `match`, the share of outputs found."""
    prompts = [sample["input"] + sample["answer_prefix"] for sample in samples]
    texts = complete(context, prompts, max_new_tokens=max_new_tokens)
    rows = []
    for sample, prompt, text in zip(samples, prompts, texts, strict=True):
        row = {
            "doc_id": sample["index"],
            "doc": dict(sample),
            "target": list(sample["outputs"]),
            "arguments": {"gen_args_0": {"arg_0": prompt, "arg_1": {"max_gen_toks": max_new_tokens}}},
            "resps": [[text]],
            "filtered_resps": [clean(text)],
            "filter": "none",
            "metrics": ["match"],
            "doc_hash": digest(prompt),
        }
        if not context.predict_only:
            row["match"] = string_match_all(text, sample["outputs"])
        rows.append(row)
    return rows


def mean_of(rows: Sequence[Mapping[str, Any]], key: str) -> Metric:
    """The mean of a per-sample number, with its error."""
    return Metric(*statistics.mean(np.array([row[key] for row in rows], np.float64)))


def units(rows: Sequence[Mapping[str, Any]], key: str) -> Units:
    """A per-sample number, for paired comparison."""
    return Units(key, [row["doc_hash"] for row in rows], [row[key] for row in rows], [1.0] * len(rows))


def by_place(
    rows: Sequence[Mapping[str, Any]], key: str, title: str, limits: tuple[float, float] | None = (0.0, 1.0)
) -> Grid:
    """Means of a per-sample number by depth (rows) and context length (columns)."""
    lengths = sorted({row["doc"]["context_length"] for row in rows})
    depths = sorted({row["doc"]["depth"] for row in rows})
    cells: dict[tuple[float, int], list[float]] = {}
    for row in rows:
        cells.setdefault((row["doc"]["depth"], row["doc"]["context_length"]), []).append(row[key])
    return Grid(
        title=title,
        rows=[f"{depth:g} %" for depth in depths],
        columns=[str(length) for length in lengths],
        values=[[float(np.mean(cells.get((depth, length), [np.nan]))) for length in lengths] for depth in depths],
        row_name="depth of the needle",
        column_name="context length, tokens",
        limits=limits,
    )


def even(first: float, last: float, count: int) -> list[float]:
    """`count` numbers from `first` to `last`, evenly apart."""
    return [float(value) for value in np.linspace(first, last, max(1, count))] if count > 1 else [float(last)]


def digest(text: str) -> str:
    """A name for a text that only this text has."""
    return hashlib.sha256(text.encode("utf-8")).hexdigest()
