"""Lightning attention in chunks: products inside a chunk, a running state between chunks, two such sweeps backwards.

The blocked algorithms of arXiv 2405.17381. Memory is linear in length: the backward pass keeps only the inputs and
walks twice, forwards for dq (recomputing the states) and backwards for dk and dv. Everything inside a chunk is float32
whatever the inputs are (float64 for float64): a chunk is widened when it is read, so bfloat16 costs no precision in
state or scores.

Chunks are cut from [B, T, H, D] where they lie and written back in place, so no transposed copy of the sequence exists;
a last, shorter chunk is a step of its own rather than padding. Buffers start as copies of inputs of the same shape and
are overwritten in full: that gives them their sharding, under shard_map too. Two-byte floats are cut and written as
integers (`kernels.bits`).
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from kernels.bits import bits, floats
from kernels.lightning.timeline import Timeline


class Tables(NamedTuple):
    """Decay within one chunk of C tokens; the batch axis is 1 where rows agree."""

    pairs: Float[Array, "B H C C"]  # M: exp(-s distance) for u <= t of one document, else 0.
    since: Float[Array, "B H C 1"]  # Lambda: from the state before the chunk to token t.
    until: Float[Array, "B H C 1"]  # Rho: from token u to the chunk's end.
    through: Float[Array, "B H 1 1"]  # From the state before the chunk to the one after it.


def lightning_attention(
    q: Float[Array, "B T H D"],
    k: Float[Array, "B T H D"],
    v: Float[Array, "B T H E"],
    decay: Float[Array, "H"],
    moments: Timeline | None,
    initial_state: Float[Array, "B H D E"],
    chunk: int,
) -> tuple[Float[Array, "B T H E"], Float[Array, "B H D E"]]:
    """Output and final state; `moments` None means one document per row without padding."""
    return _attend(chunk, q, k, v, decay, moments, initial_state)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(chunk, q, k, v, decay, moments, initial_state):
    if q.shape[1] == 1:
        return _one_token(q, k, v, decay, moments, initial_state)

    def step(read, tables, state, out):
        (out,) = out
        qc, kc, vc = read(q), read(k), read(v)
        scores = _dot("bhtd,bhud->bhtu", qc, kc) * tables.pairs
        oc = _dot("bhtu,bhue->bhte", scores, vc) + tables.since * _dot("bhtd,bhde->bhte", qc, state)
        return _advance(state, kc, vc, tables), (read.back(out, oc),)

    state, (out,) = _walk(step, chunk, decay, moments, initial_state, (v,))
    return out, state


def _attend_forward(chunk, q, k, v, decay, moments, initial_state):
    return _attend(chunk, q, k, v, decay, moments, initial_state), (q, k, v, decay, moments, initial_state)


def _attend_backward(chunk, saved, cotangents):
    q, k, v, decay, moments, initial_state = saved
    do, dstate = cotangents

    def query_step(read, tables, state, out):
        (dq,) = out
        kc, vc, doc = read(k), read(v), read(do)
        dscores = _dot("bhte,bhue->bhtu", doc, vc) * tables.pairs
        dqc = _dot("bhtu,bhud->bhtd", dscores, kc) + tables.since * _dot("bhte,bhde->bhtd", doc, state)
        return _advance(state, kc, vc, tables), (read.back(dq, dqc),)

    def key_step(read, tables, dstate, out):
        dk, dv = out
        qc, kc, vc, doc = read(q), read(k), read(v), read(do)
        dscores = _dot("bhte,bhue->bhtu", doc, vc) * tables.pairs
        scores = _dot("bhtd,bhud->bhtu", qc, kc) * tables.pairs
        dkc = _dot("bhtu,bhtd->bhud", dscores, qc) + tables.until * _dot("bhue,bhde->bhud", vc, dstate)
        dvc = _dot("bhtu,bhte->bhue", scores, doc) + tables.until * _dot("bhud,bhde->bhue", kc, dstate)
        dstate = tables.through * dstate + _dot("bhtd,bhte->bhde", tables.since * qc, doc)
        return dstate, (read.back(dk, dkc), read.back(dv, dvc))

    _, (dq,) = _walk(query_step, chunk, decay, moments, initial_state, (q,))
    dinitial, (dk, dv) = _walk(key_step, chunk, decay, moments, dstate, (k, v), reverse=True)
    return dq, dk, dv, None, None, dinitial


_attend.defvjp(_attend_forward, _attend_backward)


def _advance(state, k, v, tables):
    return tables.through * state + _dot("bhud,bhue->bhde", tables.until * k, v)


def _one_token(q, k, v, decay, moments, state):
    """A decoding step: no chunk, no tables."""
    wide = state.dtype
    kept = jnp.exp(-decay.astype(wide))[None, :, None, None]
    if moments is not None:
        begins, valid = (x[:, :, None, None] for x in moments)
        q, k, v = (jnp.where(valid, x, 0) for x in (q, k, v))
        kept = jnp.where(begins, 0, jnp.where(valid, kept, 1))
    qt, kt, vt = (x[:, 0].astype(wide) for x in (q, k, v))
    state = kept * state + kt[..., None] * vt[..., None, :]
    return _dot("bhd,bhde->bhe", qt, state)[:, None].astype(q.dtype), state


def _walk(step, chunk, decay, moments, state, buffers, reverse=False):
    """`step` over all chunks in order or against it: `chunk` tokens at a time, and what is left at the end."""
    length, narrow = buffers[0].shape[1], buffers[0].dtype
    chunk = min(chunk, max(length, 1))
    whole, rest = divmod(length, chunk)
    tables = _tables(decay, moments, chunk, state.dtype)

    def body(i, carry):
        start = (whole - 1 - i if reverse else i) * chunk
        return step(_Cut(start, chunk, moments, narrow, state.dtype), tables(start), *carry)

    def last(carry):
        if not rest:
            return carry
        start = whole * chunk
        tables = _tables(decay, moments, rest, state.dtype)
        return step(_Cut(start, rest, moments, narrow, state.dtype), tables(start), *carry)

    carry = (state, tuple(bits(x) for x in buffers))
    carry = last(carry) if reverse else carry
    if whole:
        carry = body(0, carry) if whole == 1 else lax.fori_loop(0, whole, body, carry)
    state, buffers = carry if reverse else last(carry)
    return state, tuple(floats(x, narrow) for x in buffers)


class _Cut:
    """Reads one chunk as [B, H, C, D] in the wide type, padding zeroed; `back` writes one in the narrow type's bits."""

    def __init__(self, start, size, moments, narrow, wide):
        self.start, self.size, self.narrow, self.wide = start, size, narrow, wide
        self.valid = None if moments is None else _slice(moments.valid, start, size)[..., None, None]

    def __call__(self, x):
        part = floats(_slice(bits(x), self.start, self.size), x.dtype)
        return jnp.swapaxes(self._clean(part).astype(self.wide), 1, 2)

    def back(self, buffer, part):
        part = self._clean(jnp.swapaxes(part, 1, 2).astype(self.narrow))
        return lax.dynamic_update_slice_in_dim(buffer, bits(part), self.start, axis=1)

    def _clean(self, x):
        return x if self.valid is None else jnp.where(self.valid, x, 0)


