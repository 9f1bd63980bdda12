"""Attention on NVIDIA GPUs by Triton: FlashAttention 2 (Dao 2023) over lists of live blocks, any elementwise program.

A program of the grid owns one block of queries (forward, dq) or of keys (dk and dv, which walk the query heads that
share a key head one after the other, so that nothing is added atomically). It reads which blocks of the other side are
live from lists in memory: first the full ones, where no mask is evaluated, then the partial ones.
"""

import contextlib
import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import triton
import triton.language as tl
from jaxtyping import Array, Float

from kernels import _triton
from kernels.attention.fused import Call, Sizes
from kernels.attention.program import Streams
from kernels.attention.triton_source import Functions, functions, is_linear, words
from kernels.attention.worklist import Lists, Visits
from kernels.platform import device_kind, interpreted

_LOG2E = tl.constexpr(math.log2(math.e))


@dataclasses.dataclass(frozen=True)
class _Static:
    """What a kernel is compiled for. Strides are 0 along axes that the lists, or the tile, do not have."""

    heads: int
    group: int  # Query heads of one key head.
    length: int
    keys: int
    width: int
    value_width: int
    block_q: int
    block_k: int
    rows_stride: int  # Between the gradients of two rows of streams, and of two columns.
    cols_stride: int
    visits: int  # The length of a list.
    list_batch: int
    list_head: int
    first: int  # Passes over the list: from 0 where there may be full blocks, to 2 where there may be partial ones.
    last: int
    tile: bool
    tile_batch: int
    tile_head: int
    tile_place: int  # Among the gradients that `Functions.pull` gives.
    exponent: float  # Scores times this are exponents of 2,
    natural: float  # times this, of e.
    gradient: float  # What the gradient of scores still lacks: the scale of a linear program.
    kept: float  # 1 / (1 - rate of dropout).
    precision: str
    f: Functions


@triton.jit
def _at(rows, cols, STRIDE: tl.constexpr):
    return rows[:, None] * STRIDE + cols[None, :]


