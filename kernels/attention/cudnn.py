"""Attention by cuDNN, through jax: full, causal and windowed attention over plain sequences.

It is what the other GPU kernels are measured against.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from kernels.attention.masks import And, Everything, Mask, SlidingWindow


def attention(q: Array, k: Array, v: Array, *, mask: Mask, scale: Any, **others: Any) -> tuple[Array, Array]:
    """As `kernels.attention.attention`, for what `capabilities` declares; lse has no gradient here.

    Raises: `NotImplementedError` where a gradient of lse is asked for.
    """
    if not isinstance(scale, (int, float)):
        q, scale = (q * scale).astype(q.dtype), 1.0
    terms = mask.terms if isinstance(mask, And) else (mask,)
    windows = [term.size for term in terms if isinstance(term, SlidingWindow)]
    causal = not all(isinstance(term, Everything) for term in terms)
    return _attention((float(scale), causal, min(windows, default=None)), q, k, v)


def unsuited(case: Any) -> str | None:
    """Why it should be used only where it is named."""
    return None if case.plain == "full" else "inf and NaN in masked places would reach those who may not see them"


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(options: tuple[float, bool, int | None], q: Array, k: Array, v: Array) -> tuple[Array, Array]:
    return call(*options, q, k, v)


def call(scale: float, causal: bool, window: int | None, q: Array, k: Array, v: Array) -> tuple[Array, Array]:
    """cuDNN itself: output, and lse [B, T, H] in float32, which jax's public function rounds to the output's type."""
    from jax._src.cudnn import fused_attention_stablehlo as stablehlo

    kind = stablehlo.MaskType.CAUSAL if causal else stablehlo.MaskType.NO_MASK
    out, lse = stablehlo.dot_product_attention(
        q, k, v, scale=scale, mask_type=kind, sliding_window_length=window, return_residual=True
    )
    return out, jnp.swapaxes(lse, 1, 2)


def _forward(options: Any, q: Any, k: Any, v: Any) -> tuple[Any, Any]:
    return jax.vjp(functools.partial(call, *options), q.value, k.value, v.value)


def _backward(options: Any, pull: Any, cotangents: Any) -> tuple[Array, Array, Array]:
    d_out, d_lse = cotangents
    if not isinstance(d_lse, jax.custom_derivatives.SymbolicZero):
        raise NotImplementedError("attention: implementation 'cudnn' gives no gradient of lse; name another one")
    if isinstance(d_out, jax.custom_derivatives.SymbolicZero):
        d_out = jnp.zeros(d_out.shape, d_out.dtype)
    return pull((d_out, jnp.zeros(d_lse.shape, d_lse.dtype)))


_attention.defvjp(_forward, _backward, symbolic_zeros=True)
