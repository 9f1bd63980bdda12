"""What both passes of the attention kernels on TPU share: lists of grid steps, blocks of streams, turning of vectors.

A pass walks over a list of live blocks, one int32 each in scalar memory: its outer block (whose results stay in VMEM
until the next), its inner block, and what to do there. The query heads that share a key head may lie behind one another
as one long column of query blocks ("folded"), so a kernel knows of heads only what it needs to find their streams.
"""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Int

from kernels.attention.fused import Call
from kernels.attention.pallas_tpu_sizes import LANES, vmem_limit
from kernels.attention.program import Streams
from kernels.varying import result

LOG2E, LN2 = float(np.log2(np.e)), float(np.log(2.0))
FIRST, LAST, LIVE, FULL = 1, 2, 4, 8  # First and last step of an outer block; a block to compute; without mask.
_BITS = 14  # Of the number of a block.
SCALARS = 160 * 1024  # Entries of the lists of one call: 640 KiB of the 1 MiB of scalar memory.


@dataclasses.dataclass(frozen=True)
class Steps:
    """The lists of one pass; the grid has `count` steps, a traced number where the lists are."""

    entries: Int[Array, "B|1 G|1 n"]
    count: Any
    kinds: frozenset[bool]  # Of live blocks, whether they are full: what occurs; both where nothing is known.


def steps(order: Any, live: Any, full: Any) -> Steps:
    """Steps from the inner blocks `order` [b, g, outer, m] and which of them are live, and full.

    An outer block without any gets one step, so that its result is written. Lists shorter than the longest end in steps
    that do nothing and stay where they are, so that nothing is fetched.
    """
    known = isinstance(order, np.ndarray)
    xp = np if known else jnp
    if max(order.shape[2], order.max(initial=-1) + 1 if known else order.shape[3]) >= 1 << _BITS:
        raise NotImplementedError(f"attention on TPU: {order.shape[2:]} blocks, more than {1 << _BITS} of one side")
    there = live | (~live.any(-1, keepdims=True) & (xp.arange(order.shape[3]) == 0))
    rank = xp.cumsum(there, axis=-1)
    entries = (xp.arange(order.shape[2], dtype=np.int32)[:, None] << (_BITS + 4)) | (order << 4)
    entries = entries | FIRST * (rank == 1) | LAST * (rank == rank[..., -1:]) | LIVE * live | FULL * (live & full)
    entries, there = (x.reshape(*x.shape[:2], -1) for x in (entries.astype(np.int32), there))
    entries = xp.take_along_axis(entries, xp.argsort(~there, axis=-1, stable=True), axis=-1)
    counts = there.sum(-1, keepdims=True)
    idle = xp.take_along_axis(entries, counts - 1, axis=-1) & ~(FIRST | LAST | LIVE | FULL)
    entries = xp.where(xp.arange(entries.shape[-1]) < counts, entries, idle)
    if not known:
        return Steps(entries, counts.max().astype(np.int32), frozenset((False, True)))
    count = int(counts.max())
    return Steps(entries[..., :count], count, frozenset(map(bool, full[live])))


def outer(entry: Array) -> Array:
    """The outer block of an entry."""
    return lax.shift_right_logical(entry, np.int32(_BITS + 4))


def inner(entry: Array) -> Array:
    """The inner block of an entry."""
    return lax.shift_right_logical(entry, np.int32(4)) & np.int32((1 << _BITS) - 1)


def has(entry: Array, flag: int) -> Array:
    """Whether an entry says so."""
    return (entry & np.int32(flag)) != 0