@triton.jit
def _forward(q_ptr, k_ptr, v_ptr, words, tile_ptr, order, full, live, out_ptr, lse_ptr, X: tl.constexpr):
    BLOCK_Q: tl.constexpr = X.block_q
    BLOCK_K: tl.constexpr = X.block_k
    WIDTH: tl.constexpr = X.width
    VALUE_WIDTH: tl.constexpr = X.value_width
    FIRST: tl.constexpr = X.first
    LAST: tl.constexpr = X.last
    # The last queries of causal masks have most to do: they come first.
    block, head, batch = X.length // BLOCK_Q - 1 - tl.program_id(0), tl.program_id(1), tl.program_id(2)
    line = batch.to(tl.int64) * X.list_batch + head * X.list_head + block
    own = (batch * X.heads + head).to(tl.int64) * X.length
    shared = (batch * (X.heads // X.group) + head // X.group).to(tl.int64) * X.keys
    row, d, e = block * BLOCK_Q + tl.arange(0, BLOCK_Q), tl.arange(0, WIDTH), tl.arange(0, VALUE_WIDTH)
    k_ptr += shared * WIDTH
    v_ptr += shared * VALUE_WIDTH
    tile_ptr += batch.to(tl.int64) * X.tile_batch + head.to(tl.int64) * X.tile_head
    order += line * X.visits

    rows = X.f.rows(words, batch, head, row[:, None])
    q = tl.load(q_ptr + own * WIDTH + _at(row, d, WIDTH))
    acc = tl.zeros((BLOCK_Q, VALUE_WIDTH), tl.float32)
    total = tl.zeros((BLOCK_Q,), tl.float32)
    top = tl.full((BLOCK_Q,), -float("inf"), tl.float32)
    many = tl.load(full + line)
    for PARTIAL in tl.static_range(FIRST, LAST):
        begin, end = many * PARTIAL, tl.load(live + line) if PARTIAL else many
        col_block = tl.load(order + begin, mask=begin < end, other=0)
        for place in range(begin, end):
            col = col_block * BLOCK_K + tl.arange(0, BLOCK_K)
            col_block = tl.load(order + tl.minimum(place + 1, end - 1))
            cols = X.f.cols(words, batch, head, col[None, :])
            k = tl.load(k_ptr + _at(col, d, WIDTH))
            s = tl.dot(q, tl.trans(k), input_precision=X.precision)
            if X.f.scores is not None:
                tile = tl.load(tile_ptr + _at(row.to(tl.int64), col, X.keys)) if X.tile else None
                s = X.f.scores(s, rows, cols, tile)
            if PARTIAL:
                s = tl.where(X.f.allowed(words, batch, head, row[:, None], col[None, :]), s, -float("inf"))
            new = tl.maximum(top, tl.max(s, 1))
            base = tl.where(new == -float("inf"), 0.0, new * X.exponent)
            p = tl.exp2(s * X.exponent - base[:, None])
            shrink = tl.exp2(top * X.exponent - base)
            total = total * shrink + tl.sum(p, 1)
            top = new
            if X.f.kept is not None:
                p = tl.where(X.f.kept(rows, cols), p, 0.0)
            v = tl.load(v_ptr + _at(col, e, VALUE_WIDTH))
            acc = tl.dot(p.to(v.dtype), v, acc * shrink[:, None], input_precision=X.precision)

    empty = total == 0.0
    out = acc * (X.kept / tl.where(empty, 1.0, total))[:, None]
    tl.store(out_ptr + own * VALUE_WIDTH + _at(row, e, VALUE_WIDTH), out.to(q.dtype))
    tl.store(lse_ptr + own + row, tl.where(empty, -float("inf"), top * X.natural + tl.log(total)))


@triton.jit
def _slopes(s, d_p, lse, delta, rows, cols, tile, live, X: tl.constexpr):
    """From q.k and d_out.v of a block: the probabilities that multiply values, and gradients, that of q.k first."""
    x = s if X.f.scores is None else X.f.scores(s, rows, cols, tile)
    p = tl.exp2(x * X.exponent - lse)
    if live is not None:
        p = tl.where(live, p, 0.0)
    dropped = p
    if X.f.kept is not None:
        kept = X.f.kept(rows, cols)
        dropped = tl.where(kept, p, 0.0)
        d_p = tl.where(kept, d_p * X.kept, 0.0)
    ds = p * (d_p - delta)
    if live is not None:
        ds = tl.where(live, ds, 0.0)
    pulled = (ds,) if X.f.pull is None else X.f.pull(s, ds, rows, cols, tile, live)
    return dropped, pulled


@triton.jit
def _backward_q(
    q_ptr, k_ptr, v_ptr, d_out_ptr, lse_ptr, delta_ptr, words, tile_ptr, order, full, live,
    d_q_ptr, d_rows_ptr, d_tile_ptr, X: tl.constexpr,
):  # fmt: skip
    BLOCK_Q: tl.constexpr = X.block_q
    BLOCK_K: tl.constexpr = X.block_k
    WIDTH: tl.constexpr = X.width
    VALUE_WIDTH: tl.constexpr = X.value_width
    FIRST: tl.constexpr = X.first
    LAST: tl.constexpr = X.last
    block, head, batch = X.length // BLOCK_Q - 1 - tl.program_id(0), tl.program_id(1), tl.program_id(2)
    line = batch.to(tl.int64) * X.list_batch + head * X.list_head + block
    own = (batch * X.heads + head).to(tl.int64) * X.length
    shared = (batch * (X.heads // X.group) + head // X.group).to(tl.int64) * X.keys
    row, d, e = block * BLOCK_Q + tl.arange(0, BLOCK_Q), tl.arange(0, WIDTH), tl.arange(0, VALUE_WIDTH)
    k_ptr += shared * WIDTH
    v_ptr += shared * VALUE_WIDTH
    tile_ptr += batch.to(tl.int64) * X.tile_batch + head.to(tl.int64) * X.tile_head
    order += line * X.visits

    rows = X.f.rows(words, batch, head, row[:, None])
    q = tl.load(q_ptr + own * WIDTH + _at(row, d, WIDTH))
    d_out = tl.load(d_out_ptr + own * VALUE_WIDTH + _at(row, e, VALUE_WIDTH))
    lse = tl.load(lse_ptr + own + row)[:, None] * _LOG2E
    delta = tl.load(delta_ptr + own + row)[:, None]
    acc = tl.zeros((BLOCK_Q, WIDTH), tl.float32)
    sums = X.f.zero_rows(BLOCK_Q) if X.f.add_rows is not None else ()
    many = tl.load(full + line)
    for PARTIAL in tl.static_range(FIRST, LAST):
        begin, end = many * PARTIAL, tl.load(live + line) if PARTIAL else many
        col_block = tl.load(order + begin, mask=begin < end, other=0)
        for place in range(begin, end):
            col = col_block * BLOCK_K + tl.arange(0, BLOCK_K)
            col_block = tl.load(order + tl.minimum(place + 1, end - 1))
            cols = X.f.cols(words, batch, head, col[None, :])
            k = tl.load(k_ptr + _at(col, d, WIDTH))
            v = tl.load(v_ptr + _at(col, e, VALUE_WIDTH))
            s = tl.dot(q, tl.trans(k), input_precision=X.precision)
            d_p = tl.dot(d_out, tl.trans(v), input_precision=X.precision)
            tile = tl.load(tile_ptr + _at(row.to(tl.int64), col, X.keys)) if X.tile else None
            allowed = X.f.allowed(words, batch, head, row[:, None], col[None, :]) if PARTIAL else None
            _, pulled = _slopes(s, d_p, lse, delta, rows, cols, tile, allowed, X)
            acc = tl.dot(pulled[0].to(k.dtype), k, acc, input_precision=X.precision)
            if X.f.add_rows is not None:
                sums = X.f.add_rows(sums, pulled)
            if X.tile:
                tl.store(d_tile_ptr + own * X.keys + _at(row.to(tl.int64), col, X.keys), pulled[X.tile_place])

    tl.store(d_q_ptr + own * WIDTH + _at(row, d, WIDTH), (acc * X.gradient).to(q.dtype))
    if X.f.store_rows is not None:
        X.f.store_rows(d_rows_ptr, sums, X.rows_stride, own + row)


@triton.jit
def _backward_kv(
    q_ptr, k_ptr, v_ptr, d_out_ptr, lse_ptr, delta_ptr, words, tile_ptr, order, full, live,
    d_k_ptr, d_v_ptr, d_cols_ptr, X: tl.constexpr,
):  # fmt: skip
    """Blocks lie the other way round here, [keys, queries]: a product is never transposed after it was made."""
    BLOCK_Q: tl.constexpr = X.block_q
    BLOCK_K: tl.constexpr = X.block_k
    WIDTH: tl.constexpr = X.width
    VALUE_WIDTH: tl.constexpr = X.value_width
    FIRST: tl.constexpr = X.first
    LAST: tl.constexpr = X.last
    block, kv_head, batch = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    own = (batch * (X.heads // X.group) + kv_head).to(tl.int64) * X.keys
    col, d, e = block * BLOCK_K + tl.arange(0, BLOCK_K), tl.arange(0, WIDTH), tl.arange(0, VALUE_WIDTH)

    k = tl.load(k_ptr + own * WIDTH + _at(col, d, WIDTH))
    v = tl.load(v_ptr + own * VALUE_WIDTH + _at(col, e, VALUE_WIDTH))
    d_k = tl.zeros((BLOCK_K, WIDTH), tl.float32)
    d_v = tl.zeros((BLOCK_K, VALUE_WIDTH), tl.float32)
    for member in range(X.group):
        head = kv_head * X.group + member
        line = batch.to(tl.int64) * X.list_batch + head * X.list_head + block
        other = (batch * X.heads + head).to(tl.int64) * X.length
        tile_start = batch.to(tl.int64) * X.tile_batch + head.to(tl.int64) * X.tile_head
        cols = X.f.cols(words, batch, head, col[:, None])
        sums = X.f.zero_cols(BLOCK_K) if X.f.add_cols is not None else ()
        many, listed = tl.load(full + line), order + line * X.visits
        for PARTIAL in tl.static_range(FIRST, LAST):
            begin, end = many * PARTIAL, tl.load(live + line) if PARTIAL else many
            row_block = tl.load(listed + begin, mask=begin < end, other=0)
            for place in range(begin, end):
                row = row_block * BLOCK_Q + tl.arange(0, BLOCK_Q)
                row_block = tl.load(listed + tl.minimum(place + 1, end - 1))
                rows = X.f.rows(words, batch, head, row[None, :])
                lse = tl.load(lse_ptr + other + row)[None, :] * _LOG2E
                delta = tl.load(delta_ptr + other + row)[None, :]
                q = tl.load(q_ptr + other * WIDTH + _at(row, d, WIDTH))
                d_out = tl.load(d_out_ptr + other * VALUE_WIDTH + _at(row, e, VALUE_WIDTH))
                s = tl.dot(k, tl.trans(q), input_precision=X.precision)
                d_p = tl.dot(v, tl.trans(d_out), input_precision=X.precision)
                turned = tile_start + row.to(tl.int64)[None, :] * X.keys + col[:, None]
                tile = tl.load(tile_ptr + turned) if X.tile else None
                allowed = X.f.allowed(words, batch, head, row[None, :], col[:, None]) if PARTIAL else None
                p, pulled = _slopes(s, d_p, lse, delta, rows, cols, tile, allowed, X)
                d_v = tl.dot(p.to(d_out.dtype), d_out, d_v, input_precision=X.precision)
                d_k = tl.dot(pulled[0].to(q.dtype), q, d_k, input_precision=X.precision)
                if X.f.add_cols is not None:
                    sums = X.f.add_cols(sums, pulled)
        if X.f.store_cols is not None:
            X.f.store_cols(d_cols_ptr, sums, X.cols_stride, (batch * X.heads + head).to(tl.int64) * X.keys + col)

    tl.store(d_k_ptr + own * WIDTH + _at(col, d, WIDTH), (d_k * X.gradient).to(k.dtype))
    tl.store(d_v_ptr + own * VALUE_WIDTH + _at(col, e, VALUE_WIDTH), (d_v * X.kept).to(v.dtype))


def padded(width: int) -> int:
    """The head width that the kernels want: a power of two, at least 16."""
    return max(16, triton.next_power_of_2(width))


def chosen(q: tuple[int, ...], k: tuple[int, ...], v: tuple[int, ...], dtype: Any) -> Sizes:
    """Blocks of queries and keys, forwards and backwards; no larger than the sequences."""
    wide = max(padded(q[3]), padded(v[3]))
    if jnp.dtype(dtype).itemsize == 4:  # Exact products are made without tensor cores, from registers.
        sizes = Sizes((32, 32 if wide <= 64 else 16), (32, 32))
    elif wide <= 64:
        sizes = Sizes((128, 64), (64, 64))
    elif wide <= 128:
        sizes = Sizes((128, 128 if _shared_memory() >= 227 else 64), (64, 64))
    else:
        sizes = Sizes((128, 32), (64 if _shared_memory() >= 163 else 32, 32))
    most = padded(q[1]), padded(k[1])
    return Sizes(*((min(a, most[0]), min(b, most[1])) for a, b in sizes))


def forward(
    call: Call,
    q: Float[Array, "B H T D"],
    k: Float[Array, "B Hk S D"],
    v: Float[Array, "B Hk S E"],
    streams: Streams,
    lists: Lists,
) -> tuple[Float[Array, "B H T E"], Float[Array, "B H T"]]:
    """Output in q's type and natural log-sum-exp; whole blocks (see `kernels.attention.fused`)."""
    static = _static(call, q, k, v, streams, "by_query", lists)
    out = jax.ShapeDtypeStruct((*q.shape[:3], v.shape[3]), q.dtype), _floats(*q.shape[:3])
    grid = q.shape[2] // call.block_q, q.shape[1], q.shape[0]
    options = _options(static, streams, q.dtype.itemsize, backward=False)
    with interpreted() if call.interpret else contextlib.nullcontext():
        return _triton.call(
            _forward, q, k, v, *_read(streams), *lists.by_query, out_shape=out, grid=grid, X=static, **options
        )


def backward(
    call: Call,
    q: Float[Array, "B H T D"],
    k: Float[Array, "B Hk S D"],
    v: Float[Array, "B Hk S E"],
    d_out: Float[Array, "B H T E"],
    lse: Float[Array, "B H T"],
    delta: Float[Array, "B H T"],
    streams: Streams,
    lists: Lists,
) -> tuple[Array, Array, Array, Streams]:
    """Gradients of q, k, v in their types, and of the streams for each batch row and head; None where there is none."""
    (batch, heads, length, _), keys, program = q.shape, k.shape[2], call.program
    float_rows, float_cols = ((), ()) if program.linear else (program.float_rows(), program.float_cols())
    inputs = q, k, v, d_out, lse, delta, *_read(streams)
    with interpreted() if call.interpret else contextlib.nullcontext():
        static = _static(call, q, k, v, streams, "by_query", lists)
        d_rows, d_tile = _floats(len(float_rows), batch, heads, length), _floats(batch, heads, length, keys)
        d_q, d_rows, d_tile = _triton.call(
            _backward_q,
            *inputs,
            *lists.by_query,
            out_shape=(_like(q), d_rows if float_rows else _floats(1), d_tile if static.tile else _floats(1)),
            grid=(length // call.block_q, heads, batch),
            X=static,
            **_options(static, streams, q.dtype.itemsize, backward=True),
        )
        static = _static(call, q, k, v, streams, "by_key", lists)
        d_cols = _floats(len(float_cols), batch, heads, keys)
        d_k, d_v, d_cols = _triton.call(
            _backward_kv,
            *inputs,
            *lists.by_key,
            out_shape=(_like(k), _like(v), d_cols if float_cols else _floats(1)),
            grid=(keys // call.block_k, k.shape[1], batch),
            X=static,
            **_options(static, streams, q.dtype.itemsize, backward=True),
        )
    by_row, by_col = dict(zip(float_rows, d_rows, strict=False)), dict(zip(float_cols, d_cols, strict=False))
    return d_q, d_k, d_v, Streams(
        tuple(by_row.get(n) for n in range(len(streams.rows))),
        tuple(by_col.get(n) for n in range(len(streams.cols))),
        _only_live(d_tile, lists.by_query, call) if static.tile else None,
    )  # fmt: skip


def _static(call: Call, q: Array, k: Array, v: Array, streams: Streams, side: str, lists: Lists) -> _Static:
    program, (_, heads, length, width), keys = call.program, q.shape, k.shape[2]
    linear = is_linear(program)
    batches, list_heads, blocks, longest = getattr(lists, side).order.shape
    known: Visits | None = getattr(call.known, side) if call.known else None
    tile = streams.tile
    return _Static(
        heads=heads,
        group=heads // k.shape[1],
        length=length,
        keys=keys,
        width=width,
        value_width=v.shape[3],
        block_q=call.block_q,
        block_k=call.block_k,
        rows_stride=q.shape[0] * heads * length,
        cols_stride=q.shape[0] * heads * keys,
        visits=longest,
        list_batch=list_heads * blocks if batches > 1 else 0,
        list_head=blocks if list_heads > 1 else 0,
        first=int(known is not None and not known.full.any()),
        last=1 if known is not None and (known.live == known.full).all() else 2,
        tile=tile is not None and not linear,
        tile_batch=tile.shape[1] * length * keys if tile is not None and tile.shape[0] > 1 else 0,
        tile_head=length * keys if tile is not None and tile.shape[1] > 1 else 0,
        tile_place=0 if linear else 1 + len(program.float_rows()) + len(program.float_cols()),
        exponent=program.scale * _LOG2E.value if linear else _LOG2E.value,
        natural=program.scale if linear else 1.0,
        gradient=program.scale if linear else 1.0,
        kept=1 / (1 - program.rate),
        precision="ieee" if q.dtype == jnp.float32 else "tf32",
        f=functions(program, streams),
    )


def _options(static: _Static, streams: Streams, itemsize: int, backward: bool) -> dict[str, int]:
    """Warps for sizes as those of `chosen`, and as many stages of loads as fit beside what a program keeps."""
    block_q, block_k, row = static.block_q, static.block_k, (static.width + static.value_width) * itemsize
    eight = itemsize == 4 or (not backward and block_q * max(static.width, static.value_width) >= 128 * 128)
    own = max(block_q, block_k) * row if backward else block_q * static.width * itemsize
    stage = (max(block_q, block_k) if backward else block_k) * row
    # A tile and columns are loaded one stage later than keys and values.
    later = 4 * (block_q * static.tile + len(streams.cols)) * block_k
    fitting = (_shared_memory() * 1024 - own + later) // (stage + later)
    most = 2 if backward or itemsize == 4 else 3
    return {"num_warps": 8 if eight else 4, "num_stages": max(1, min(most, fitting))}


def _shared_memory() -> int:
    """KiB of shared memory that one program may have on the device compiled for."""
    kind = device_kind()
    if any(name in kind for name in ("H100", "H200", "H800", "H20", "B200", "B300")):
        return 227
    return 163 if "A100" in kind else 99


def _read(streams: Streams) -> tuple[Array, Array]:
    """The streams as kernels take them; where there is no tile, anything stands in its place."""
    buffer = words(streams)
    return buffer, buffer if streams.tile is None else streams.tile


def _floats(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def _like(x: Array) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype)


def _only_live(d_tile: Float[Array, "B H T S"], visits: Visits, call: Call) -> Float[Array, "B H T S"]:
    """Zeros in the blocks that no program visited."""
    whole, (batches, heads, blocks, longest) = d_tile.shape, visits.order.shape
    listed = jnp.arange(longest) < visits.live[..., None]
    at = (*np.ix_(range(batches), range(heads), range(blocks)), visits.order.transpose(3, 0, 1, 2))
    live = jnp.zeros((batches, heads, blocks, whole[3] // call.block_k), bool).at[at].max(listed.transpose(3, 0, 1, 2))
    parts = d_tile.reshape(*whole[:2], blocks, call.block_q, -1, call.block_k)
    return jnp.where(live[:, :, :, None, :, None], parts, 0).reshape(whole)
