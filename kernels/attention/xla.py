"""Blockwise attention in plain XLA: fast on CPU, frugal and sound anywhere, skips blocks that the mask empties.

Flash attention (Dao 2023) with what was measured on CPU: key/value heads are the batch axis of every dot and their
query heads ride along as rows; query blocks outside, live key blocks inside, wholly live ones without a mask; the
backward is one pass with key blocks outside and scores transposed, so that no dot contracts a long transposed side.
Batch rows and groups of heads are looped over, which bounds the temporaries whatever the batch.

A non-finite key or value makes the whole key NaN and is zeroed where it would be multiplied by a zero probability; so
it reaches all who may see it, and no one else. The backward finds such rows by their NaN lse.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float

from kernels.attention import plan, reference
from kernels.attention.masks import Mask
from kernels.attention.plan import Plan, Tables, add_shared, cut, cut_shared, put
from kernels.attention.scores import Change, Inputs, check_closure
from kernels.bits import bits, floats, stored
from kernels.tokens import Tokens
from kernels.varying import alike


def attention(
    q: Float[Array, "B T H D"],
    k: Float[Array, "B S Hk D"],
    v: Float[Array, "B S Hk Dv"],
    *,
    mask: Mask,
    q_tokens: Tokens,
    k_tokens: Tokens,
    scale: Any,
    soft_cap: float,
    sinks: Array | None,
    bias: Array | None = None,
    score_mod: Any = None,
    score_arrays: tuple[Array, ...] = (),
    dropout: float = 0.0,
    dropout_seed: Any = 0,
    blocks: tuple[plan.Blocks, plan.Blocks] | None = None,
) -> tuple[Array, Array]:
    """As `kernels.attention.attention`; `blocks` overrides the block sizes of forward and backward."""
    if not (isinstance(scale, (int, float)) and scale > 0):  # The kernel divides by its scale.
        q, scale = (q * scale).astype(q.dtype), 1.0
    if 0 in (*q.shape, *k.shape, *v.shape):
        return reference.attention(
            q,
            k,
            v,
            mask=mask,
            q_tokens=q_tokens,
            k_tokens=k_tokens,
            scale=scale,
            soft_cap=soft_cap,
            sinks=sinks,
            bias=bias,
            score_mod=score_mod,
            score_arrays=score_arrays,
            dropout=dropout,
            dropout_seed=dropout_seed,
        )
    check_closure(score_mod)
    if blocks is None:
        usual = plan.choose_blocks(q.shape, k.shape, v.shape)
        blocks = plan.adapted(usual, mask, q_tokens, k_tokens, q.shape, k.shape)
    plans, tables = plan.make(
        mask,
        q_tokens,
        k_tokens,
        q.shape,
        k.shape,
        Change(float(scale), float(soft_cap), score_mod, bias is not None),
        blocks,
        float(dropout),
        dropout_seed,
    )
    if bias is not None:
        bias = bias.reshape((1,) * (4 - bias.ndim) + bias.shape)
    if sinks is not None:
        sinks = sinks.reshape((1,) * (3 - sinks.ndim) + sinks.shape)
    inputs = Inputs(bias, score_arrays)
    varying = (q, k, v, sinks, inputs)
    q, k, v, sinks, inputs = alike(varying, *jax.tree.leaves(varying))
    return _attention(plans, q, k, v, sinks, inputs, tables)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(
    plans: tuple[Plan, Plan], q: Array, k: Array, v: Array, sinks: Array | None, inputs: Inputs, tables: Any
) -> tuple[Array, Array]:
    return _forward(plans, q, k, v, sinks, inputs, tables)[0]


def _forward(
    plans: tuple[Plan, Plan], q: Array, k: Array, v: Array, sinks: Array | None, inputs: Inputs,
    both_tables: tuple[Tables, Tables],
) -> tuple[Any, Any]:  # fmt: skip
    plan, tables = plans[0], both_tables[0]
    dtype = jnp.promote_types(q.dtype, jnp.float32)
    batch, length, heads, width = q.shape
    value_width = v.shape[3]
    q_padded, k_padded, v_padded = plan.pad_rows(q), plan.pad_keys(k), plan.pad_keys(v)
    per, rows, size, row_heads = plan.heads, plan.rows, plan.block_q, plan.heads * plan.ratio
    late, padded = plan.late, Inputs(plan.pad_map(inputs.bias), inputs.arrays)
    sinks_padded = None if sinks is None else plan.pad_rows(sinks) if sinks.shape[1] > 1 else sinks

    def one_group(n: Array, outputs: tuple[Array, Array]) -> tuple[Array, Array]:
        b, g = n // plan.groups, n % plan.groups
        keys, values = (cut(x, (b, 0, g * per, 0), (1, x.shape[1], per, x.shape[3]))[0] for x in (k_padded, v_padded))
        if plan.partial:
            keys = jnp.where(jnp.isfinite(keys) & _finite_at(values, width), keys, jnp.nan)
            values = jnp.where(jnp.isfinite(values), values, 0)
        keys, values = jnp.swapaxes(keys, 0, 1), jnp.swapaxes(values, 0, 1)  # [per, S, D]

        def one_block(i: Array, outputs: tuple[Array, Array]) -> tuple[Array, Array]:
            at = (b, i * size, g * row_heads)
            queries = plan.split_rows(cut(q_padded, (*at, 0), (1, size, row_heads, width))[0])  # [per, rows, D]
            sink = None
            if sinks is not None:
                sink = cut_shared(sinks_padded, at, (1, size, row_heads))[0].astype(dtype) / late
                sink = plan.split_rows(jnp.broadcast_to(sink, (size, row_heads))[..., None])[..., 0]

            def step(j: Array, blocks: int, carry: tuple[Array, ...], masked: bool) -> tuple[Array, ...]:
                top, total, sum_ = carry
                key, value = (_slice(x, j * plan.block_k, blocks * plan.block_k) for x in (keys, values))
                s = _dot(queries, key, 2, 2, dtype)
                if not plan.change.linear:
                    arrays, places, _ = plan.block(padded, tables, b, g, i, j)
                    s = plan.change(s.reshape(1, row_heads, size, plan.block_k), *arrays, places).reshape(s.shape)
                if masked:
                    s = plan.where(tables, b, g, i, j, s, -jnp.inf)
                new = jnp.maximum(top, s.max(-1))
                safe = jnp.where(new == -jnp.inf, 0, new)
                p = jnp.exp(late * (s - safe[..., None]))
                shrink = jnp.exp(late * (top - safe))
                total = total * shrink + p.sum(-1)
                p = plan.dropped(tables, b, g, i, j, p, False)
                sum_ = sum_ * shrink[..., None] + _dot(p.astype(v.dtype), value, 2, 1, dtype)
                return new, total, sum_

            carry = (
                jnp.full((per, rows), -jnp.inf, dtype) if sink is None else sink,
                jnp.zeros((per, rows), dtype) if sink is None else (sink > -jnp.inf).astype(dtype),
                jnp.zeros((per, rows, value_width), dtype),
            )
            top, total, sum_ = plan.visit(tables.lists, b, g, i, step, alike(carry, q))
            empty = total == 0
            total = jnp.where(empty, 1, total)
            out = (sum_ / total[..., None]).astype(q.dtype)
            lse = jnp.where(empty, -jnp.inf, late * top + jnp.log(total))
            return (
                put(outputs[0], plan.join_rows(out)[None], (*at, 0)),
                put(outputs[1], plan.join_rows(lse[..., None])[None, ..., 0], at),
            )

        return _loop(plan.q_blocks, one_block, outputs)

    outputs = (
        jnp.zeros((batch, plan.q_blocks * size, heads, value_width), stored(q.dtype)),
        jnp.zeros((batch, plan.q_blocks * size, heads), dtype),
    )
    out, lse = _loop(batch * plan.groups, one_group, alike(outputs, q))
    out, lse = floats(out, q.dtype)[:, :length], lse[:, :length]
    return (out, lse), (q, k, v, sinks, inputs, both_tables, out, lse)


def _backward(plans: tuple[Plan, Plan], saved: Any, cotangents: tuple[Array, Array]) -> tuple[Any, ...]:
    q, k, v, sinks, inputs, (_, tables), out, lse = saved
    d_out, d_lse = cotangents
    plan, dtype = plans[1], lse.dtype
    batch, length, heads, width = q.shape
    # What a row's probabilities lose to their normalisation; the gradient of lse enters with the opposite sign.
    delta = jnp.einsum("bthe,bthe->bth", d_out, out, preferred_element_type=dtype) - d_lse
    d_sinks = None
    if sinks is not None:
        share = jnp.where(lse == -jnp.inf, 0, jnp.exp(sinks.astype(dtype) - lse))
        shared = tuple(axis for axis in (0, 1) if sinks.shape[axis] == 1)
        d_sinks = -jnp.where(share == 0, 0, share * delta).sum(shared, keepdims=True).astype(sinks.dtype)
    # Rows without keys get probability 0; rows with non-finite parts get NaN, but only where they may look.
    fine = jnp.isfinite(delta)
    lse = jnp.where(lse == -jnp.inf, jnp.inf, jnp.where(fine, lse, jnp.nan))
    delta = jnp.where(fine, delta, 0)
    q_padded, o_padded, k_padded, v_padded = plan.pad_rows(q), plan.pad_rows(d_out), plan.pad_keys(k), plan.pad_keys(v)
    lse, delta = plan.pad_rows(lse[..., None], jnp.inf), plan.pad_rows(delta[..., None])
    per, rows, size, row_heads = plan.heads, plan.rows, plan.block_k, plan.heads * plan.ratio
    padded, linear = Inputs(plan.pad_map(inputs.bias), inputs.arrays), plan.change.linear

    def clean(x: Array) -> Array:
        return jnp.where(jnp.isfinite(x), x, 0) if plan.partial else x

    def one_group(n: Array, outputs: tuple[Array, ...]) -> tuple[Array, ...]:
        b, g = n // plan.groups, n % plan.groups
        queries, d_outs, lses, deltas = (
            plan.split_rows(cut(x, (b, 0, g * row_heads, 0), (1, x.shape[1], row_heads, x.shape[3]))[0])
            for x in (q_padded, o_padded, lse, delta)
        )  # [per, nq rows, D]
        queries, d_outs = clean(queries), clean(d_outs)

        def one_block(j: Array, outputs: tuple[Array, ...]) -> tuple[Array, ...]:
            d_queries, d_k, d_v, d_inputs = outputs
            at = (b, j * size, g * per, 0)
            keys, values = (
                clean(jnp.swapaxes(cut(x, at, (1, size, per, x.shape[3]))[0], 0, 1)) for x in (k_padded, v_padded)
            )  # [per, block_k, D]
            keys_transposed = jnp.swapaxes(keys, 1, 2)

            def step(i: Array, blocks: int, carry: tuple[Any, ...], masked: bool) -> tuple[Any, ...]:
                d_queries, d_keys, d_values, d_inputs = carry
                first, count = i * rows, blocks * rows
                query, d_out = _slice(queries, first, count), _slice(d_outs, first, count)
                row_lse, row_delta = (jnp.swapaxes(_slice(x, first, count), 1, 2) for x in (lses, deltas))
                s = _dot(keys, query, 2, 2, dtype)  # [per, block_k, rows]
                if linear:
                    s = s * plan.change.scale
                else:
                    arrays, places, where = plan.block(padded, tables, b, g, i, j)
                    s, pull = plan.change.pull(plan.turned(s), arrays, places)
                    s = jnp.where(row_lse == jnp.inf, 0, plan.turned_back(s))
                p = jnp.exp(s - row_lse)
                dp = plan.dropped(tables, b, g, i, j, _dot(values, d_out, 2, 2, dtype), True)
                ds = p * (dp - row_delta)
                p = plan.dropped(tables, b, g, i, j, p, True)
                if masked:
                    p, ds = (plan.where_transposed(tables, b, g, i, j, x, 0.0) for x in (p, ds))
                if not linear:
                    ds, d_bias, d_arrays = pull(plan.turned(ds))
                    ds = plan.turned_back(ds)
                    ds = plan.where_transposed(tables, b, g, i, j, ds, 0.0) if masked else ds
                    d_inputs = Inputs(
                        None if d_bias is None else add_shared(d_inputs.bias, d_bias.astype(dtype), where),
                        jax.tree.map(lambda a, b: a + b.astype(a.dtype), d_inputs.arrays, d_arrays),
                    )
                p, ds = p.astype(v.dtype), ds.astype(v.dtype)
                d_values += _dot(p, d_out, 2, 1, dtype)
                d_keys += _dot(ds, query, 2, 1, dtype)
                d_query = _slice(d_queries, first, count, 2) + _dot(keys_transposed, ds, 2, 1, dtype)
                return lax.dynamic_update_slice_in_dim(d_queries, d_query, first, 2), d_keys, d_values, d_inputs

            zeros = alike(tuple(jnp.zeros((per, size, x.shape[3]), dtype) for x in (k, v)), q)
            carry = (d_queries, *zeros, d_inputs)
            d_queries, d_keys, d_values, d_inputs = plan.visit(tables.lists, b, g, j, step, carry)
            d_keys = jnp.swapaxes(d_keys * plan.late, 0, 1)[None].astype(k.dtype)
            d_values = jnp.swapaxes(d_values, 0, 1)[None].astype(v.dtype)
            return d_queries, put(d_k, d_keys, at), put(d_v, d_values, at), d_inputs

        d_q, d_k, d_v, d_inputs = outputs
        d_queries = alike(jnp.zeros((per, width, plan.q_blocks * rows), dtype), q)  # Transposed, as the dots give it.
        d_queries, d_k, d_v, d_inputs = _loop(plan.k_blocks, one_block, (d_queries, d_k, d_v, d_inputs))
        d_queries = plan.join_rows(jnp.swapaxes(d_queries * plan.late, 1, 2)).astype(q.dtype)
        return put(d_q, d_queries[None], (b, 0, g * row_heads, 0)), d_k, d_v, d_inputs

    outputs = (
        jnp.zeros((batch, plan.q_blocks * plan.block_q, heads, width), stored(q.dtype)),
        jnp.zeros((batch, plan.k_blocks * size, *k.shape[2:]), stored(k.dtype)),
        jnp.zeros((batch, plan.k_blocks * size, *v.shape[2:]), stored(v.dtype)),
        jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.promote_types(x.dtype, dtype)), padded),
    )
    *d_qkv, d_padded = _loop(batch * plan.groups, one_group, alike(outputs, q))
    d_q, d_k, d_v = (floats(x, q.dtype) for x in d_qkv)
    d_inputs = jax.tree.map(lambda d, x: d[tuple(map(slice, x.shape))].astype(x.dtype), d_padded, inputs)
    return d_q[:, :length], d_k[:, : k.shape[1]], d_v[:, : v.shape[1]], d_sinks, d_inputs, None


_attention.defvjp(_forward, _backward)


def _finite_at(values: Array, width: int) -> Array:
    """[.., width]: some place of a row is False where its value row holds inf or NaN. No reduction: it must fuse."""
    finite = jnp.isfinite(values)
    missing = -finite.shape[-1] % width
    finite = (
        jnp.pad(finite, ((0, 0),) * (finite.ndim - 1) + ((0, missing),), constant_values=True) if missing else finite
    )
    return functools.reduce(jnp.logical_and, jnp.split(finite, finite.shape[-1] // width, axis=-1))


def _dot(a: Array, b: Array, contract_a: int, contract_b: int, dtype: Any) -> Array:
    """Batched over axis 0, accumulated in `dtype`."""
    return lax.dot_general(a, b, (((contract_a,), (contract_b,)), ((0,), (0,))), preferred_element_type=dtype)


def _slice(x: Array, first: Array, count: int, axis: int = 1) -> Array:
    return floats(lax.dynamic_slice_in_dim(bits(x), first, count, axis), x.dtype)


def _loop(count: int, body: Any, carry: Any) -> Any:
    """`fori_loop`, but no loop at all for a single turn."""
    return body(np.int32(0), carry) if count == 1 else lax.fori_loop(np.int32(0), np.int32(count), body, carry)
