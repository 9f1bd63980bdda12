"""Held-out text in rows, for claims that convert a network: some to calibrate on, other documents to measure on."""

from typing import Any

import numpy as np
from jaxtyping import Int

from evaluation.claims.contract import ClaimContext, Trained
from evaluation.contract import EvaluationError
from models.conversion.report import log_probabilities


def rows_of(
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
            f"calibration={calibration} and rows={rows}: make these parameters smaller, or files larger"
        )
    first, second = (
        np.stack([part[i] for i in rng.permutation(len(part))[:count]])
        for part, count in zip(cut, (calibration, rows), strict=True)
    )
    return first.astype(np.int32), second.astype(np.int32)


def loss(model: Any, ids: Int[np.ndarray, "N T"]) -> float:
    """Mean negative log-likelihood per token, nats, of all but each row's first."""
    logs = log_probabilities(model, ids)
    return -float(np.mean(np.take_along_axis(logs, ids[:, 1:, None], axis=-1), dtype=np.float64))
