"""The attention op: masked, scored softmax attention with its log-sum-exp, one signature for every implementation."""

import functools
import importlib
from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from kernels import dispatch
from kernels.attention import cudnn, fused, masks, reference, xla
from kernels.attention.capabilities import CAPABILITIES, Case
from kernels.attention.masks import Mask
from kernels.attention.scores import Places
from kernels.tokens import Tokens

__all__ = ["Case", "IMPLEMENTATIONS", "Places", "attention", "masks", "probabilities"]

_CAUSAL = masks.causal()


def _kernel(name: str, *platforms: str) -> dispatch.Implementation:
    """A kernel around which `kernels.attention.fused` does the rest; its module is imported when it is first used."""

    def function(*args: Any, **options: Any) -> tuple[Array, Array]:
        return fused.attention(importlib.import_module(f"kernels.attention.{name}"), *args, **options)

    return dispatch.Implementation(name, function, CAPABILITIES[name].refuses, platforms, kernel=True, untried=True)


IMPLEMENTATIONS = {
    "pallas_tpu": _kernel("pallas_tpu", "tpu"),
    "mosaic_gpu": _kernel("mosaic_gpu", "gpu"),
    "cudnn": dispatch.Implementation(
        "cudnn", cudnn.attention, CAPABILITIES["cudnn"].refuses, ("gpu",), kernel=True, unsuited=cudnn.unsuited
    ),
    "triton": _kernel("triton", "gpu"),
    "xla": dispatch.Implementation("xla", xla.attention, lambda case: None),
    "reference": dispatch.Implementation("reference", reference.attention, lambda case: None),
}


def attention(
    q: Float[Array, "B T H D"],
    k: Float[Array, "B S Hk D"],
    v: Float[Array, "B S Hk Dv"],
    *,
    mask: Mask = _CAUSAL,
    q_tokens: Tokens | None = None,
    k_tokens: Tokens | None = None,
    scale: float | Array | None = None,
    soft_cap: float = 0.0,
    sinks: Float[Array, "B|1 T|1 H"] | None = None,
    bias: Float[Array, "B|1 H|1 T|1 S"] | None = None,
    score_mod: Callable[..., Array] | None = None,
    score_arrays: Sequence[Array] = (),
    dropout: float = 0.0,
    dropout_seed: int | Int[Array, ""] = 0,
    implementation: str | None = None,
) -> tuple[Float[Array, "B T H Dv"], Float[Array, "B T H"]]:
    """Softmax attention (Vaswani et al. 2017) of H query heads on Hk key/value heads (Hk divides H).

    Scores are scale q.k (scale: D ** -0.5 by default), capped as soft_cap tanh(s / soft_cap) where soft_cap > 0, plus
    `bias`, passed through `score_mod(scores, places, *score_arrays)`, masked. `sinks` adds exp(sinks) to the
    denominators: [H], one number per head, or [B|1, T|1, H], one per row. All of these arrays are differentiable;
    `score_mod` itself may close over static values only. It sees blocks of the map, so it must go by the numbers in
    `places`, and stay finite wherever there are queries and keys. `dropout` is the share of probabilities set to zero
    (the others are divided by 1 - dropout; lse knows nothing of it): a pattern fixed by `dropout_seed`, batch row, head
    and pair, the same in every implementation.

    Returns the output in q's type and the natural log of each row's denominator (sinks included), float32 (float64 for
    float64 inputs); both are differentiable. A row that may attend to nothing gives 0 and -inf, and zero gradients;
    inf or NaN in keys or values that a row may not see never reaches it.

    `q_tokens`, `k_tokens` are what the mask reads; both absent means k.index = 0..S-1 and queries aligned to the end
    (q.index = S-T..S-1). `implementation` None chooses; a named one obeys or raises.

    Raises: `ValueError` for shapes that do not fit; `NotImplementedError` where the named implementation cannot.
    """
    _check(q, k, v, sinks, bias, q_tokens, k_tokens)
    if not 0 <= dropout < 1:
        raise ValueError(f"attention: dropout must be at least 0 and below 1, not {dropout}")
    q_tokens, k_tokens = _tokens(q, k, q_tokens, k_tokens)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    changes: dict[str, Any] = dict(
        mask=mask,
        q_tokens=q_tokens,
        k_tokens=k_tokens,
        soft_cap=soft_cap,
        bias=bias,
        score_mod=score_mod,
        score_arrays=tuple(score_arrays),
    )
    case = Case(
        q.shape,
        k.shape,
        v.shape,
        q.dtype,
        mask,
        (q_tokens, k_tokens),
        soft_cap,
        sinks is not None,
        bias is not None,
        score_mod is not None,
        dropout,
        functools.partial(fused.elementwise, q, k, **changes),
    )
    chosen = dispatch.choose("attention", implementation, IMPLEMENTATIONS, case)
    return chosen.function(q, k, v, scale=scale, sinks=sinks, dropout=dropout, dropout_seed=dropout_seed, **changes)