@dataclasses.dataclass(frozen=True)
class Blocks:
    """How the grid (batch row, group of heads, step) finds its blocks. `query` and `key` read the block of an entry."""

    call: Call
    steps: Steps
    groups: int  # Groups of query heads, those of one folded into a column of query blocks.
    kv_heads: int
    fold: int  # Query heads of a group.
    per_head: int  # Query blocks of a head.
    query: Callable[[Array], Array]  # Place in the group's column.
    key: Callable[[Array], Array]

    def entry(self, b: Any, g: Any, i: Any, entries: Any) -> Array:
        """The entry of a step."""
        rows, groups, length = self.steps.entries.shape
        return entries[((b if rows > 1 else 0) * groups + (g if groups > 1 else 0)) * length + i]

    def head(self, g: Any, entry: Array) -> Any:
        """The query head of a step."""
        return g if self.fold == 1 else g * self.fold + lax.div(self.query(entry), np.int32(self.per_head))

    def own_query(self, entry: Array) -> Any:
        """The query block within its head."""
        return self.query(entry) if self.fold == 1 else lax.rem(self.query(entry), np.int32(self.per_head))

    def spec(self, block: tuple[int | None, ...], place: Callable[..., tuple[Any, ...]]) -> pl.BlockSpec:
        """A block at `place(b, g, entry)`."""
        return pl.BlockSpec(block, lambda b, g, i, entries: place(b, g, self.entry(b, g, i, entries)))

    def queries(self, width: int) -> pl.BlockSpec:
        """Of [B, groups, fold T, width]."""
        return self.spec((None, None, self.call.block_q, width), lambda b, g, e: (b, g, self.query(e), 0))

    def keys(self, width: int) -> pl.BlockSpec:
        """Of [B, kv heads, S, width]."""
        share = self.groups // self.kv_heads
        return self.spec(
            (None, None, self.call.block_k, width), lambda b, g, e: (b, lax.div(g, np.int32(share)), self.key(e), 0)
        )

    def numbers(self) -> pl.BlockSpec:
        """Of one number per query, [B, groups, blocks, 1, bq]."""
        # As [1, fold T], blocks of less than 128 queries would be refused.
        return self.spec((None, None, None, 1, self.call.block_q), lambda b, g, e: (b, g, self.query(e), 0, 0))

    def tile(self, batch: int, heads: int) -> pl.BlockSpec:
        """Of one number per pair, [B|1, H|1, T, S]."""
        return self.spec(
            (None, None, self.call.block_q, self.call.block_k),
            lambda b, g, e: (
                b if batch > 1 else 0, self.head(g, e) if heads > 1 else 0, self.own_query(e), self.key(e)
            ),
        )  # fmt: skip

    def bodies(self, entry: Array) -> Iterator[tuple[Array, bool]]:
        """What may happen in a step: when, and whether with the mask."""
        live, full, kinds = has(entry, LIVE), has(entry, FULL), self.steps.kinds
        if self.call.program.mask is None or len(kinds) < 2:
            yield live, False in kinds and self.call.program.mask is not None
        else:
            yield live & full, False
            yield live & ~full, True

    def reads(self, kind: str) -> tuple[int, ...]:
        """Numbers of the streams "row", "col" or "tile" that are read."""
        made = self.call.program
        functions = [made.drop, None if made.linear else made.change, made.mask if False in self.steps.kinds else None]
        return tuple(sorted({n for f in functions if f is not None for n in f.reads(kind)}))

    def streams(self, streams: Streams) -> dict[str, tuple[Any, Any]]:
        """Those that are read, and their blocks: "rows" [1, bq] and "cols" [1, bk] by number, "tile" [bq, bk]."""
        block_q, block_k = self.call.block_q, self.call.block_k
        rows, cols, tile = self.reads("row"), self.reads("col"), streams.tile

        def spec(x: Array, block: tuple[int | None, ...], place: Callable[..., tuple[Any, ...]]) -> pl.BlockSpec:
            many = x.shape[0] > 1
            return self.spec((None, None, *block), lambda b, g, e: (b if many else 0, *place(g, e)))

        def row(x: Array) -> tuple[Array, pl.BlockSpec]:
            own = x.shape[1] > 1  # Then heads are folded as queries are.
            return x.reshape(x.shape[0], self.groups if own else 1, -1, 1, block_q), spec(
                x, (None, 1, block_q), lambda g, e: (g, self.query(e), 0, 0) if own else (0, self.own_query(e), 0, 0)
            )

        def col(x: Array) -> tuple[Array, pl.BlockSpec]:
            own = x.shape[1] > 1
            return x.reshape(*x.shape[:2], -1, 1, block_k), spec(
                x, (None, 1, block_k), lambda g, e: (self.head(g, e) if own else 0, self.key(e), 0, 0)
            )

        found = {"rows": {n: row(streams.rows[n]) for n in rows}, "cols": {n: col(streams.cols[n]) for n in cols}}
        made: dict[str, Any] = {
            name: tuple({n: x[i] for n, x in side.items()} for i in (0, 1)) for name, side in found.items()
        }
        if self.reads("tile"):
            if block_k % LANES and block_k != tile.shape[3] and not self.call.interpret:
                raise NotImplementedError(
                    f"attention on TPU: a bias over all pairs with blocks of {block_k} keys, not 128"
                )
            made["tile"] = tile, self.tile(*tile.shape[:2])
        return made

    def run(
        self, kernel: Callable[..., None], name: str, inputs: dict[str, tuple[Any, Any]],
        outputs: dict[str, tuple[Any, Any]], *, flops: int, scratch: Sequence[Any] = (), aliases: Sequence[Any] = (),
    ) -> dict[str, Any]:  # fmt: skip
        """`kernel(entries, inputs, outputs, *scratch)` over the grid.

        Inputs are (array, block) and outputs (shape, block) by name, trees both; `aliases` (input, output) lets
        an output have the memory of an input; `flops` are those of a step.
        """
        arrays, in_specs = ({name: x[n] for name, x in inputs.items()} for n in (0, 1))
        shapes, out_specs = ({name: x[n] for name, x in outputs.items()} for n in (0, 1))
        leaves = jax.tree.leaves(arrays)
        shapes = jax.tree.map(lambda x: result(x.shape, x.dtype, *leaves), shapes)
        batch, length = arrays["q"].shape[0], self.steps.entries.shape[2]
        work = batch * self.groups * length
        return pl.pallas_call(
            kernel,
            out_shape=shapes,
            grid_spec=pltpu.PrefetchScalarGridSpec(
                num_scalar_prefetch=1,
                grid=(batch, self.groups, self.steps.count),
                in_specs=[in_specs],
                out_specs=out_specs,
                scratch_shapes=scratch,
            ),
            input_output_aliases={1 + _number(arrays, i): _number(shapes, o) for i, o in aliases},
            compiler_params=pltpu.CompilerParams(
                dimension_semantics=("parallel", "parallel", "arbitrary"), vmem_limit_bytes=vmem_limit()
            ),
            cost_estimate=pl.CostEstimate(
                flops=work * flops,
                transcendentals=work * self.call.block_q * self.call.block_k,
                bytes_accessed=sum(x.size * x.dtype.itemsize for x in (*leaves, *jax.tree.leaves(shapes))),
            ),
            interpret=self.call.interpret,
            name=name,
        )(jnp.asarray(self.steps.entries).reshape(-1), arrays)


