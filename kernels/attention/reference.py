"""Attention by the book: the specification every other implementation is held to. Forms the whole map."""

from typing import Any

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from kernels.attention.dropout import columns, kept
from kernels.attention.masks import Mask
from kernels.attention.scores import Places
from kernels.tokens import Tokens


def weights(
    q: Float[Array, "B T H D"], k: Float[Array, "B S Hk D"], *, mask: Mask, q_tokens: Tokens, k_tokens: Tokens,
    scale: Any, soft_cap: float, sinks: Array | None, bias: Array | None, score_mod: Any, score_arrays: Any = (),
    spoilt_keys: Any = False, rows: Array | None = None, heads: Array | None = None,
) -> tuple[Float[Array, "B h t S"], Float[Array, "B h t"]]:  # fmt: skip
    """Softmax probabilities and log-sum-exp of the selected rows and heads (None: all).

    s = scale q.k; then soft_cap tanh(s / soft_cap); + bias; score_mod; mask; softmax with exp(sink) added below.
    Keys with inf or NaN (in `spoilt_keys` [B, S, Hk] too) give NaN to whoever may see them, and nothing to the others.
    """
    dtype = jnp.promote_types(q.dtype, jnp.float32)
    row, head = (jnp.arange(n) if x is None else x for n, x in ((q.shape[1], rows), (q.shape[2], heads)))
    key_head = head // (q.shape[2] // k.shape[2])
    q = q[:, row][:, :, head] if rows is not None or heads is not None else q
    spoilt_rows, spoilt_keys = ~jnp.isfinite(q).all(-1), spoilt_keys | ~jnp.isfinite(k).all(-1)
    q = jnp.where(spoilt_rows[..., None], 0, q)
    k = _take(jnp.where(spoilt_keys[..., None], 0, k), key_head, 2)
    s = scale * jnp.einsum("bthd,bshd->bhts", q, k, preferred_element_type=dtype, precision="highest")
    if soft_cap:
        s = soft_cap * jnp.tanh(s / soft_cap)
    if bias is not None:
        bias = bias.reshape((1,) * (4 - bias.ndim) + bias.shape)
        s += _take(_take(bias, heads, 1), rows, 2)
    q_tokens = q_tokens.map(lambda column: _take(column, rows, 1))
    if score_mod is not None:
        batch, key = jnp.arange(s.shape[0]), jnp.arange(s.shape[3])
        at = Places(batch[:, None, None, None], head[:, None, None], row[:, None], key, q_tokens, k_tokens)
        s = score_mod(s, at, *score_arrays)
    spoilt = spoilt_rows.transpose(0, 2, 1)[..., None] | _take(spoilt_keys, key_head, 2).transpose(0, 2, 1)[:, :, None]
    allowed = _take(mask.allowed(q_tokens, k_tokens), heads, 1)
    s = jnp.where(allowed, jnp.where(spoilt, jnp.nan, s), -jnp.inf)
    sink = jnp.full((1, 1, 1), -jnp.inf, dtype)
    if sinks is not None:
        sinks = sinks.reshape((1,) * (3 - sinks.ndim) + sinks.shape)  # [B|1, T|1, H]
        sink = _take(sinks.astype(dtype), rows, 1)[:, :, head].swapaxes(1, 2)[..., None]
    top = lax.stop_gradient(jnp.maximum(s.max(-1, keepdims=True, initial=-jnp.inf), sink))
    top = jnp.where(top == -jnp.inf, 0, top)  # A row without keys: every exp is 0, no gradient passes.
    e = jnp.exp(s - top)
    total = e.sum(-1, keepdims=True) + jnp.exp(sink - top)
    empty = total == 0
    total = jnp.where(empty, 1, total)
    return jnp.where(allowed, e / total, 0), jnp.where(empty, -jnp.inf, top + jnp.log(total))[..., 0]


def attention(
    q: Array, k: Array, v: Float[Array, "B S Hk Dv"], *, dropout: float = 0.0, dropout_seed: Any = 0, **options: Any
) -> tuple[Array, Array]:
    """Output [B, T, H, Dv] in q's type and lse [B, T, H]; see `kernels.attention.attention`."""
    p, lse = weights(q, k, spoilt_keys=~jnp.isfinite(v).all(-1), **options)
    if dropout:
        rows, keys = columns(dropout_seed, *p.shape[:2], *p.shape[2:])
        p = jnp.where(kept(rows[..., None], keys[..., None, :], dropout), p / (1 - dropout), 0)
    v = jnp.repeat(jnp.where(jnp.isfinite(v), v, 0), q.shape[2] // k.shape[2], axis=2)
    out = jnp.einsum("bhts,bshe->bthe", p, v.astype(p.dtype), precision="highest")
    lse = lse.transpose(0, 2, 1)
    # Rows without keys are cut off, so that whatever gradient arrives there stops.
    return jnp.where((lse == -jnp.inf)[..., None], 0, out).astype(q.dtype), lse


def _take(x: Array, at: Array | None, axis: int) -> Array:
    """Entries of an axis that may be of size 1, standing for all."""
    return x if at is None or x.shape[axis] == 1 else jnp.take(x, at, axis)
