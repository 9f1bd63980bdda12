"""The lightning attention op: causal linear attention with a fixed decay per head, and its running state."""

import dataclasses
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float

from kernels import dispatch
from kernels.lightning import cost, limits, reference, xla
from kernels.lightning.decay import decay_rates
from kernels.lightning.timeline import timeline
from kernels.tokens import Tokens, sequence
from kernels.varying import alike

__all__ = ["Case", "IMPLEMENTATIONS", "cost", "decay_rates", "lightning_attention"]


@dataclasses.dataclass(frozen=True)
class Case:
    """The facts of one call that decide which implementations can do it."""

    q: tuple[int, ...]
    v: tuple[int, ...]
    dtype: Any
    chunk: int


IMPLEMENTATIONS = {
    "pallas_tpu": dispatch.Implementation(
        "pallas_tpu",
        dispatch.later("kernels.lightning.pallas_tpu", "lightning_attention"),
        limits.tpu_refusal,
        platforms=("tpu",),
        kernel=True,
        untried=True,
    ),
    "triton": dispatch.Implementation(
        "triton",
        dispatch.later("kernels.lightning.triton", "lightning_attention"),
        limits.gpu_refusal,
        platforms=("gpu",),
        kernel=True,
        untried=True,
    ),
    "xla": dispatch.Implementation("xla", xla.lightning_attention, lambda case: None),
    "reference": dispatch.Implementation("reference", reference.dense, lambda case: None),
    "recurrent": dispatch.Implementation("recurrent", reference.recurrent, lambda case: None),
}


def lightning_attention(
    q: Float[Array, "B T H D"],
    k: Float[Array, "B T H D"],
    v: Float[Array, "B T H E"],
    decay: Float[Array, "H"],
    *,
    tokens: Tokens | None = None,
    initial_state: Float[Array, "B H D E"] | None = None,
    chunk: int = 64,
    implementation: str | None = None,
) -> tuple[Float[Array, "B T H E"], Float[Array, "B H D E"]]:
    """o_t = sum_{u <= t} exp(-s (t - u)) (q_t . k_u) v_u (arXiv 2405.17381): no softmax, no scale, no denominator.

    `decay` holds the rates s >= 0 (`decay_rates` gives both published rules); it is a constant and gets no gradient.
    Returns the output in q's type and the state after the last token, sum_u exp(-s (T - u)) k_u v_u^T, float32
    (float64 for float64 inputs), which as `initial_state` continues the sequence exactly; both are differentiable in
    q, k, v and `initial_state`. Reverse mode only, except for `implementation="reference"` and `"recurrent"`.

    `tokens` (None: one document per row, nothing padded) tells documents and padding apart. Scores and states stop at
    a document's border: where the segment changes between valid tokens, and where index = start. An initial state
    belongs to the document of the first valid token, unless that token is its document's first by `start`. Padding
    gives output 0, contributes nothing whatever it holds (NaN included), and does not age the state: t - u counts
    valid tokens, so that right-padded prompts go on decoding exactly. A segment that comes back after another one is
    a new document.

    `chunk` changes speed, not results. Raises: `ValueError` for shapes or types that do not fit.
    """
    _check(q, k, v, decay, tokens, initial_state, chunk)
    chosen = dispatch.choose("lightning", implementation, IMPLEMENTATIONS, Case(q.shape, v.shape, q.dtype, chunk))
    wide = jnp.promote_types(q.dtype, jnp.float32)
    zeros = alike(jnp.zeros((q.shape[0], *q.shape[2:], v.shape[3]), wide), k, v)
    state = zeros if initial_state is None else initial_state.astype(wide) + zeros
    if tokens is None and chosen.name in ("reference", "recurrent"):
        tokens = sequence(q.shape[1])
    return chosen.function(q, k, v, decay, None if tokens is None else timeline(tokens), state, chunk)


def _check(q: Array, k: Array, v: Array, decay: Array, tokens: Any, initial_state: Any, chunk: int) -> None:
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.ndim != 4:
            raise ValueError(f"lightning_attention: {name} must be [batch, length, heads, width], not {x.shape}")
    if q.shape != k.shape or q.shape[:3] != v.shape[:3]:
        raise ValueError(f"lightning_attention: q {q.shape}, k {k.shape} and v {v.shape} do not fit each other")
    if not q.dtype == k.dtype == v.dtype or not jnp.issubdtype(q.dtype, jnp.floating):
        raise ValueError(f"lightning_attention: q, k, v must share one float type, not {q.dtype}, {k.dtype}, {v.dtype}")
    if decay.shape != q.shape[2:3]:
        raise ValueError(f"lightning_attention: decay {decay.shape} must hold one rate per head {q.shape[2:3]}")
    state_shape = (q.shape[0], q.shape[2], q.shape[3], v.shape[3])
    if initial_state is not None and initial_state.shape != state_shape:
        raise ValueError(f"lightning_attention: initial_state {initial_state.shape} must be {state_shape}")
    if tokens is not None and (tokens.length != q.shape[1] or tokens.index.shape[0] not in (1, q.shape[0])):
        raise ValueError(f"lightning_attention: tokens of shape {tokens.index.shape} do not fit q {q.shape}")
    if chunk < 1:
        raise ValueError(f"lightning_attention: chunk must be at least 1, not {chunk}")
