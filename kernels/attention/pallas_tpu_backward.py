"""The backward pass on TPU in one kernel: scores once, and from them the gradients of queries, keys and values.

Key blocks are outer, their gradients stay in VMEM while the live query blocks pass; the gradients of all queries of a
group of heads stay there throughout. So nothing is computed twice (five products a block where two kernels need seven)
and no partial sums go to HBM. Queries too many for that are taken in chunks, one after the other, and the gradients of
keys and values summed outside. Blocks are transposed, [keys, queries]: what is one number per query lies in lanes.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jaxtyping import Array

from kernels.attention.fused import Call
from kernels.attention.pallas_tpu_blocks import (
    FIRST,
    LIVE,
    LOG2E,
    Blocks,
    Steps,
    as_row,
    dot,
    has,
    in_parts,
    inner,
    outer,
    steps,
    turned,
    wide,
)
from kernels.attention.pallas_tpu_sizes import folding, part_of
from kernels.attention.program import Streams
from kernels.attention.worklist import Lists, Visits
from kernels.varying import alike


def backward(
    call: Call, q: Array, k: Array, v: Array, d_out: Array, lse: Array, delta: Array, streams: Streams, lists: Lists
) -> tuple[Array, Array, Array, Streams]:
    """Gradients, float32, as `kernels.attention.fused.Kernel` says."""
    heads, length, kv_heads, per_head = q.shape[1], q.shape[2], k.shape[1], q.shape[2] // call.block_q
    fold, chunk = folding(heads // kv_heads, per_head, q.shape[3], call.block_q)
    walk = _walk((lists if call.known is None else call.known).by_key, fold, -(-per_head // chunk), chunk)

    def one(entries: Any, by_query: Any) -> tuple[Any, Any]:
        mine = dataclasses.replace(walk, entries=entries)
        return in_parts(functools.partial(_run, call, fold), mine, (*by_query, k, v, streams.cols))

    run = one if walk.entries.ndim == 3 else functools.partial(_chunked, one, chunk * call.block_q)
    own, shared = run(walk.entries, (q, d_out, lse, delta, streams.rows, streams.tile))
    own = jax.tree.map(lambda x: x[:, :, :length], own)
    d_k, d_v = (x.reshape(x.shape[0], kv_heads, -1, *x.shape[2:]).sum(2) for x in (shared["k"], shared["v"]))
    scale = call.program.scale if call.program.linear else 1.0
    rows, cols = (
        tuple(found.get(n) for n in range(len(given)))
        for found, given in ((own["rows"], streams.rows), (shared["cols"], streams.cols))
    )
    return own["q"] * scale, d_k * scale, d_v, Streams(rows, cols, own.get("tile"))


def _walk(visits: Visits, fold: int, chunks: int, chunk: int) -> Steps:
    """Steps over key blocks and, in each, the query blocks of a group's heads; entries [chunks, b, g, n] if several."""
    order, full, live = (x[None, ..., None, :] if x is visits.order else x[None, ..., None, None] for x in visits)
    xp = np if isinstance(order, np.ndarray) else jnp
    place, first = np.arange(order.shape[-1]), np.arange(chunks).reshape(-1, 1, 1, 1, 1, 1) * chunk
    inside = (order >= first) & (order < first + chunk)  # [chunks, b, h, nk, 1, m]
    live, full = (inside & (place < count) for count in (live, full))
    order = xp.where(live, order - first, 0)

    def folded(x: Any) -> Any:
        """[chunks * b, g, nk, fold * m]"""
        x = x.reshape(x.shape[0] * x.shape[1], *x.shape[2:])
        if x.shape[1] == 1:
            x = xp.broadcast_to(x, (*x.shape[:3], fold, x.shape[4]))
        else:
            x = xp.moveaxis(x.reshape(x.shape[0], -1, fold, x.shape[2], x.shape[4]), 2, 3)
        return x.reshape(*x.shape[:3], -1)

    order = folded(order) + np.repeat(np.arange(fold, dtype=np.int32) * chunk, order.shape[-1])
    walk = steps(order, folded(live), folded(full))
    entries = walk.entries[..., : order.shape[2] * fold * chunk]
    return dataclasses.replace(
        walk, entries=entries if chunks == 1 else entries.reshape(chunks, -1, *entries.shape[1:])
    )


