"""The latent decode op: attention of a few new queries to a long cache of latents, kept in eight bits."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Int

from kernels import dispatch
from kernels.decode import decode_attention, paged_decode_attention
from kernels.decode.call import Call, check_rows, seen
from kernels.latent_decode import cost, limits, reference, xla
from kernels.latent_decode.call import Inputs
from kernels.latent_decode.quantise import MOST, Quantised, dequantise, quantise
from kernels.varying import alike

__all__ = [
    "IMPLEMENTATIONS", "Quantised", "cost", "dequantise", "latent_decode", "paged_latent_decode", "quantise",
]  # fmt: skip


def _kernel(name: str, platform: str) -> dispatch.Implementation:
    run = dispatch.later(f"kernels.latent_decode.{name}", "decode")
    return dispatch.Implementation(name, run, getattr(limits, name), (platform,), kernel=True, untried=True)


IMPLEMENTATIONS = {
    "pallas_tpu": _kernel("pallas_tpu", "tpu"),
    "mosaic_gpu": _kernel("mosaic_gpu", "gpu"),
    "triton": _kernel("triton", "gpu"),
    "xla": dispatch.Implementation("xla", xla.decode, lambda case: None),
    "reference": dispatch.Implementation("reference", reference.decode, limits.reference),
}


def latent_decode(
    q_latent: Float[Array, "B T H C"],
    q_rope: Float[Array, "B T H R"],
    latent: Float[Array, "B S *g C"] | Quantised,
    rope: Float[Array, "B S R"],
    lengths: Int[Array, "B"],
    *,
    scale: float,
    starts: Int[Array, "B"] | None = None,
    window: int | None = None,
    soft_cap: float = 0.0,
    splits: int | None = None,
    implementation: str | None = None,
) -> tuple[Float[Array, "B T H C"], Float[Array, "B T H"]]:
    """Softmax attention of the last T tokens of each row to the row's cache of latents (DeepSeek-V2, arXiv 2405.04434,
    section 2.1.2, with the up-projections absorbed into queries and outputs).

    Token s has a latent c[s] that all heads share, key and value in one, and a rotary key r[s]: its scores are
    scale (q_latent.c[s] + q_rope.r[s]), its value is c[s]. With a `Quantised` latent ([B, S, C] and [B, S, C/block])
    that is what is read, and multiplied out on the way; the rotary key stays as it is, in the queries' type (the cache
    of FlashMLA). With a slice axis, latents [B, S, g, C] (and scales alike), query head j H/g + i reads slice j, and
    the rotary key is that of all slices: what TPLA's devices do, one slice each (arXiv 2508.15881).

    A latent that is a plain array is joined with its rotary key, a copy of the cache, and given to `kernels.decode`:
    who keeps joined rows [c, r] calls `decode_attention(q, rows[:, :, None], None, lengths, value_width=C)` instead.

    Lengths, starts, window, soft_cap, splits, what a query sees and what it gives (output in its type and natural log
    of its denominator, 0 and -inf where it sees nothing) are those of `kernels.decode.decode_attention`. What a cache
    holds where a query may not look never reaches it.

    Forward only: a quantised cache is for generation. `NotImplementedError` where a derivative is asked for.
    Raises: `ValueError` for shapes, types or options that do not fit; `NotImplementedError` where the named
    implementation cannot do the case.
    """
    options: dict[str, Any] = dict(scale=scale, starts=starts, window=window, soft_cap=soft_cap, splits=splits)
    return _run("latent_decode", q_latent, q_rope, latent, rope, None, lengths, implementation, **options)


def paged_latent_decode(
    q_latent: Float[Array, "B T H C"],
    q_rope: Float[Array, "B T H R"],
    latent_pages: Float[Array, "P page *g C"] | Quantised,
    rope_pages: Float[Array, "P page R"],
    block_table: Int[Array, "B n"],
    lengths: Int[Array, "B"],
    *,
    scale: float,
    starts: Int[Array, "B"] | None = None,
    window: int | None = None,
    soft_cap: float = 0.0,
    splits: int | None = None,
    implementation: str | None = None,
) -> tuple[Float[Array, "B T H C"], Float[Array, "B T H"]]:
    """`latent_decode` to a cache in pages: place s of row b is place s % page of page block_table[b, s // page].

    Entries of the table whose pages hold no token that a query sees may be anything, out of range too. Arguments,
    results and errors are otherwise those of `latent_decode`.
    """
    options: dict[str, Any] = dict(scale=scale, starts=starts, window=window, soft_cap=soft_cap, splits=splits)
    return _run(
        "paged_latent_decode", q_latent, q_rope, latent_pages, rope_pages, block_table, lengths, implementation,
        **options,
    )  # fmt: skip


def _run(
    name: str, q: Array, q_rope: Array, latent: Array | Quantised, rope: Array, table: Array | None, lengths: Array,
    implementation: str | None, *, scale: float, starts: Array | None, window: int | None, soft_cap: float,
    splits: int | None,
) -> tuple[Array, Array]:  # fmt: skip
    _check(name, q, q_rope, latent, rope, table, lengths, starts, window, splits)
    if not isinstance(latent, Quantised):
        latent = latent if latent.ndim == 4 else latent[:, :, None]
        query, rows = reference.joined(q, q_rope, latent, rope)
        options: dict[str, Any] = dict(value_width=q.shape[3], scale=scale, starts=starts, window=window)
        options |= dict(soft_cap=soft_cap, splits=splits, implementation=implementation)
        if table is None:
            return decode_attention(query, rows, None, lengths, **options)
        return paged_decode_attention(query, rows, None, table, lengths, **options)
    values, scales = (x if x.ndim == 4 else x[:, :, None] for x in latent)
    tables = None if table is None else table.shape
    case = limits.Case(q.shape, rope.shape[2], values.shape, scales.shape[3], q.dtype, values.dtype, tables, splits)
    chosen = dispatch.choose("latent_decode", implementation, IMPLEMENTATIONS, case)
    function = reference.decode if 0 in (*q.shape, *values.shape, case.slots, case.rope_width) else chosen.function
    starts = jnp.zeros_like(lengths, jnp.int32) if starts is None else starts.astype(jnp.int32)
    table = None if table is None else table.astype(jnp.int32)
    inputs = Inputs(q, q_rope, values, scales, rope, table, lengths.astype(jnp.int32), starts)
    call = Call(q.shape[3], window or 0, float(soft_cap), float(scale), splits)
    inputs = alike(jax.tree.map(jnp.asarray, inputs), q, values, rope, table, lengths)
    return _attend(function, call, inputs)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def _attend(function: Callable[..., Any], call: Call, inputs: Inputs) -> tuple[Array, Array]:
    return function(call, inputs)


@_attend.defjvp
def _derivative(function: Any, call: Any, primals: Any, tangents: Any) -> Any:
    raise NotImplementedError(
        "latent_decode has no derivative with a quantised cache: train with kernels.attention, or dequantise"
    )


def _check(
    name: str, q: Array, q_rope: Array, latent: Array | Quantised, rope: Array, table: Array | None, lengths: Array,
    starts: Array | None, window: int | None, splits: int | None,
) -> None:  # fmt: skip
    values = latent.values if isinstance(latent, Quantised) else latent
    for what, x in (("q_latent", q), ("q_rope", q_rope)):
        if x.ndim != 4:
            raise ValueError(f"{name}: {what} must have four axes, the last two heads and width, not {x.shape}")
    if q.shape[:3] != q_rope.shape[:3]:
        raise ValueError(f"{name}: q_latent {q.shape} and q_rope {q_rope.shape} differ in batch, queries or heads")
    if rope.ndim != 3 or values.ndim not in (3, 4) or values.shape[:2] != rope.shape[:2]:
        raise ValueError(
            f"{name}: latent {values.shape} and rope {rope.shape} must be [N, S, C] or [N, S, g, C], and [N, S, R]"
        )
    if q.shape[3] != values.shape[-1] or q_rope.shape[3] != rope.shape[2]:
        widths = f"{q.shape[3]} and {values.shape[-1]}, {q_rope.shape[3]} and {rope.shape[2]}"
        raise ValueError(f"{name}: queries and cache differ in width: {widths}")
    slices = values.shape[2] if values.ndim == 4 else 1
    if slices == 0 or q.shape[2] % slices:
        raise ValueError(f"{name}: {slices} slices do not divide {q.shape[2]} query heads")
    types = {x.dtype for x in ((q, q_rope, rope) if isinstance(latent, Quantised) else (q, q_rope, rope, values))}
    if len(types) > 1 or not jnp.issubdtype(q.dtype, jnp.floating):
        listed = ", ".join(sorted(map(str, types)))
        raise ValueError(f"{name}: queries, rope and what is not quantised must share one float type, not {listed}")
    if isinstance(latent, Quantised):
        scales = latent.scales
        if values.dtype not in MOST or scales.dtype != jnp.float32:
            raise ValueError(
                f"{name}: a quantised latent is int8 or float8_e4m3fn with float32 scales, not {_seen(latent)}"
            )
        if scales.shape[:-1] != values.shape[:-1] or not scales.shape[-1] or values.shape[-1] % scales.shape[-1]:
            raise ValueError(f"{name}: scales must be one per token and block of channels, not {_seen(latent)}")
    if table is None and q.shape[0] != values.shape[0]:
        raise ValueError(f"{name}: q_latent {q.shape} and latent {values.shape} differ in batch")
    check_rows(name, q.shape[0], lengths, starts, table, window, splits)


def _seen(*arrays: Any) -> str:
    return ", ".join(seen(x) for x in jax.tree.leaves(arrays))
