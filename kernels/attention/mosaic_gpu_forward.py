"""Attention forward on Hopper: two warpgroups take turns at the tensor cores, a third feeds them.

A block owns `block_q` queries of a head, 64 (or more) for each computing warpgroup; while one does its softmax, the
other multiplies (FlashAttention-3, Shah et al. 2024, section 3.1). Both go through the same list of live key blocks,
first those that need no mask.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float

from kernels import _mosaic_gpu as hopper
from kernels._mosaic_gpu import ROW, TILE, Products, Ring, Visits
from kernels.attention.mosaic_gpu_program import Streamed, approximable, lowerable, unsupported
from kernels.attention.program import Streams
from kernels.attention.worklist import Lists
from kernels.varying import result

_LOG2E, _LN2 = math.log2(math.e), math.log(2)


def shape_of(block_q: int, block_k: int, width: int, value_width: int) -> tuple[int, int, int]:
    """Computing warpgroups, stages, and bytes of shared memory of a block."""
    fixed, slot = 2 * block_q * max(width, value_width), 2 * block_k * (width + value_width)
    stages = hopper.stages(fixed, slot, most=3 if width <= 64 else 2)
    return 1 if block_q % 128 else 2, stages, fixed + stages * slot


def forward(
    call: Any,
    q: Float[Array, "B H T D"],
    k: Float[Array, "B Hk S D"],
    v: Float[Array, "B Hk S Dv"],
    streams: Streams,
    lists: Lists,
) -> tuple[Float[Array, "B H T Dv"], Float[Array, "B H T"]]:
    """Output and natural log-sum-exp of whole blocks (`kernels.attention.fused.Kernel`).

    Raises: `NotImplementedError` for blocks the tensor cores cannot do, and for operations Mosaic GPU lacks.
    """
    program, block_q, block_k = call.program, call.block_q, call.block_k
    unsupported(program, block_q, block_k)
    (batch, heads, length, width), value_width = q.shape, v.shape[3]
    groups, stages, _ = shape_of(block_q, block_k, width, value_width)
    rows, tiles, ratio = block_q // groups, length // block_q, heads // k.shape[1]
    fused = program.linear and program.scale > 0  # The scale then goes into the exponent.
    unit = program.scale * _LOG2E if fused else _LOG2E
    streamed, products = Streamed(program), Products(call.interpret)

    def attention_forward(
        q_ref: Any, k_ref: Any, v_ref: Any, lists: Any, streams: Any, out_ref: Any, lse_ref: Any,
        shared: Any, k_barriers: Any, v_ring: Any, loaded: Any, turn: Any, spare: Any,
    ) -> None:  # fmt: skip
        (q_tiles, k_slots), (out_tiles, lse_rows) = shared
        k_ring, v_ring = Ring((k_slots,), *k_barriers), Ring(*v_ring)
        group, row, head = (lax.axis_index(name) for name in ("group", "batch", "head"))
        # Later queries see more keys under a causal mask: they go first, so that the last to run are short.
        block = tiles - 1 - lax.axis_index("tile")
        visits = Visits.of(lists, row, head, block, block_k, block_k)

        def pass_turn() -> None:
            """Tells the other one that the tensor cores are free."""
            if groups == 2:
                plgpu.barrier_arrive(turn.at[0])

        def await_turn() -> None:
            if groups == 2:
                plgpu.barrier_wait(turn.at[0])

        @pl.when(group < groups)
        def _() -> None:
            hopper.more_registers(groups)
            queries = pl.ds(block * block_q + group * rows, rows)
            q_tile, out_tile, lse_row = (x.at[group] for x in (q_tiles, out_tiles, lse_rows))
            plgpu.copy_gmem_to_smem(q_ref.at[row, queries, head], q_tile, loaded.at[group])
            q_columns = streamed.rows(streams, row, head, queries)
            plgpu.barrier_wait(loaded.at[group])

            def visit(step: Any, first_key: Any, carry: Any, masked: bool) -> Any:
                acc, top, total = carry

                def scores(ref: Any) -> Any:
                    products.start(ref, q_tile, k_ring.at(step)[0].T)
                    keys = None if first_key is None else pl.ds(first_key, block_k)
                    k_columns = streamed.cols(streams, row, head, keys, masked)
                    tile = streamed.tile(streams, row, head, queries, keys)
                    pass_turn()
                    return ref[...], k_columns, tile

                s, k_columns, tile = pl.run_scoped(scores, plgpu.ACC((rows, block_k), jnp.float32))
                k_ring.release(step)
                await_turn()
                columns = streamed.wide(q_columns, k_columns, s.shape)
                if not fused:
                    s = plgpu.layout_cast(lowerable(program.scores)(s, *columns, tile), TILE)
                if masked:
                    s = jnp.where(lowerable(program.allowed)(*columns), s, -jnp.inf)
                higher = jnp.maximum(top, s.max(axis=1) * unit)
                base = jnp.where(higher == -jnp.inf, 0.0, higher)
                shrink = jnp.exp2(top - base)
                p = jnp.exp2(s * unit - _wide(base, s.shape))
                acc *= _wide(shrink, acc.shape)
                total *= shrink
                kept = lowerable(program.kept)(*columns)
                weights = p if kept is None else jnp.where(kept, p * (1 / (1 - program.rate)), 0.0)
                weights = weights.astype(v.dtype)
                # Whether to sum before or after the turn is a matter of how instructions then get scheduled.
                if value_width <= 128:
                    total += p.sum(axis=1)
                    acc, total, higher, weights = lax.optimization_barrier((acc, total, higher, weights))
                pass_turn()
                v_ring.wait(step)
                await_turn()
                if value_width > 128:
                    total += p.sum(axis=1)

                def next_keys() -> None:
                    pl.when(step + 1 < visits.end)(lambda: k_ring.wait(step + 1))

                own = spare.at[group] if call.interpret else None
                (acc,) = products.add([acc], [(lambda: weights, v_ring.at(step)[0])], own, next_keys)
                v_ring.release(step)
                return acc, higher, total

            pl.when(visits.end > 0)(lambda: k_ring.wait(jnp.int32(0)))

            @pl.when(group == 1)
            def _() -> None:
                pass_turn()
                await_turn()

            carry = (
                plgpu.layout_cast(jnp.zeros((rows, value_width), jnp.float32), TILE),
                plgpu.layout_cast(jnp.full((rows,), -jnp.inf, jnp.float32), ROW),
                plgpu.layout_cast(jnp.zeros((rows,), jnp.float32), ROW),
            )
            for masked in (False, True) if program.mask is not None else (False,):
                steps = (visits.masked, visits.end) if masked else (0, visits.masked)
                place = streamed.looks_up("col", visits, masked)
                carry = hopper.each(*steps, functools.partial(visit, masked=masked), carry, place)
            acc, top, total = carry

            @pl.when(group == 0)
            def _() -> None:
                pass_turn()
                await_turn()

            # Both have made all their scores now: nobody needs queries and keys, whose memory this is.
            out_tile[...] = (acc * _wide(jnp.where(total == 0, 0.0, 1 / total), acc.shape)).astype(q.dtype)
            lse_row[...] = top * _LN2 + jnp.log(total)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(out_tile, out_ref.at[row, queries, head])
            plgpu.copy_smem_to_gmem(lse_row, lse_ref.at[row, head, queries])
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

    slots = tile(stages, block_k, width)
    _, *k_barriers = Ring.scratch(stages, groups, slots)
    out, lse = hopper.launch(
        attention_forward,
        (*hopper.tokens_first(q, k, v), hopper.counts_first(lists.by_query), streamed.arrays(streams)),
        out_type=(
            result((batch, length, heads, value_width), q.dtype, q, k, v),
            result((batch, heads, length), jnp.float32, q, k, v),
        ),
        scratch=(
            plgpu.RefUnion(
                (tile(groups, rows, width), slots),
                (tile(groups, rows, value_width), plgpu.SMEM((groups, rows), jnp.float32)),
            ),
            tuple(k_barriers),
            Ring.scratch(stages, groups, tile(stages, block_k, value_width)),
            plgpu.Barrier(num_barriers=groups),
            plgpu.Barrier(num_barriers=1, num_arrivals=2),
            tile(groups, rows, block_k) if call.interpret else None,
        ),
        grid={"batch": batch, "head": heads, "tile": tiles},
        groups=groups,
        interpret=call.interpret,
        approximate=approximable(program),
    )
    return *hopper.tokens_first(out), lse


def _wide(x: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    return lax.broadcast_in_dim(x, shape, [0])