def _number(tree: dict[str, Any], name: str) -> int:
    """Which leaf of a dictionary the entry `name` is."""
    return [path[0].key for path, _ in jax.tree_util.tree_leaves_with_path(tree)].index(name)


def turned(x: Array) -> Array:
    """A row [1, n] as a column [n, 128] of equal lanes."""
    return jnp.broadcast_to(x, (LANES, x.shape[1])).T


def as_row(x: Array) -> Array:
    """A column of equal lanes [n, m], or [n, 1], as a row [1, n]."""
    return (jnp.broadcast_to(x, (x.shape[0], LANES)) if x.shape[1] == 1 else x).T[:1]


def wide(x: Array, width: int) -> Array:
    """A column of equal lanes [n, m] as [n, width]; where 128 divides the width, the same registers again."""
    return x[:, :width] if width <= x.shape[1] else jnp.tile(x, (1, -(-width // x.shape[1])))[:, :width]


def dot(a: Array, b: Array, axis_a: int, axis_b: int) -> Array:
    """The product over one axis each, in float32; float32 factors keep their bits."""
    precision = lax.Precision.HIGHEST if a.dtype == jnp.float32 else lax.Precision.DEFAULT
    axes = (((axis_a,), (axis_b,)), ((), ()))
    return lax.dot_general(a, b, axes, precision=precision, preferred_element_type=jnp.float32)


def in_parts(run: Callable[[Steps, Any], Any], walk: Steps, arrays: Any) -> Any:
    """`run(walk, arrays)`, by batch rows and groups where the lists of all would not fit in scalar memory.

    Arrays are [B|1, heads|1, ...], results [B, groups or heads, ...].
    """
    entries = walk.entries
    if entries.size <= SCALARS:
        return run(walk, arrays)
    if entries.shape[:2] == (1, 1):
        raise NotImplementedError(f"attention on TPU: a list of {entries.size} blocks; {SCALARS} fit in scalar memory")
    axis = 0 if entries.shape[0] > 1 else 1
    parts = entries.shape[axis]

    def take(x: Any, i: Array) -> Any:
        n, x = x.shape[axis], jnp.asarray(x)
        return x if n == 1 else lax.dynamic_slice_in_dim(x, i * n // parts, max(n // parts, 1), axis)

    def one(i: Array) -> Any:
        mine = dataclasses.replace(walk, entries=take(entries, i))
        return in_parts(run, mine, jax.tree.map(lambda x: take(x, i), arrays))

    def merged(x: Array) -> Array:
        x = jnp.moveaxis(x, 0, axis)
        return x.reshape(*x.shape[:axis], -1, *x.shape[axis + 2 :])

    return jax.tree.map(merged, lax.map(one, jnp.arange(parts)))
