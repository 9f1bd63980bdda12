"""The softmax core that variants share: the attention op (or the decode op, where a few tokens meet a cache) on the
active mesh, and its hooks."""

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from kernels import decode
from kernels.attention import attention, masks, probabilities
from kernels.attention.rows import of_active_rows
from kernels.tokens import Tokens
from layers.hooks import LayerHooks, Tap
from layers.paged import gathered
from sharding import logical

_KV = ("batch", None, "kv_heads", None)
_TOKENS = ("batch", "length")
#: The most new tokens at once that the decode op is made for.
_FEW = 16
#: The fewest tokens with which leaving rows out is worth gathering those that stay.
_MANY = 512


def attend(
    q: Float[Array, "B T H D"],
    k: Float[Array, "B S Hk D"],
    v: Float[Array, "B S Hk Dv"] | None,
    *,
    value_width: int | None = None,
    mask: masks.Mask,
    tokens: Tokens,
    keys: Tokens,
    lengths: Int[Array, "B"] | None = None,
    table: Int[Array, "B n"] | None = None,
    scale: float,
    soft_cap: float = 0.0,
    sinks: Float[Array, "H"] | None = None,
    hooks: LayerHooks,
    implementation: str | None,
    head_axis: str = "heads",
    active: Bool[Array, "B T H"] | None = None,
) -> Float[Array, "B T H Dv"]:
    """Output of every head before W_O; arguments as for `kernels.attention.attention`.

    `active`: the heads of each token that count; the others may be left out, and then come back as zeros.

    `v` None: the values are the first `value_width` columns of the keys. `lengths`, from a cache's `View`, says what
    the mask says of a cache that is in order; then few queries go to the decode op, which reads no more than is there.
    With a `table`, from the same, keys and values are pages [P, page, ...]; what is not for the decode op makes
    contiguous rows of them first.
    Under tensor parallelism key/value heads are repeated until they split as the query heads do, which lie along the
    logical `head_axis`.
    Hooks on scores or probabilities form the whole map; a tap on probabilities forms the rows it asks for.
    """
    shared: dict[str, Any] = dict(
        mask=mask, q_tokens=tokens, k_tokens=keys, scale=scale, soft_cap=soft_cap, sinks=sinks
    )
    if hooks.edits("scores"):
        shared["score_mod"] = lambda scores, places: hooks.edit("scores", scores, places.k)
        implementation = "reference"
    if hooks.tap("scores") is not None:
        raise NotImplementedError("a tap on scores is not offered: tap probabilities, or edit scores")
    tap, edited = hooks.tap("probabilities"), hooks.edits("probabilities")
    watched = tap is not None or edited or hooks.edits("scores")
    # A kernel that is named is one of the attention op, and is obeyed.
    free = implementation in (None, "xla", "reference")
    if lengths is not None and free and not watched and q.shape[1] <= _FEW:
        options = dict(value_width=value_width, soft_cap=soft_cap, scale=scale, implementation=implementation)
        return _from_cache(q, k, v, table, lengths, sinks, options, head_axis)
    if table is not None:
        k, v = (x if x is None else gathered(x, table) for x in (k, v))
    v = k[..., :value_width] if v is None else v
    if edited or (tap is not None and hooks.edits("scores")):  # Edits see the whole map, whatever is tapped of it.
        weights = hooks.edit("probabilities", probabilities(q, k, **shared), keys)
        if tap is not None:
            rows, heads = _chosen(tap)
            hooks.taken["tap/probabilities"] = weights[:, heads][:, :, rows]
    elif tap is not None:
        rows, heads = _chosen(tap)
        hooks.taken["tap/probabilities"] = probabilities(q, k, rows=rows, heads=heads, **shared)
    if edited:
        if keys.valid is not None:  # 0 times whatever padding holds must be 0.
            v = jnp.where(keys.valid[..., None, None], v, 0)
        values = jnp.repeat(v, q.shape[2] // v.shape[2], axis=2)
        return jnp.einsum("bhts,bshd->bthd", weights.astype(v.dtype), values)

    repeats = logical.kv_repeat(q.shape[2], k.shape[2])
    if repeats > 1:  # Whole before they are repeated, so that their gradients are whole, too.
        k, v = (jnp.repeat(logical.constrain(x, _KV), repeats, axis=2) for x in (k, v))
    if hooks.edits("scores") or q.shape[1] < _MANY:
        active = None
    if logical.active() is None and active is None:  # Tokens stay outside the trace where they are constants.
        return attention(q, k, v, **shared, implementation=implementation)[0]

    def local(q, k, v, tokens, keys, sinks, active):
        options = shared | dict(q_tokens=tokens, k_tokens=keys, sinks=sinks, implementation=implementation)
        if active is not None:
            return of_active_rows(q, k, v, active, **options)
        return attention(q, k, v, **options)[0]

    if logical.active() is None:
        return local(q, k, v, tokens, keys, sinks, active)
    query, key = ("batch", "length", head_axis, None), ("batch", None, head_axis, None)
    specs = (query, key, key, _TOKENS, ("batch", None), None if sinks is None else (head_axis,))
    chosen = None if active is None else ("batch", "length", head_axis)
    return logical.shard_kernel(local, (*specs, chosen), query)(q, k, v, tokens, keys, sinks, active)


def _from_cache(
    q: Array, k: Array, v: Array | None, table: Array | None, lengths: Array, sinks: Array | None,
    options: dict[str, Any], head_axis: str,
) -> Array:  # fmt: skip
    """What `attend` gives, by the decode op."""
    repeats = logical.kv_repeat(q.shape[2], k.shape[2])
    if repeats > 1:
        k, v = (x if x is None else jnp.repeat(logical.constrain(x, _KV), repeats, axis=2) for x in (k, v))

    def local(q, k, v, table, lengths, sinks):
        if table is None:
            return decode.decode_attention(q, k, v, lengths, sinks=sinks, **options)[0]
        return decode.paged_decode_attention(q, k, v, table, lengths, sinks=sinks, **options)[0]

    rows, table_axes = ("batch", None) if table is None else (None, ("batch", None))  # Pages belong to all rows.
    query, key = ("batch", "length", head_axis, None), (rows, None, head_axis, None)
    value, sink = None if v is None else key, None if sinks is None else (head_axis,)
    specs = (query, key, value, table_axes, ("batch",), sink)
    return logical.shard_kernel(local, specs, query)(q, k, v, table, lengths, sinks)


def _chosen(tap: Tap) -> tuple[Any, Any]:
    """The rows and the heads that a tap asks for, as indices."""
    rows, heads = (slice(None) if chosen is None else list(chosen) for chosen in (tap.rows, tap.heads))
    return rows, heads