def _tables(decay, moments, size, wide):
    """A function from a chunk's first token to its `Tables`; without `moments` all chunks share one, made here."""
    rate = decay.astype(wide)[None, :, None, None]
    order = jnp.arange(size)
    causal = order[:, None] >= order
    if moments is None:
        constant = Tables(
            jnp.where(causal, jnp.exp(-rate * jnp.maximum(order[:, None] - order, 0)), 0),
            jnp.exp(-rate * (order + 1)[:, None]),
            jnp.exp(-rate * (size - 1 - order)[:, None]),
            jnp.exp(-rate * size),
        )
        return lambda start: constant

    def at(start):
        # Counting by a product with a triangle gives arrays in memory; slices would be fused into exp, which then
        # computes their addresses element by element.
        flags = jnp.stack([_slice(x, start, size) for x in moments]).astype(wide)
        document, age = _dot("nbu,ut->nbt", flags, causal.T.astype(wide))
        live = causal & (document[:, :, None] == document[:, None])

        def decayed(kept, ticks):
            return jnp.where(kept[:, None], jnp.exp(-rate * ticks[:, None]), 0)

        end, now = document[:, -1:], age[:, -1:]
        return Tables(
            decayed(live, jnp.maximum(age[:, :, None] - age[:, None], 0)),
            decayed((document == 0)[..., None], age[..., None]),
            decayed((document == end)[..., None], (now - age)[..., None]),
            decayed((end == 0)[..., None], now[..., None]),
        )

    return at


def _slice(x, start, size):
    return lax.dynamic_slice_in_dim(x, start, size, axis=1)


def _dot(equation, a, b):
    return jnp.einsum(equation, a, b, preferred_element_type=a.dtype)
