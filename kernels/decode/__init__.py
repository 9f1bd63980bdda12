"""The decode op: attention of one or a few new queries to a long cache of keys and values, contiguous or in pages."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from kernels import dispatch
from kernels.decode import cost, limits, reference, xla
from kernels.decode.call import Call, Inputs, check_rows
from kernels.decode.combine import combine
from kernels.varying import alike

__all__ = ["IMPLEMENTATIONS", "combine", "cost", "decode_attention", "paged_decode_attention"]


def _kernel(name: str, platform: str) -> dispatch.Implementation:
    run = dispatch.later(f"kernels.decode.{name}", "decode")
    return dispatch.Implementation(name, run, getattr(limits, name), (platform,), kernel=True, untried=True)


IMPLEMENTATIONS = {
    "pallas_tpu": _kernel("pallas_tpu", "tpu"),
    "mosaic_gpu": _kernel("mosaic_gpu", "gpu"),
    "triton": _kernel("triton", "gpu"),
    "xla": dispatch.Implementation("xla", xla.decode, lambda case: None),
    "reference": dispatch.Implementation("reference", reference.decode, limits.reference),
}


def decode_attention(
    q: Float[Array, "B T H D"],
    k: Float[Array, "B S Hk D"],
    v: Float[Array, "B S Hk Dv"] | None,
    lengths: Int[Array, "B"],
    *,
    value_width: int | None = None,
    starts: Int[Array, "B"] | None = None,
    window: int | None = None,
    sinks: Float[Array, "H"] | None = None,
    soft_cap: float = 0.0,
    scale: float | None = None,
    splits: int | None = None,
    implementation: str | None = None,
) -> tuple[Float[Array, "B T H Dv"], Float[Array, "B T H"]]:
    """Softmax attention of the last T tokens of each row to the row's cache (Flash-Decoding, Dao et al. 2023).

    Row b's cache holds keys in places starts[b] (0 by default) to lengths[b] - 1 of S. Query t stands at place
    lengths[b] - T + t and sees the keys up to its own place, with a `window` only the last so many of them. H query
    heads share Hk key/value heads (Hk divides H). `v` None: the values are the first `value_width` columns of the keys
    (latent attention: multi-query attention to one cached row per token, which is then read once).
    Scores are scale q.k (scale: D ** -0.5 by default), capped as soft_cap tanh(s / soft_cap) where soft_cap > 0;
    `sinks` adds exp(sinks[h]) to head h's denominators.

    Returns the output in q's type and the natural log of each row's denominator (sinks included), float32 (float64 for
    float64 inputs). A query that sees nothing (an empty slot: lengths[b] = 0) gives 0 and its sink, or -inf. Whatever a
    cache holds where a query may not look (NaN, inf) never reaches it. Parts of one cache, or shards of a sequence, are
    put together by `combine`.

    `splits` (None: chosen) is in how many parts each row's live keys are read at once; it changes speed, not results.
    Gradients of q, k, v and sinks form the whole map [B, H, T, S]: training belongs to `kernels.attention`.
    Raises: `ValueError` for shapes, types or options that do not fit; `NotImplementedError` where the named
    implementation cannot do the case.
    """
    _check("decode_attention", q, k, v, None, lengths, value_width, starts, window, sinks, splits)
    if q.shape[0] != k.shape[0]:
        raise ValueError(f"decode_attention: q {q.shape} and k {k.shape} differ in batch")
    options: dict[str, Any] = dict(value_width=value_width, starts=starts, window=window, sinks=sinks)
    return _run(q, k, v, None, lengths, implementation, soft_cap=soft_cap, scale=scale, splits=splits, **options)


def paged_decode_attention(
    q: Float[Array, "B T H D"],
    k_pages: Float[Array, "P page Hk D"],
    v_pages: Float[Array, "P page Hk Dv"] | None,
    block_table: Int[Array, "B n"],
    lengths: Int[Array, "B"],
    *,
    value_width: int | None = None,
    starts: Int[Array, "B"] | None = None,
    window: int | None = None,
    sinks: Float[Array, "H"] | None = None,
    soft_cap: float = 0.0,
    scale: float | None = None,
    splits: int | None = None,
    implementation: str | None = None,
) -> tuple[Float[Array, "B T H Dv"], Float[Array, "B T H"]]:
    """`decode_attention` to a cache in pages (Kwon et al. 2023, PagedAttention): place s of row b is place s % page of
    page block_table[b, s // page].

    Entries of the table whose pages hold no key that a query sees may be anything, out of range too. Arguments,
    results and errors are otherwise those of `decode_attention`.
    """
    name = "paged_decode_attention"
    _check(name, q, k_pages, v_pages, block_table, lengths, value_width, starts, window, sinks, splits)
    options: dict[str, Any] = dict(value_width=value_width, starts=starts, window=window, sinks=sinks)
    table = block_table.astype(jnp.int32)
    return _run(
        q, k_pages, v_pages, table, lengths, implementation, soft_cap=soft_cap, scale=scale, splits=splits, **options
    )


def _run(
    q: Array, k: Array, v: Array | None, table: Array | None, lengths: Array, implementation: str | None, *,
    value_width: int | None, starts: Array | None, window: int | None, sinks: Array | None, soft_cap: float,
    scale: float | None, splits: int | None,
) -> tuple[Array, Array]:  # fmt: skip
    width = value_width if v is None else v.shape[3]
    case = limits.Case(q.shape, k.shape, width, v is None, q.dtype, None if table is None else table.shape, splits)
    chosen = dispatch.choose("decode", implementation, IMPLEMENTATIONS, case)
    function = reference.decode if 0 in (*q.shape, *k.shape, case.slots, width) else chosen.function
    scale = q.shape[3] ** -0.5 if scale is None else float(scale)
    starts = jnp.zeros_like(lengths, jnp.int32) if starts is None else starts.astype(jnp.int32)
    inputs = alike(Inputs(q, k, v, table, lengths.astype(jnp.int32), starts, sinks), q, k, v, table, lengths)
    return _attend(function, Call(width, window or 0, float(soft_cap), scale, splits), inputs)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _attend(function: Callable[..., Any], call: Call, inputs: Inputs) -> tuple[Array, Array]:
    return function(call, inputs)


def _forward(function: Callable[..., Any], call: Call, inputs: Inputs) -> tuple[Any, Inputs]:
    return function(call, inputs), inputs


def _backward(function: Callable[..., Any], call: Call, inputs: Inputs, cotangents: Any) -> tuple[Inputs]:
    """Through the form by the book, with 0 in the place of what is no number: that has made NaN of the output already
    where it may be seen, and must not reach who may not see it."""
    k, v = (None if x is None else jnp.where(jnp.isfinite(x), x, 0) for x in (inputs.k, inputs.v))

    def by_the_book(q: Array, k: Array, v: Array | None, sinks: Array | None) -> tuple[Array, Array]:
        return reference.decode(call, inputs._replace(q=q, k=k, v=v, sinks=sinks))

    d_q, d_k, d_v, d_sinks = jax.vjp(by_the_book, inputs.q, k, v, inputs.sinks)[1](cotangents)
    return (Inputs(d_q, d_k, d_v, None, None, None, d_sinks),)


_attend.defvjp(_forward, _backward)


def _check(
    name: str, q: Array, k: Array, v: Array | None, table: Array | None, lengths: Array, value_width: Any, starts: Any,
    window: Any, sinks: Any, splits: Any,
) -> None:  # fmt: skip
    for what, x in (("q", q), ("k", k), ("v", v)):
        if x is not None and x.ndim != 4:
            raise ValueError(f"{name}: {what} must have four axes, the last two heads and width, not {x.shape}")
    if v is not None and k.shape[:3] != v.shape[:3]:
        raise ValueError(f"{name}: k {k.shape} and v {v.shape} differ in batch, length or heads")
    if q.shape[3] != k.shape[3]:
        raise ValueError(f"{name}: q {q.shape} and k {k.shape} differ in width")
    if k.shape[2] == 0 or q.shape[2] % k.shape[2]:
        raise ValueError(f"{name}: {k.shape[2]} key heads do not divide {q.shape[2]} query heads")
    types = {x.dtype for x in (q, k, v) if x is not None}
    if len(types) > 1 or not jnp.issubdtype(q.dtype, jnp.floating):
        raise ValueError(f"{name}: q, k and v must share one float type, not {', '.join(sorted(map(str, types)))}")
    if v is None and (value_width is None or not 0 < value_width <= k.shape[3]):
        raise ValueError(f"{name}: without v, value_width must be 1 to {k.shape[3]} columns of k, not {value_width}")
    if v is not None and value_width not in (None, v.shape[3]):
        raise ValueError(f"{name}: value_width {value_width} is not the width of v {v.shape}: leave it out")
    if sinks is not None and sinks.shape != q.shape[2:3]:
        raise ValueError(f"{name}: sinks must hold one logit per query head {q.shape[2:3]}, not {sinks.shape}")
    check_rows(name, q.shape[0], lengths, starts, table, window, splits)
