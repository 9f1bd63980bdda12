"""A kernel in plain jnp that keeps to the contract of `kernels.attention.fused.Kernel`: it sees only blocks that are on
the lists, and looks at the mask only in those that are not full. So what is around kernels is tested without a kernel's
own difficulties."""

import jax
import jax.numpy as jnp
import numpy as np

from kernels.attention.fused import Sizes
from kernels.attention.program import Streams

SIZES = Sizes((16, 8), (8, 16))


def chosen(q, k, v, dtype):
    return SIZES


def padded(width):
    return -(-width // 8) * 8


def forward(call, q, k, v, streams, lists):
    seen, full = _maps(lists.by_query, k.shape[2] // call.block_k, (call.block_q, call.block_k))

    @_every_head
    def head(q, k, v, streams, seen, full):
        columns = _columns(streams)
        s = call.program.scores(_dot(q, k), *columns)
        s = jnp.where(_visible(call, columns, seen, full), s, -jnp.inf)
        top = s.max(1, keepdims=True)
        top = jnp.where(top == -jnp.inf, 0, top)
        p = jnp.exp(s - top)
        total = p.sum(1, keepdims=True)
        lse = jnp.where(total == 0, -jnp.inf, top + jnp.log(total))[:, 0]
        return _dot(_dropped(call, columns, p), v.T) / jnp.where(total == 0, 1, total), lse

    out, lse = head(q, *_repeated(q, k, v), streams, seen, full)
    return out.astype(q.dtype), lse


def backward(call, q, k, v, d_out, lse, delta, streams, lists):
    maps = _maps(lists.by_key, q.shape[2] // call.block_q, (call.block_k, call.block_q))
    seen, full = (x.swapaxes(2, 3) for x in maps)

    @_every_head
    def head(q, k, v, d_out, lse, delta, streams, seen, full):
        columns = _columns(streams)
        s, pull = call.program.scores_and_pull(_dot(q, k), *columns)
        visible = _visible(call, columns, seen, full)
        p = jnp.where(visible, jnp.exp(s - lse[:, None]), 0)
        d_p = _dropped(call, columns, _dot(d_out, v))
        ds = jnp.where(visible, p * (d_p - delta[:, None]), 0)
        ds, d_rows, d_cols, d_tile = jax.tree.map(lambda x: jnp.where(visible, x, 0), pull(ds))
        d_rows, d_cols = (tuple(x if x is None else x.sum(n) for x in d) for n, d in ((1, d_rows), (0, d_cols)))
        d_streams = Streams(d_rows, d_cols, d_tile)
        return _dot(ds, k.T), _dot(ds.T, q.T), _dot(_dropped(call, columns, p).T, d_out.T), d_streams

    d_q, *d_kv, d_streams = head(q, *_repeated(q, k, v), d_out, lse, delta, streams, seen, full)
    d_k, d_v = (x.reshape(*k.shape[:2], -1, *x.shape[2:]).sum(2) for x in d_kv)
    return d_q, d_k, d_v, d_streams


def _maps(visits, blocks, sizes):
    """Which pairs [B|1, H|1, rows, columns] lie in listed blocks, and which in full ones."""
    order, full, live = map(jnp.asarray, visits)
    chosen, place = order[..., None] == np.arange(blocks), np.arange(order.shape[3])
    maps = ((chosen & (place < count[..., None])[..., None]).any(3) for count in (live, full))
    return [jnp.repeat(jnp.repeat(x, sizes[0], 2), sizes[1], 3) for x in maps]


def _every_head(function):
    """Over batch rows and heads, where an axis of size 1 stands for all."""

    def call(*arguments):
        whole = arguments[0].shape[:2]
        spread = jax.tree.map(lambda x: jnp.broadcast_to(x, (*whole, *x.shape[2:])), arguments)
        return jax.vmap(jax.vmap(function))(*spread)

    return call


def _repeated(q, *arrays):
    return (jnp.repeat(x, q.shape[1] // x.shape[1], axis=1) for x in arrays)


def _columns(streams):
    return [x[:, None] for x in streams.rows], [x[None] for x in streams.cols], streams.tile


def _visible(call, columns, seen, full):
    allowed = call.program.allowed(*columns[:2])
    return seen if allowed is None else seen & (full | allowed)


def _dropped(call, columns, p):
    kept = call.program.kept(*columns[:2])
    return p if kept is None else jnp.where(kept, p / (1 - call.program.rate), 0)


def _dot(a, b):
    return jnp.dot(a, b.T, precision="highest", preferred_element_type=jnp.float32)
