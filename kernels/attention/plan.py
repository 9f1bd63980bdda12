"""How a call of the blockwise form is cut up: block sizes, and which blocks of the map are visited."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Int

from kernels.attention import dropout
from kernels.attention.masks import EMPTY, FULL, Mask
from kernels.attention.scores import Change, Inputs, Places
from kernels.bits import bits, floats
from kernels.tokens import Tokens


@dataclasses.dataclass(frozen=True)
class Blocks:
    """Sizes of one step: tokens of a query block and of a key block, and key/value heads taken together.

    `merge` wholly live neighbours on the side of the inner loop are one step: fine blocks waste little at a
    mask's edge, and long steps waste little elsewhere.
    """

    q: int
    k: int
    heads: int
    merge: int = 1


# Sizes beside the usual ones, and how many times as long a pair takes with them (docs/kernels.md).
_FINER = ((256, 1.8), (128, 2.1))


class Lists(NamedTuple):
    """For each block of the outer loop, what the inner one visits: runs of `merge` full blocks, then other live ones.

    Only the first `runs` and `singles` entries of a row of the orders count.
    """

    run_order: Int[Array, "B|1 G|1 n M"]
    runs: Int[Array, "B|1 G|1 n"]
    single_order: Int[Array, "B|1 G|1 n m"]
    singles: Int[Array, "B|1 G|1 n"]


class Tables(NamedTuple):
    """What the loops look up: the blocks to visit, the mask's arrays, the columns it reads, and all of them."""

    lists: Lists
    mask_arrays: tuple[Array, ...]
    q: dict[str, Array]
    k: dict[str, Array]
    tokens: tuple[Tokens, Tokens] | None  # For a function of the caller's on scores.
    hashes: tuple[dict[str, Array], dict[str, Array]] | None  # For dropout.


