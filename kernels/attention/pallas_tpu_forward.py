"""The forward pass on TPU: online softmax over the live key blocks of each query block."""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array

from kernels.attention.fused import Call
from kernels.attention.pallas_tpu_blocks import (
    FIRST,
    LAST,
    LN2,
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
from kernels.attention.pallas_tpu_sizes import LANES, part_of
from kernels.attention.program import Streams
from kernels.attention.worklist import Lists


def forward(call: Call, q: Array, k: Array, v: Array, streams: Streams, lists: Lists) -> tuple[Array, Array]:
    """Output and lse, as `kernels.attention.fused.Kernel` says."""
    order, full, live = (lists if call.known is None else call.known).by_query
    place = np.arange(order.shape[3])
    walk = steps(order, place < live[..., None], place < full[..., None])
    found = in_parts(functools.partial(_run, call), walk, (q, k, v, streams))
    return found["out"], found["lse"].reshape(q.shape[:3])


def _run(call: Call, walk: Steps, arrays: Any) -> dict[str, Array]:
    q, k, v, streams = arrays
    batch, heads, length, width = q.shape
    value, block_q, block_k = v.shape[3], call.block_q, call.block_k
    blocks = Blocks(call, walk, heads, k.shape[1], 1, length // block_q, query=outer, key=inner)
    lanes = math.gcd(part_of(block_k), LANES)
    return blocks.run(
        functools.partial(_kernel, blocks),
        "attention_forward",
        {
            "q": (q, blocks.queries(width)),
            "k": (k, blocks.keys(width)),
            "v": (v, blocks.keys(value)),
            **blocks.streams(streams),
        },
        {
            "out": (jax.ShapeDtypeStruct((batch, heads, length, value), q.dtype), blocks.queries(value)),
            "lse": (jax.ShapeDtypeStruct((batch, heads, length // block_q, 1, block_q), np.float32), blocks.numbers()),
        },
        scratch=[pltpu.VMEM((block_q, n), np.dtype(np.float32)) for n in (lanes, lanes, value)],
        flops=2 * block_q * block_k * (width + value),
    )


def _kernel(blocks: Blocks, entries: Any, refs: Any, outs: Any, top: Any, total: Any, acc: Any) -> None:
    """`top` is the greatest score so far, base 2, `total` the sum of exponentials lane by lane, `acc` the output's."""
    entry = blocks.entry(*(pl.program_id(n) for n in range(3)), entries)

    @pl.when(has(entry, FIRST))
    def _() -> None:
        top[...] = jnp.full_like(top, -jnp.inf)
        total[...] = jnp.zeros_like(total)
        acc[...] = jnp.zeros_like(acc)

    for condition, masked in blocks.bodies(entry):

        @pl.when(condition)
        def _(masked: bool = masked) -> None:
            _block(blocks, refs, top, total, acc, masked)

    @pl.when(has(entry, LAST))
    def _() -> None:
        sums = total[...].sum(-1, keepdims=True)
        empty = sums == 0
        sums = jnp.where(empty, 1, sums)
        outs["out"][...] = (acc[...] / sums).astype(outs["out"].dtype)
        outs["lse"][...] = as_row(jnp.where(empty, -jnp.inf, (top[...] + jnp.log2(sums)) * LN2))


def _block(blocks: Blocks, refs: Any, top: Any, total: Any, acc: Any, masked: bool) -> None:
    made, block_k = blocks.call.program, blocks.call.block_k
    part = part_of(block_k)
    columns = {n: turned(ref[...]) for n, ref in refs["rows"].items()}
    rows = [wide(columns[n], part) if n in columns else None for n in range(len(made.row_types))]
    for start in range(0, block_k, part):
        keys = slice(start, start + part)
        cols = [refs["cols"][n][:, keys] if n in refs["cols"] else None for n in range(len(made.col_types))]
        s = dot(refs["q"][...], refs["k"][keys, :], 1, 1)
        if made.linear:
            s = s * (made.scale * LOG2E)
        else:
            s = made.scores(s, rows, cols, refs["tile"][:, keys] if "tile" in refs else None) * LOG2E
        if masked:
            s = jnp.where(made.allowed(rows, cols), s, -jnp.inf)
        before = top[...]
        now = jnp.maximum(before, s.max(-1, keepdims=True))
        top[...] = now
        now = jnp.where(now == -jnp.inf, 0, now)  # Nothing seen yet: every exponential is 0.
        p, kept = jnp.exp2(s - wide(now, part)), jnp.exp2(before - now)
        lanes = total.shape[1]
        total[...] = kept * total[...] + sum(p[:, n : n + lanes] for n in range(0, part, lanes))
        if made.drop is not None:
            p = jnp.where(made.kept(rows, cols), p * (1 / (1 - made.rate)), 0)
        v = refs["v"][keys, :]
        acc[...] = wide(kept, acc.shape[1]) * acc[...] + dot(p.astype(v.dtype), v, 1, 0)