def _chunked(one: Any, size: int, entries: Any, by_query: Any) -> tuple[Any, Any]:
    """`one` for chunks of `size` queries (axis 2), one after the other: results put together, and added up."""
    chunks = entries.shape[0]

    def cut(x: Array) -> Array:
        x = jnp.pad(x, [(0, chunks * size - x.shape[n] if n == 2 else 0) for n in range(x.ndim)])
        return jnp.moveaxis(x.reshape(*x.shape[:2], chunks, size, *x.shape[3:]), 2, 0)

    def put(x: Array) -> Array:
        x = jnp.moveaxis(x, 0, 2)
        return x.reshape(*x.shape[:2], -1, *x.shape[4:])

    def body(sums: Any, chunk: Any) -> tuple[Any, Any]:
        own, shared = one(*chunk)
        return jax.tree.map(jnp.add, sums, shared), own

    given = jnp.asarray(entries), jax.tree.map(cut, by_query)
    sums = jax.eval_shape(one, *jax.tree.map(lambda x: x[0], given))[1]
    sums = alike(jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), sums), *jax.tree.leaves(given))
    sums, own = lax.scan(body, sums, given)
    return jax.tree.map(put, own), sums


def _run(call: Call, fold: int, walk: Steps, arrays: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """What belongs to queries ("q", "rows", "tile"), and to keys ("k" and "v" by group, "cols")."""
    q, d_out, lse, delta, row_streams, tile, k, v, col_streams = arrays
    (batch, heads, length, width), (keys, value), groups = q.shape, v.shape[2:], q.shape[1] // fold
    block_q, block_k, made = call.block_q, call.block_k, call.program
    per_head = length // block_q
    blocks = Blocks(call, walk, groups, k.shape[1], fold, per_head, query=inner, key=outer)

    def column(x: Array, *shape: int) -> Array:
        return x.reshape(batch, groups, *shape)

    def out(*shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, np.float32)

    def sums(width: int) -> tuple[Any, Any]:
        spec = blocks.spec((None, None, block_k, width), lambda b, g, e: (b, g, blocks.key(e), 0))
        return out(batch, groups, keys, width), spec

    every = fold * per_head
    whole = blocks.spec((None, None, every, block_q, width), lambda b, g, e: (b, g, 0, 0, 0))
    numbers = blocks.spec((None, None, every, 1, block_q), lambda b, g, e: (b, g, 0, 0, 0))
    by_head = blocks.spec((None, fold, None, 1, block_k), lambda b, g, e: (b, g, blocks.key(e), 0, 0))
    inputs = {
        "q": (column(q, -1, width), blocks.queries(width)),
        "d_out": (column(d_out, -1, value), blocks.queries(value)),
        "lse": (column(lse, -1, 1, block_q), blocks.numbers()),
        "delta": (column(delta, -1, 1, block_q), blocks.numbers()),
        "k": (k, blocks.keys(width)),
        "v": (v, blocks.keys(value)),
        **blocks.streams(Streams(row_streams, col_streams, tile)),
    }
    outputs = {
        "q": (out(batch, groups, every, block_q, width), whole),
        "k": sums(width),
        "v": sums(value),
        "rows": _each(made.float_rows(), out(batch, groups, every, 1, block_q), numbers),
        "cols": _each(made.float_cols(), out(batch, heads, keys // block_k, 1, block_k), by_head),
    }
    if "tile" in inputs and tile.dtype == np.float32:
        # Blocks that no step visits stay zero.
        outputs["tile"] = out(batch, heads, length, keys), blocks.tile(batch, heads)
        inputs["zeros"] = jnp.zeros((batch, heads, length, keys), np.float32), pl.BlockSpec(memory_space=pl.ANY)
    found = blocks.run(
        functools.partial(_kernel, blocks), "attention_backward", inputs, outputs,
        aliases=[("zeros", "tile")] if "zeros" in inputs else [], flops=2 * block_q * block_k * (3 * width + 2 * value),
    )  # fmt: skip
    own = {"q": found["q"].reshape(q.shape), "rows": jax.tree.map(lambda x: x.reshape(lse.shape), found["rows"])}
    if "tile" in found:
        own["tile"] = found["tile"]
    cols = jax.tree.map(lambda x: x.reshape(batch, heads, keys), found["cols"])
    return own, {"k": found["k"], "v": found["v"], "cols": cols}


def _each(numbers: tuple[int, ...], shape: Any, spec: Any) -> tuple[dict[int, Any], dict[int, Any]]:
    return {n: shape for n in numbers}, {n: spec for n in numbers}


def _kernel(blocks: Blocks, entries: Any, refs: Any, outs: Any) -> None:
    entry = blocks.entry(*(pl.program_id(n) for n in range(3)), entries)

    @pl.when(pl.program_id(2) == 0)
    def _() -> None:
        @pl.loop(0, outs["q"].shape[0])
        def _(n: Array) -> None:
            for ref in (outs["q"], *outs["rows"].values()):
                ref[n] = jnp.zeros(ref.shape[1:], ref.dtype)

    @pl.when(has(entry, FIRST))
    def _() -> None:
        for ref in (outs["k"], outs["v"], *outs["cols"].values()):
            ref[...] = jnp.zeros_like(ref)

    for condition, masked in blocks.bodies(entry):

        @pl.when(condition)
        def _(masked: bool = masked) -> None:
            _block(blocks, refs, outs, inner(entry), masked)

    if "tile" in outs:

        @pl.when(has(entry, FIRST) & ~has(entry, LIVE))
        def _() -> None:
            outs["tile"][...] = jnp.zeros_like(outs["tile"])


def _block(blocks: Blocks, refs: Any, outs: Any, at: Array, masked: bool) -> None:
    """The sums over one block; `at` is its place in the column of query blocks."""
    made, (block_k, _), (block_q, _) = blocks.call.program, refs["k"].shape, refs["q"].shape
    head = 0 if blocks.fold == 1 else lax.div(at, np.int32(blocks.per_head))
    part = part_of(block_k)
    q, d_out = refs["q"][...], refs["d_out"][...]
    lse, delta = refs["lse"][...] * LOG2E, refs["delta"][...]
    rows = [refs["rows"][n][...] if n in refs["rows"] else None for n in range(len(made.row_types))]
    columns = {n: turned(ref[...]) for n, ref in refs["cols"].items()}
    for start in range(0, block_k, part):
        keys = slice(start, start + part)
        k, v = refs["k"][keys, :], refs["v"][keys, :]
        cols = [wide(columns[n][keys], block_q) if n in columns else None for n in range(len(made.col_types))]
        s, pull = dot(k, q, 1, 1), None
        if made.linear:
            s = s * (made.scale * LOG2E)
        else:
            s, pull = made.scores_and_pull(s, rows, cols, refs["tile"][:, keys].T if "tile" in refs else None)
            s = s * LOG2E
        allowed = made.allowed(rows, cols) if masked else None
        only = (lambda x: jnp.where(allowed, x, 0)) if masked else (lambda x: x)  # noqa: B023
        p = only(jnp.exp2(s - lse))
        weights, d_p = p, dot(v, d_out, 1, 1)
        if made.drop is not None:
            kept = made.kept(rows, cols)
            weights, d_p = (jnp.where(kept, x * (1 / (1 - made.rate)), 0) for x in (p, d_p))
        outs["v"][keys, :] += dot(weights.astype(d_out.dtype), d_out, 1, 0)
        d_s = only(p * (d_p - delta))
        if pull is not None:
            *changed, d_tile = pull(d_s)
            d_s, d_rows, d_cols = jax.tree.map(only, changed)
            for n, ref in outs["rows"].items():
                ref[at] += d_rows[n].sum(0, keepdims=True)
            for n, ref in outs["cols"].items():
                ref[head, :, keys] += as_row(d_cols[n].sum(1, keepdims=True))
            if "tile" in outs:
                outs["tile"][:, keys] = only(d_tile).T
        d_s = d_s.astype(q.dtype)
        outs["k"][keys, :] += dot(d_s, q, 1, 0)
        outs["q"][at] += dot(d_s, k, 0, 0)