@dataclasses.dataclass(frozen=True)
class Plan:
    """Everything static about one call."""

    change: Change
    length: int
    keys: int
    block_q: int
    block_k: int
    heads: int  # Key/value heads in one step.
    groups: int  # Steps over heads.
    ratio: int  # Query heads of a key/value head.
    merge: int  # Blocks of a run in the inner loop.
    partial: bool  # Some block may need the mask.
    runs: bool  # There may be runs of full blocks.
    singles: bool  # There may be other live blocks.
    rate: float  # Of dropout.
    mask: Any  # Tree structure of the mask; its arrays are in the tables.

    @property
    def rows(self) -> int:
        """Rows of a block of scores: the query heads of a group ride on the query tokens."""
        return self.ratio * self.block_q

    @property
    def q_blocks(self) -> int:
        return -(-self.length // self.block_q)

    @property
    def k_blocks(self) -> int:
        return -(-self.keys // self.block_k)

    def pad_rows(self, x: Array, value: float = 0.0) -> Array:
        """[B, T, ...] to whole query blocks."""
        return _pad(x, self.q_blocks * self.block_q, value)

    def pad_keys(self, x: Array) -> Array:
        """[B, S, ...] to whole key blocks."""
        return _pad(x, self.k_blocks * self.block_k, 0.0)

    def pad_map(self, x: Array | None) -> Array | None:
        """[B|1, H|1, T|1, S|1] to whole blocks, where an axis of size 1 stands for all."""
        if x is None:
            return None
        wanted = (self.q_blocks * self.block_q, self.k_blocks * self.block_k)
        missing = [n - m if m > 1 else 0 for n, m in zip(wanted, x.shape[2:], strict=True)]
        return jnp.pad(x, ((0, 0), (0, 0), *((0, n) for n in missing))) if any(missing) else x

    def split_rows(self, x: Array) -> Array:
        """[n bq, heads, D] to [kv heads, n rows, D]: blocks of rows, in each the query heads of a kv head in turn."""
        x = x.reshape(-1, self.block_q, self.heads, self.ratio, x.shape[-1])
        return x.transpose(2, 0, 3, 1, 4).reshape(self.heads, -1, x.shape[-1])

    def join_rows(self, x: Array) -> Array:
        """The inverse of `split_rows`."""
        x = x.reshape(self.heads, -1, self.ratio, self.block_q, x.shape[-1])
        return x.transpose(1, 3, 0, 2, 4).reshape(-1, self.heads * self.ratio, x.shape[-1])

    def visit(self, lists: Lists, b: Array, g: Array, i: Array, step: Any, carry: Any) -> Any:
        """`step(j, blocks, carry, masked)` for all live blocks j .. j + blocks - 1 of the outer block i."""
        run_order, runs, single_order, singles = (_at(x, b, g, i) for x in lists)
        if single_order.shape[0] == 1:  # A mask is right for every kind of block, and one block is worth no loop.
            return step(np.int32(0), 1, carry, self.partial)
        if self.runs:
            carry = lax.fori_loop(
                0, runs, lambda t, c: step(_pick(run_order, t) * self.merge, self.merge, c, False), carry
            )
        if self.singles:
            carry = lax.fori_loop(0, singles, lambda t, c: step(_pick(single_order, t), 1, c, self.partial), carry)
        return carry

    @property
    def late(self) -> float:
        """What scores are multiplied with in the exponential; it saves a pass over them."""
        return self.change.scale if self.change.linear else 1.0

    def block(
        self, inputs: Inputs, tables: Tables, b: Array, g: Array, i: Array, j: Array
    ) -> tuple[tuple[Any, ...], Places, tuple[Any, ...]]:
        """What changes the scores of query block i and key block j: arrays, places, and where the bias was cut."""
        heads = self.heads * self.ratio
        at = (b, g * heads, i * self.block_q, j * self.block_k)
        sizes = (1, heads, self.block_q, self.block_k)
        bias = None if inputs.bias is None else cut_shared(inputs.bias, at, sizes)
        batch, head, query, key = (
            (first + jnp.arange(size)).reshape((1,) * n + (-1,) + (1,) * (3 - n))
            for n, (first, size) in enumerate(zip(at, sizes, strict=True))
        )
        places = ((None, None), (None, None)) if tables.tokens is None else zip(tables.tokens, (2, 3), strict=True)
        q, k = (side and side.map(lambda x, n=n: cut_shared(x, (b, at[n]), (1, sizes[n]))) for side, n in places)
        # Places of padding stand on the last real ones, so that no function meets numbers that do not exist.
        query, key = jnp.minimum(query, self.length - 1), jnp.minimum(key, self.keys - 1)
        return (bias, inputs.arrays), Places(batch, head, query, key, q, k), at

    def turned(self, s: Array) -> Array:
        """Transposed scores [kv heads, bk, rows] as [1, heads, bq, bk]."""
        s = s.reshape(self.heads, self.block_k, self.ratio, self.block_q)
        return s.transpose(0, 2, 3, 1).reshape(1, -1, self.block_q, self.block_k)

    def turned_back(self, s: Array) -> Array:
        """The inverse of `turned`."""
        s = s.reshape(self.heads, self.ratio, self.block_q, self.block_k)
        return s.transpose(0, 3, 1, 2).reshape(self.heads, self.block_k, -1)

    def where(self, tables: Tables, b: Array, g: Array, i: Array, j: Array, x: Array, other: float) -> Array:
        """Scores x [kv heads, rows, bk] with `other` where the mask forbids."""
        return jnp.where(self._allowed(tables, b, g, i, j, False), self._split(x, False), other).reshape(x.shape)

    def where_transposed(self, tables: Tables, b: Array, g: Array, i: Array, j: Array, x: Array, other: float) -> Array:
        """The same for scores x [kv heads, bk, rows]."""
        return jnp.where(self._allowed(tables, b, g, i, j, True), self._split(x, True), other).reshape(x.shape)

    def dropped(self, tables: Tables, b: Array, g: Array, i: Array, j: Array, x: Array, transposed: bool) -> Array:
        """Probabilities or their gradients, of either kind, after dropout."""
        if not self.rate:
            return x
        q, k = self._sides(tables.hashes, b, g, i, j, transposed)
        kept = dropout.kept(q["hash"], k["hash"], self.rate)
        return jnp.where(kept, self._split(x, transposed) / (1 - self.rate), 0).reshape(x.shape)

    def _split(self, x: Array, transposed: bool) -> Array:
        """Query heads beside query tokens: [kv heads, ratio, bq, bk], or [kv heads, bk, ratio, bq]."""
        rows = (self.ratio, self.block_q)
        return x.reshape(self.heads, *((self.block_k, *rows) if transposed else (*rows, self.block_k)))

    def _allowed(self, tables: Tables, b: Array, g: Array, i: Array, j: Array, transposed: bool) -> Array:
        allowed = self._rebuilt(tables).pairs(*self._sides((tables.q, tables.k), b, g, i, j, transposed))
        if self.keys % self.block_k:
            inside = j * self.block_k + jnp.arange(self.block_k) < self.keys
            allowed &= inside[None, :, None, None] if transposed else inside
        return allowed

    def _sides(
        self, columns: tuple[dict, dict], b: Array, g: Array, i: Array, j: Array, transposed: bool
    ) -> tuple[dict, dict]:
        """Columns of query block i and key block j, as they broadcast against split scores."""
        q, k = self._columns(columns, b, g, i, j)
        if transposed:
            k = {name: jnp.swapaxes(column, 1, 2)[..., None] for name, column in k.items()}
            return {name: column[:, None] for name, column in q.items()}, k
        k = {name: column[:, :, None, :] for name, column in k.items()}
        return {name: column[..., None] for name, column in q.items()}, k

    def _rebuilt(self, tables: Tables) -> Mask:
        return jax.tree.unflatten(self.mask, tables.mask_arrays)

    def _columns(self, columns: tuple[dict, dict], b: Array, g: Array, i: Array, j: Array) -> tuple[dict, dict]:
        """Columns of query block i and key block j, [kv heads|1, ratio|1, block]."""
        per = self.heads * self.ratio

        def piece(column: Array, block: Array, size: int) -> Array:
            shared = column.shape[1] == 1
            at = (b if column.shape[0] > 1 else 0, 0 if shared else g * per, block * size)
            column = cut(column, at, (1, 1 if shared else per, size))
            return column.reshape(*((1, 1) if shared else (self.heads, self.ratio)), size)

        q = {name: piece(column, i, self.block_q) for name, column in columns[0].items()}
        return q, {name: piece(column, j, self.block_k) for name, column in columns[1].items()}


def _pick(x: Array, i: Array) -> Array:
    return lax.dynamic_index_in_dim(x, i, keepdims=False)


def cut(x: Array, at: tuple[Any, ...], shape: tuple[int, ...]) -> Array:
    """`dynamic_slice` at whole numbers of any kind."""
    return floats(lax.dynamic_slice(bits(x), tuple(jnp.asarray(n, jnp.int32) for n in at), shape), x.dtype)


def put(x: Array, part: Array, at: tuple[Any, ...]) -> Array:
    """`dynamic_update_slice` of the bits of an array, at whole numbers of any kind."""
    return lax.dynamic_update_slice(x, bits(part), tuple(jnp.asarray(n, jnp.int32) for n in at))


def cut_shared(x: Array, at: tuple[Any, ...], shape: tuple[int, ...]) -> Array:
    """`cut`, where an axis of size 1 stands for all."""
    return cut(x, _shared(x, at), tuple(1 if n == 1 else m for n, m in zip(x.shape, shape, strict=True)))


def add_shared(x: Array, part: Array, at: tuple[Any, ...]) -> Array:
    """`part` added at a place of x, where an axis of size 1 stands for all."""
    at = _shared(x, at)
    return put(x, cut(x, at, part.shape) + part, at)


def _shared(x: Array, at: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(0 if n == 1 else first for n, first in zip(x.shape, at, strict=True))


def choose_blocks(q: tuple[int, ...], k: tuple[int, ...], v: tuple[int, ...]) -> tuple[Blocks, Blocks]:
    """Block sizes of forward and backward for these shapes, as measured (docs/kernels.md).

    XLA's CPU backend gives a dot to several cores only from about 2^17 scores per head on.
    """
    ratio, few = q[2] // k[2], 32
    heads = max(n for n in range(1, 5) if k[2] % n == 0)
    if q[1] * ratio <= few:  # Decoding: the keys are read once whatever the order, so one step for all of them.
        block_k = _even(k[1], (1 << 19) // (heads * q[1] * ratio))
        return Blocks(q[1], block_k, heads), Blocks(q[1], _even(k[1], 512), heads)
    block_k = _even(k[1], 512)
    forward, backward = (_even(q[1], max(rows // ratio, few)) for rows in (512, 256))
    return Blocks(forward, block_k, heads), Blocks(backward, block_k, heads)


def adapted(
    blocks: tuple[Blocks, Blocks],
    mask: Mask,
    q_tokens: Tokens,
    k_tokens: Tokens,
    q: tuple[int, ...],
    k: tuple[int, ...],
) -> tuple[Blocks, Blocks]:
    """Finer blocks where the mask is known while tracing, and leaves so much less of the map live with them that it
    pays for slower steps."""
    columns, ratio = mask.prepare(q_tokens, k_tokens), q[2] // k[2]

    def share(one: Blocks) -> float | None:
        """Of the map that is visited; None if that is not known."""
        status = mask.classify_columns(*columns, min(one.q, q[1]), min(one.k, k[1]), q[1], k[1])
        if not isinstance(status, np.ndarray):
            return None
        if status.shape[1] > 1:  # Heads taken together visit what any of them needs.
            status = status.reshape(status.shape[0], -1, one.heads * ratio, *status.shape[2:]).max(2)
        return float((status != EMPTY).mean())

    more = max(n for n in range(1, 9) if k[2] % n == 0)  # Small steps are worth taking for more heads at once.

    def best(one: Blocks) -> Blocks:
        finer = [
            (slower, dataclasses.replace(one, q=max(size // ratio, 32), k=size, heads=heads, merge=1))
            for size, slower in _FINER
            if size <= min(one.q * ratio, one.k) and size < max(one.q * ratio, one.k)
            for heads in sorted({more, one.heads}, reverse=True)
        ]
        if not finer or share(one) is None:
            return one
        return min(((1.0, one), *finer), key=lambda option: option[0] * share(option[1]))[1]

    return best(blocks[0]), best(blocks[1])


def make(
    mask: Mask,
    q_tokens: Tokens,
    k_tokens: Tokens,
    q: tuple[int, ...],
    k: tuple[int, ...],
    change: Change,
    blocks: tuple[Blocks, Blocks],
    rate: float = 0.0,
    seed: Any = 0,
) -> tuple[tuple[Plan, Plan], tuple[Tables, Tables]]:
    """Plan and tables of the forward (visited by query blocks) and of the backward (by key blocks).

    Where all columns are NumPy, so are the tables, and the plans know which kinds of blocks there are.
    """
    columns = mask.prepare(q_tokens, k_tokens)
    hashes = dropout.columns(seed, q[0], q[2], q[1], k[1]) if rate else None
    made = [
        _make(mask, columns, (q_tokens, k_tokens), q, k, change, size, by_keys, rate, hashes)
        for size, by_keys in zip(blocks, (False, True), strict=True)
    ]
    return tuple(zip(*made, strict=True))  # type: ignore[return-value]


def _make(
    mask: Mask,
    columns: Any,
    tokens: tuple[Tokens, Tokens],
    q: tuple[int, ...],
    k: tuple[int, ...],
    change: Change,
    blocks: Blocks,
    by_keys: bool,
    rate: float,
    hashes: tuple[Array, Array] | None,
) -> tuple[Plan, Tables]:
    block_q, block_k = min(blocks.q, q[1]), min(blocks.k, k[1])
    ratio, groups = q[2] // k[2], k[2] // blocks.heads
    status = mask.classify_columns(*columns, block_q, block_k, q[1], k[1])
    if k[1] % block_k:  # The last key block has places that hold no key.
        last = np.arange(status.shape[3]) == status.shape[3] - 1
        status = status - ((status == FULL) & last).astype(status.dtype)
    if status.shape[1] > 1:  # Heads taken together share their lists.
        status = status.reshape(status.shape[0], groups, blocks.heads * ratio, *status.shape[2:])
        low, high = status.min(2), status.max(2)
        status = low + ((low == EMPTY) & (high > EMPTY)).astype(status.dtype)
    status = status.swapaxes(2, 3) if by_keys else status
    merge = blocks.merge if change.linear and not rate else 1
    lists = _lists(status, merge)
    known = isinstance(status, np.ndarray)
    arrays, tree = jax.tree.flatten(mask)
    plan = Plan(
        change=change,
        length=q[1],
        keys=k[1],
        block_q=block_q,
        block_k=block_k,
        heads=blocks.heads,
        groups=groups,
        ratio=ratio,
        merge=merge,
        partial=not known or bool((status != FULL).any()),
        runs=lists.run_order.shape[-1] > 0 and (not known or bool(lists.runs.any())),
        singles=not known or bool(lists.singles.any()),
        rate=rate,
        mask=tree,
    )
    return plan, Tables(
        lists=lists,
        mask_arrays=tuple(arrays),
        q={name: _pad_edge(column, plan.q_blocks * block_q) for name, column in columns[0].items()},
        k={name: _pad_edge(column, plan.k_blocks * block_k) for name, column in columns[1].items()},
        tokens=None
        if change.function is None
        else (
            tokens[0].map(lambda column: _pad_edge(column, plan.q_blocks * block_q)),
            tokens[1].map(lambda column: _pad_edge(column, plan.k_blocks * block_k)),
        ),
        hashes=None
        if hashes is None
        else (
            {"hash": _pad_edge(hashes[0], plan.q_blocks * block_q)},
            {"hash": _pad_edge(hashes[1], plan.k_blocks * block_k)},
        ),
    )


def _lists(status: Array, merge: int) -> Lists:
    """The lists from the classes [B|1, G|1, n, m]."""
    xp = np if isinstance(status, np.ndarray) else jnp
    whole = status.shape[3] // merge
    run = (status[..., : whole * merge] == FULL).reshape(*status.shape[:3], whole, merge).all(-1)
    in_run = xp.repeat(run, merge, axis=-1)
    in_run = xp.pad(in_run, ((0, 0),) * 3 + ((0, status.shape[3] - whole * merge),))
    single = (status != EMPTY) & ~in_run

    def first(chosen: Array) -> tuple[Array, Array]:
        return xp.argsort(~chosen, axis=-1, stable=True).astype(np.int32), chosen.sum(-1).astype(np.int32)

    return Lists(*first(run), *first(single))


def _even(length: int, largest: int) -> int:
    """A block of at most `largest` that cuts `length` into the fewest blocks of nearly one size."""
    count = -(-length // largest)
    return length if count == 1 else min(largest, -(-length // (8 * count)) * 8)


def _at(table: Array, b: Array, g: Array, i: Array) -> Array:
    """table[b, g, i], where an axis of size 1 stands for all."""
    table = jnp.asarray(table)
    at = (b if table.shape[0] > 1 else 0, g if table.shape[1] > 1 else 0, i, *(0,) * (table.ndim - 3))
    return cut(table, at, (1, 1, 1, *table.shape[3:])).reshape(table.shape[3:])


def _pad(x: Array, length: int, value: float) -> Array:
    missing = length - x.shape[1]
    return jnp.pad(x, ((0, 0), (0, missing)) + ((0, 0),) * (x.ndim - 2), constant_values=value) if missing else x


def _pad_edge(column: Array, length: int) -> Array:
    xp = np if isinstance(column, np.ndarray) else jnp
    return xp.pad(column, ((0, 0),) * (column.ndim - 1) + ((0, length - column.shape[-1]),), mode="edge")
