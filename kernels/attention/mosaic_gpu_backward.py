"""Attention backward on Hopper, in two kernels without atomics, so that results repeat bit by bit.

One walks over keys and makes the gradient of queries, the other walks over queries, of all heads that share a key
head, and makes those of keys and values from transposed scores. Both make the scores anew (FlashAttention-2).
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float

from kernels import _compat
from kernels import _mosaic_gpu as hopper
from kernels._mosaic_gpu import COL, ROW, TILE, Products, Ring, Visits
from kernels.attention.mosaic_gpu_program import Streamed, approximable, lowerable, pulled, unsupported
from kernels.attention.program import Program, Streams
from kernels.varying import result

_LOG2E = math.log2(math.e)
_ROWS = 64  # Queries or keys that one warpgroup owns, and that it meets in one step.


def queries_shape(block_q: int, width: int, value_width: int) -> tuple[int, int, int]:
    """Of the kernel for queries: computing warpgroups, stages, bytes of shared memory."""
    tile = 2 * _ROWS * (width + value_width)
    groups = 2 if block_q % (2 * _ROWS) == 0 and hopper.stages(2 * tile, tile, most=2, least=0) == 2 else 1
    stages = hopper.stages(groups * tile, tile, most=3)
    return groups, stages, (groups + stages) * tile


def keys_shape(block_k: int, width: int, value_width: int) -> tuple[int, int, int]:
    """Of the kernel for keys: warpgroups that own keys, stages, bytes of shared memory.

    With one owner both computing warpgroups have the same keys, and one makes the gradient of v, the other that of k:
    both accumulators would be too many registers for one.
    """
    tile, statistics = 2 * _ROWS * (width + value_width), 8 * _ROWS
    owners = 2 if block_k % (2 * _ROWS) == 0 and width + value_width <= 256 else 1
    stages = hopper.stages(owners * tile, tile + statistics, most=3)
    return owners, stages, (owners + stages) * tile + stages * statistics


def backward(
    call: Any,
    q: Float[Array, "B H T D"],
    k: Float[Array, "B Hk S D"],
    v: Float[Array, "B Hk S Dv"],
    d_out: Float[Array, "B H T Dv"],
    lse: Float[Array, "B H T"],
    delta: Float[Array, "B H T"],
    streams: Streams,
    lists: Any,
) -> tuple[Float[Array, "B H T D"], Float[Array, "B Hk S D"], Float[Array, "B Hk S Dv"], Streams]:
    """Gradients of whole blocks (`kernels.attention.fused.Kernel`).

    Raises: `NotImplementedError` for blocks the tensor cores cannot do, and for operations Mosaic GPU lacks.
    """
    unsupported(call.program, call.block_q, call.block_k)
    statistics = jnp.stack([lse * _LOG2E, delta], axis=2)
    d_q, d_rows, d_tile = _queries(call, q, k, v, d_out, statistics, streams, lists.by_query)
    d_k, d_v, d_cols = _keys(call, q, k, v, d_out, statistics, streams, lists.by_key)
    return d_q, d_k, d_v, Streams(d_rows, d_cols, d_tile)


class _Scores(NamedTuple):
    """What is known of a block before the gradient of its probabilities arrives."""

    p: Array
    weights: Array  # The probabilities that met the values, after dropout.
    kept: Callable[[Array], Array]  # The gradient of p from that of weights.
    pull: Callable[[Array], Any] | None  # Makes gradients of raw scores, rows, columns and tile from that of scores.


def _scores(program: Program, s: Array, lse: Array, columns: Any, tile: Any, masked: bool) -> _Scores:
    """`lse` is in units of log 2. Of linear programs the gradient of raw scores is that of scores times `scale`."""
    changed = s * program.scale
    if not program.linear:
        changed = plgpu.layout_cast(lowerable(program.scores)(s, *columns, tile), TILE)
    allowed = lowerable(program.allowed)(*columns) if masked else None
    kept, factor = lowerable(program.kept)(*columns), 1 / (1 - program.rate)

    def only(where: Any, x: Array) -> Array:
        return x if where is None else jnp.where(where, x, 0.0)

    def pull(d_s: Array) -> Any:
        # Where no key or no query is, scores are 0, and a function may have no slope there.
        return jax.tree.map(lambda x: only(d_s != 0, x), pulled(program, s, columns, tile, d_s))

    p = only(allowed, jnp.exp2(changed * _LOG2E - lse))
    return _Scores(
        p,
        p if kept is None else only(kept, p * factor),
        lambda d_p: d_p if kept is None else only(kept, d_p * factor),
        None if program.linear else pull,
    )


def _queries(
    call: Any, q: Array, k: Array, v: Array, d_out: Array, statistics: Array, streams: Streams, visits: Any
) -> tuple[Array, tuple[Any, ...], Array | None]:
    """The gradients of q, and of the program's rows and tile."""
    program, block_q, block_k = call.program, call.block_q, call.block_k
    (batch, heads, length, width), value_width = q.shape, v.shape[3]
    groups, stages, _ = queries_shape(block_q, width, value_width)
    owned, ratio = groups * _ROWS, heads // k.shape[1]
    streamed, products = Streamed(program), Products(call.interpret)
    wanted, whole = program.float_rows(), _float_tile(program, streams)

    def attention_queries(
        q_ref: Any, k_ref: Any, v_ref: Any, do_ref: Any, statistics_ref: Any, lists: Any, streams: Any,
        dq_ref: Any, d_row_refs: Any, d_tile_ref: Any,
        q_tiles: Any, do_tiles: Any, loaded: Any, k_ring: Any, v_ring: Any, spare: Any,
    ) -> None:  # fmt: skip
        k_ring, v_ring = Ring(*k_ring), Ring(*v_ring)
        group, row, head = (lax.axis_index(name) for name in ("group", "batch", "head"))
        first = length - owned - lax.axis_index("tile") * owned  # The longest first where the mask is causal.
        visits = Visits.of(lists, row, head, lax.div(first, block_q), block_k, _ROWS)

        @pl.when(group < groups)
        def _() -> None:
            hopper.more_registers(groups)
            queries = pl.ds(first + group * _ROWS, _ROWS)
            q_tile, do_tile = q_tiles.at[group], do_tiles.at[group]
            plgpu.copy_gmem_to_smem(q_ref.at[row, queries, head], q_tile, loaded.at[group])
            plgpu.copy_gmem_to_smem(do_ref.at[row, queries, head], do_tile, loaded.at[group])
            lse, delta = (_compat.load(statistics_ref.at[row, head, n, queries], ROW) for n in (0, 1))
            q_columns = streamed.rows(streams, row, head, queries)
            plgpu.barrier_wait(loaded.at[group])

            def visit(step: Any, first_key: Any, carry: Any, masked: bool) -> Any:
                d_q, d_rows = carry
                k_ring.wait(step)
                (k_tile,), (v_tile,) = k_ring.at(step), v_ring.at(step)

                def scores(s_ref: Any, dp_ref: Any) -> Any:
                    products.start(s_ref, q_tile, k_tile.T)
                    v_ring.wait(step)
                    products.start(dp_ref, do_tile, v_tile.T)
                    keys = None if first_key is None else pl.ds(first_key, _ROWS)
                    k_columns = streamed.cols(streams, row, head, keys, masked)
                    tile = streamed.tile(streams, row, head, queries, keys)
                    s = plgpu.wgmma_accumulator_load(s_ref, wait_n=1)
                    columns = streamed.wide(q_columns, k_columns, s.shape)
                    wide = lambda x: lax.broadcast_in_dim(x, s.shape, [0])  # noqa: E731
                    of = _scores(program, s, wide(lse), columns, tile, masked)
                    d_s, d_wide = of.p * (of.kept(dp_ref[...]) - wide(delta)), []
                    if of.pull is not None:
                        d_s, d_wide, _, d_tile = of.pull(d_s)
                        if whole:
                            d_tile_ref[row, head, queries, keys] = d_tile
                    return d_s, d_wide

                acc = plgpu.ACC((_ROWS, _ROWS), jnp.float32)
                d_s, d_wide = pl.run_scoped(scores, acc, acc)
                v_ring.release(step)
                d_rows = [d + wide.sum(axis=1) for d, wide in zip(d_rows, d_wide, strict=True)]
                d_s = d_s.astype(q.dtype)
                (d_q,) = products.add([d_q], [(lambda: d_s, k_tile)], spare.at[group] if call.interpret else None)
                k_ring.release(step)
                return d_q, d_rows

            d_q = plgpu.layout_cast(jnp.zeros((_ROWS, width), jnp.float32), TILE)
            carry = d_q, [plgpu.layout_cast(jnp.zeros((_ROWS,), jnp.float32), ROW) for _ in wanted]
            for masked in (False, True) if program.mask is not None else (False,):
                steps = (visits.masked, visits.end) if masked else (0, visits.masked)
                place = streamed.looks_up("col", visits, masked)
                carry = hopper.each(*steps, functools.partial(visit, masked=masked), carry, place)
            d_q, d_rows = carry
            q_tile[...] = (d_q * program.scale if program.linear else d_q).astype(q.dtype)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(q_tile, dq_ref.at[row, queries, head])
            for ref, d in zip(d_row_refs, d_rows, strict=True):
                ref[row, head, queries] = d
            plgpu.wait_smem_to_gmem(0)

        @pl.when(group == groups)
        def _() -> None:
            hopper.fewer_registers(groups)
            kv_head = lax.div(head, ratio)
            hopper.feed(
                visits,
                (k_ring, lambda keys: k_ref.at[row, keys, kv_head]),
                (v_ring, lambda keys: v_ref.at[row, keys, kv_head]),
            )

    def tile(*shape: int) -> Any:
        return hopper.tile(*shape, dtype=q.dtype)

    def typed(shape: tuple[int, ...], dtype: Any = jnp.float32) -> Any:
        return result(shape, dtype, q, k, v, d_out)

    d_q, d_rows, d_tile = hopper.launch(
        attention_queries,
        (*hopper.tokens_first(q, k, v, d_out), statistics, hopper.counts_first(visits), streamed.arrays(streams)),
        out_type=(
            typed((batch, length, heads, width), q.dtype),
            [typed(q.shape[:3]) for _ in wanted],
            typed((*q.shape[:3], k.shape[2])) if whole else None,
        ),
        scratch=(
            tile(groups, _ROWS, width),
            tile(groups, _ROWS, value_width),
            plgpu.Barrier(num_barriers=groups, num_arrivals=2),
            Ring.scratch(stages, groups, tile(stages, _ROWS, width)),
            Ring.scratch(stages, groups, tile(stages, _ROWS, value_width)),
            tile(groups, _ROWS, _ROWS) if call.interpret else None,
        ),
        grid={"batch": batch, "head": heads, "tile": length // owned},
        groups=groups,
        interpret=call.interpret,
        approximate=approximable(program),
    )
    found = dict(zip(wanted, d_rows, strict=True))
    if whole:
        d_tile = jnp.where(_visited(visits, k.shape[2] // block_k, block_q, block_k), d_tile, 0)
    return *hopper.tokens_first(d_q), tuple(found.get(n) for n in range(len(streams.rows))), d_tile


def _float_tile(program: Program, streams: Streams) -> bool:
    """Whether the program reads a map that has a gradient."""
    read = not program.linear and program.change.reads("tile")
    return bool(read) and jnp.issubdtype(streams.tile.dtype, jnp.floating)


def _visited(visits: Any, others: int, block_q: int, block_k: int) -> Array:
    """Which places of a map lie in blocks that are visited, [B|1, H|1, T, S]."""
    order, _, live = (jnp.asarray(x) for x in visits)
    places = jnp.arange(order.shape[-1]) < live[..., None]
    index = jnp.indices(order.shape, sparse=True)[:3]
    blocks = jnp.zeros((*order.shape[:3], others), bool).at[*index, order].max(places)
    return blocks.repeat(block_q, axis=2).repeat(block_k, axis=3)


def _keys(
    call: Any, q: Array, k: Array, v: Array, d_out: Array, statistics: Array, streams: Streams, visits: Any
) -> tuple[Array, Array, tuple[Any, ...]]:
    """The gradients of k and v, summed over the query heads of each, and of the program's columns."""
    program, block_q, block_k = call.program, call.block_q, call.block_k
    (batch, heads, _, width), (kv_heads, keys, value_width) = q.shape, v.shape[1:]
    owners, stages, _ = keys_shape(block_k, width, value_width)
    owned, ratio = owners * _ROWS, heads // kv_heads
    streamed, products = Streamed(program, turned=True), Products(call.interpret)
    wanted = program.float_cols()

    def attention_keys(
        q_ref: Any, k_ref: Any, v_ref: Any, do_ref: Any, statistics_ref: Any, lists: Any, streams: Any,
        dk_ref: Any, dv_ref: Any, d_col_refs: Any,
        k_tiles: Any, v_tiles: Any, loaded: Any, q_ring: Any, do_ring: Any, done: Any, spare: Any,
    ) -> None:  # fmt: skip
        q_ring, do_ring = Ring(*q_ring), Ring(*do_ring)
        group, row, kv_head = (lax.axis_index(name) for name in ("group", "batch", "head"))
        first = lax.axis_index("tile") * owned

        def visits_of(head: Any, steps: Any) -> Visits:
            return Visits.of(lists, row, head, lax.div(first, block_k), block_q, _ROWS, steps)

        def compute(owner: Any, makes_k: bool, makes_v: bool) -> None:
            own = pl.ds(first + owner * _ROWS, _ROWS)
            k_tile, v_tile = k_tiles.at[owner], v_tiles.at[owner]

            def visit(step: Any, first_query: Any, carry: Any, masked: bool, head: Any, k_columns: Any) -> Any:
                accs, d_cols = carry
                q_ring.wait(step)
                (q_tile, statistics), (do_tile,) = q_ring.at(step), do_ring.at(step)

                def scores(s_ref: Any, *dp_ref: Any) -> Any:
                    products.start(s_ref, k_tile, q_tile.T)
                    do_ring.wait(step)
                    if makes_k:
                        products.start(dp_ref[0], v_tile, do_tile.T)
                    queries = None if first_query is None else pl.ds(first_query, _ROWS)
                    q_columns = streamed.rows(streams, row, head, queries, masked)
                    tile = streamed.tile(streams, row, head, queries, own)
                    lse = _compat.load(statistics.at[0], COL)
                    s = plgpu.wgmma_accumulator_load(s_ref, wait_n=1 if makes_k else 0)
                    columns = streamed.wide(q_columns, k_columns, s.shape)
                    wide = lambda x: lax.broadcast_in_dim(x, s.shape, [1])  # noqa: E731
                    of = _scores(program, s, wide(lse), columns, tile, masked)
                    if not makes_k:
                        return of.weights, None, None, []
                    d_p = of.kept(dp_ref[0][...])
                    delta = _compat.load(statistics.at[1], COL)
                    if of.pull is None:  # The rest is done while d_v is multiplied.
                        return of.weights, of.p, d_p - wide(delta), []
                    d_s, _, d_wide, _ = of.pull(of.p * (d_p - wide(delta)))
                    return of.weights, None, d_s, d_wide

                acc = plgpu.ACC((_ROWS, _ROWS), jnp.float32)
                weights, p, d_s, d_wide = pl.run_scoped(scores, *[acc] * (1 + makes_k))
                operands = []
                if makes_v:
                    operands.append((lambda: weights.astype(q.dtype), do_tile))
                if makes_k:
                    operands.append((lambda: (d_s if p is None else p * d_s).astype(q.dtype), q_tile))
                accs = products.add(accs, operands, spare.at[group] if call.interpret else None)
                q_ring.release(step)
                do_ring.release(step)
                return accs, [d + x.sum(axis=1) for d, x in zip(d_cols, d_wide, strict=True)]

            def of_head(member: Any, carry: Any) -> Any:
                accs, steps = carry
                head = kv_head * ratio + member
                visits = visits_of(head, steps)
                zeros = [plgpu.layout_cast(jnp.zeros((_ROWS,), jnp.float32), ROW) for _ in wanted if makes_k]
                carry = accs, zeros
                for masked in (False, True) if program.mask is not None else (False,):
                    steps = (visits.masked, visits.end) if masked else (visits.first, visits.masked)
                    k_columns = streamed.cols(streams, row, head, own, masked)
                    body = functools.partial(visit, masked=masked, head=head, k_columns=k_columns)
                    carry = hopper.each(*steps, body, carry, streamed.looks_up("row", visits, masked))
                accs, d_cols = carry
                for ref, d in zip(d_col_refs, d_cols, strict=False):
                    ref[row, head, own] = d
                return accs, visits.end

            widths = [value_width] * makes_v + [width] * makes_k
            accs = [plgpu.layout_cast(jnp.zeros((_ROWS, n), jnp.float32), TILE) for n in widths]
            accs, _ = lax.fori_loop(0, ratio, of_head, (accs, jnp.int32(0)))
            if owners == 1:  # The other one may still read what is written over now.
                plgpu.barrier_arrive(done.at[0])
                plgpu.barrier_wait(done.at[0])
            if makes_v:
                v_tile[...] = accs[0].astype(v.dtype)
            if makes_k:
                k_tile[...] = (accs[-1] * program.scale if program.linear else accs[-1]).astype(k.dtype)
            plgpu.commit_smem()
            if makes_v:
                plgpu.copy_smem_to_gmem(v_tile, dv_ref.at[row, own, kv_head])
            if makes_k:
                plgpu.copy_smem_to_gmem(k_tile, dk_ref.at[row, own, kv_head])
            plgpu.wait_smem_to_gmem(0)

        @pl.when(group < 2)
        def _() -> None:
            hopper.more_registers(2)

            @pl.when(group < owners)
            def _() -> None:
                own = pl.ds(first + group * _ROWS, _ROWS)
                plgpu.copy_gmem_to_smem(k_ref.at[row, own, kv_head], k_tiles.at[group], loaded.at[group])
                plgpu.copy_gmem_to_smem(v_ref.at[row, own, kv_head], v_tiles.at[group], loaded.at[group])

            plgpu.barrier_wait(loaded.at[jnp.minimum(group, owners - 1)])
            if owners == 2:
                compute(group, makes_k=True, makes_v=True)
            else:
                pl.when(group == 0)(lambda: compute(0, makes_k=False, makes_v=True))
                pl.when(group == 1)(lambda: compute(0, makes_k=True, makes_v=False))

        @pl.when(group == 2)
        def _() -> None:
            hopper.fewer_registers(2)

            def of_head(member: Any, steps: Any) -> Any:
                head = kv_head * ratio + member
                visits = visits_of(head, steps)

                def fill(step: Any, first_query: Any, carry: None) -> None:
                    at = pl.ds(first_query, _ROWS)
                    q_ring.fill(step, q_ref.at[row, at, head], statistics_ref.at[row, head, :, at])
                    do_ring.fill(step, do_ref.at[row, at, head])

                hopper.each(visits.first, visits.end, fill, None, visits.tokens)
                return visits.end

            steps = lax.fori_loop(0, ratio, of_head, jnp.int32(0))
            q_ring.drain(steps)
            do_ring.drain(steps)

    def tile(*shape: int) -> Any:
        return hopper.tile(*shape, dtype=q.dtype)

    def typed(shape: tuple[int, ...], dtype: Any = jnp.float32) -> Any:
        return result(shape, dtype, q, k, v, d_out)

    d_k, d_v, d_cols = hopper.launch(
        attention_keys,
        (*hopper.tokens_first(q, k, v, d_out), statistics, hopper.counts_first(visits), streamed.arrays(streams)),
        out_type=(
            typed((batch, keys, kv_heads, width), k.dtype),
            typed((batch, keys, kv_heads, value_width), v.dtype),
            [typed((batch, heads, keys)) for _ in wanted],
        ),
        scratch=(
            tile(owners, _ROWS, width),
            tile(owners, _ROWS, value_width),
            plgpu.Barrier(num_barriers=owners, num_arrivals=2),
            Ring.scratch(stages, 2, tile(stages, _ROWS, width), plgpu.SMEM((stages, 2, _ROWS), jnp.float32)),
            Ring.scratch(stages, 2, tile(stages, _ROWS, value_width)),
            plgpu.Barrier(num_barriers=1, num_arrivals=2),
            tile(2, _ROWS, _ROWS) if call.interpret else None,
        ),
        grid={"batch": batch, "head": kv_heads, "tile": keys // owned},
        groups=2,
        interpret=call.interpret,
        approximate=approximable(program),
    )  # fmt: skip
    found = dict(zip(wanted, d_cols, strict=True))
    d_k, d_v = hopper.tokens_first(d_k, d_v)
    return d_k, d_v, tuple(found.get(n) for n in range(len(streams.cols)))
