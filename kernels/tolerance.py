"""How far a kernel may be from the exact result: one table for tests and for benchmarks, by the type of the inputs.

Errors of outputs and gradients are relative: root mean square of the difference over that of the exact array, which is
fair to gradients whatever their scale. The log-sum-exp is compared absolutely.
"""

from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np


class Tolerance(NamedTuple):
    """Limits for outputs and final states, for gradients, for log-sum-exps."""

    out: float
    gradient: float
    lse: float


TOLERANCES = {
    "float64": Tolerance(1e-12, 1e-11, 1e-12),
    "float32": Tolerance(2e-6, 5e-6, 1e-5),
    "float16": Tolerance(1e-3, 2e-3, 2e-3),
    "bfloat16": Tolerance(8e-3, 1.5e-2, 1e-2),
}


def tolerance(dtype: Any) -> Tolerance:
    """The limits for inputs of this type."""
    return TOLERANCES[jnp.dtype(dtype).name]


def relative_error(found: Any, exact: Any, floor: float = 0.0) -> float:
    """Root mean square of the difference over that of `exact`, or over `floor` where that is greater.

    NaN where `found` holds NaN, or where infinities differ. Empty arrays agree.
    """
    found, exact = (np.asarray(x, np.float64) for x in (found, exact))
    if found.shape != exact.shape:
        raise ValueError(f"shapes differ: {found.shape} and {exact.shape}")
    same = (found == exact) & np.isinf(exact)
    with np.errstate(invalid="ignore"):
        difference = np.where(same, 0, found - exact)
    size = np.sqrt(np.mean(np.where(np.isinf(exact), 0, exact) ** 2)) if exact.size else 0.0
    error = np.sqrt(np.mean(difference**2)) if exact.size else 0.0
    return float(error / max(size, floor)) if error else float(error)