def probabilities(
    q: Float[Array, "B T H D"],
    k: Float[Array, "B S Hk D"],
    *,
    rows: Any = slice(None),
    heads: Any = slice(None),
    mask: Mask = _CAUSAL,
    q_tokens: Tokens | None = None,
    k_tokens: Tokens | None = None,
    scale: float | Array | None = None,
    soft_cap: float = 0.0,
    sinks: Float[Array, "B|1 T|1 H"] | None = None,
    bias: Float[Array, "B|1 H|1 T|1 S"] | None = None,
    score_mod: Callable[..., Array] | None = None,
    score_arrays: Sequence[Array] = (),
) -> Float[Array, "B heads rows S"]:
    """Rows of the attention map that `attention` would use, float32: only the given `rows` and `heads` are computed.

    `rows` and `heads` are slices or integer arrays (negative numbers count from the end). With `sinks` a row sums to
    less than 1. Differentiable in q and k. Raises as `attention` does.
    """
    _check(q, k, k, sinks, bias, q_tokens, k_tokens)
    q_tokens, k_tokens = _tokens(q, k, q_tokens, k_tokens)
    return reference.weights(
        q,
        k,
        mask=mask,
        q_tokens=q_tokens,
        k_tokens=k_tokens,
        scale=q.shape[-1] ** -0.5 if scale is None else scale,
        soft_cap=soft_cap,
        sinks=sinks,
        bias=bias,
        score_mod=score_mod,
        score_arrays=tuple(score_arrays),
        rows=_chosen("rows", rows, q.shape[1]),
        heads=_chosen("heads", heads, q.shape[2]),
    )[0]


def _fits(shape: tuple[int, ...], whole: tuple[int, ...]) -> bool:
    return len(shape) <= 4 and all(n in (1, full) for n, full in zip(shape[::-1], whole[::-1], strict=False))


def _chosen(name: str, which: Any, count: int) -> Array | None:
    """Numbers from 0 for a slice or a list of numbers; None for all."""
    if isinstance(which, slice):
        return None if which == slice(None) else jnp.arange(count)[which]
    if not isinstance(which, jnp.ndarray):
        which = np.atleast_1d(which)
        if ((which < -count) | (which >= count)).any():
            raise ValueError(f"attention probabilities: {name} {which.tolist()} reach beyond the {count} there are")
    return jnp.atleast_1d(which) % count


def _tokens(q: Array, k: Array, q_tokens: Tokens | None, k_tokens: Tokens | None) -> tuple[Tokens, Tokens]:
    """The given tokens, or plain sequences aligned at their ends; NumPy, so that their blocks are known in tracing."""
    if q_tokens is not None and k_tokens is not None:
        return q_tokens, k_tokens
    length, keys = q.shape[1], k.shape[1]
    index = np.arange(max(length, keys), dtype=np.int32)[None]
    return Tokens(index=index[:, :length] + (keys - length)), Tokens(index=index[:, :keys])


def _check(q: Array, k: Array, v: Array, sinks: Any, bias: Any, q_tokens: Any, k_tokens: Any) -> None:
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.ndim != 4:
            raise ValueError(f"attention: {name} must be [batch, length, heads, width], not of shape {x.shape}")
    if k.shape[:3] != v.shape[:3]:
        raise ValueError(f"attention: k {k.shape} and v {v.shape} differ in batch, length or heads")
    if q.shape[0] != k.shape[0] or q.shape[3] != k.shape[3]:
        raise ValueError(f"attention: q {q.shape} and k {k.shape} differ in batch or width")
    if k.shape[2] == 0 or q.shape[2] % k.shape[2]:
        raise ValueError(f"attention: {k.shape[2]} key heads do not divide {q.shape[2]} query heads")
    if not jnp.issubdtype(q.dtype, jnp.floating):
        raise ValueError(f"attention: q must be floating point, not {q.dtype}")
    if not q.dtype == k.dtype == v.dtype:
        raise ValueError(f"attention: q, k and v must share one type, not {q.dtype}, {k.dtype}, {v.dtype}")
    if sinks is not None:
        heads, rows = q.shape[2:3], sinks.ndim == 3 and _fits(sinks.shape, q.shape[:3])
        if sinks.shape[-1:] != heads or not (rows or sinks.ndim == 1):
            raise ValueError(
                f"attention: sinks must hold one logit per query head {heads}, or [B|1, T|1, H]; not {sinks.shape}"
            )
    shape = (q.shape[0], q.shape[2], q.shape[1], k.shape[1])
    if bias is not None and not _fits(bias.shape, shape):
        raise ValueError(f"attention: bias {bias.shape} does not broadcast to {shape}")
    if (q_tokens is None) != (k_tokens is None):
        raise ValueError("attention: give q_tokens and k_tokens both, or neither")
    for name, tokens, x in (("q", q_tokens, q), ("k", k_tokens, k)):
        if tokens is not None and (tokens.length != x.shape[1] or tokens.index.shape[0] not in (1, x.shape[0])):
            raise ValueError(f"attention: {name}_tokens of shape {tokens.index.shape} do not fit {name} {x.shape}")
