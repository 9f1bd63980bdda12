"""Who sees what, and who works on which part of the cache: the arithmetic that all forms of decode attention share."""

import math

import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Int

# Streaming multiprocessors of a GPU, TensorCores that share a program on a TPU, by a part of the device kind's name.
_UNITS = {
    "H100 PCIe": 114, "H100": 132, "H200": 132, "H20": 78, "B200": 148, "A100": 108, "A10": 72, "L40": 142, "L4": 58,
    "RTX 4090": 128, "TPU v4": 2, "TPU v5 lite": 1, "TPU v5e": 1, "TPU v5": 2, "TPU": 1,
}  # fmt: skip
_UNKNOWN = 108


def units(kind: str) -> int:
    """How many programs a device of this kind runs at once; an A100's number for an unknown one."""
    return next((count for name, count in _UNITS.items() if name in kind), _UNKNOWN)


def choose_splits(tiles: int, blocks: int, parallel: int) -> int:
    """In how many parts to cut each of `tiles` pieces of work, of `blocks` blocks each, for `parallel` units.

    The rule of FlashAttention-3's split-KV heuristics: none where the tiles nearly fill the device or the cache is
    short; otherwise the fewest parts whose waves are at least 85% as well filled as those of the best number.
    """
    if tiles == 0 or tiles >= 0.8 * parallel or blocks <= 4:
        return 1

    def filled(splits: int) -> float:
        waves = tiles * splits / parallel
        return waves / math.ceil(waves)

    numbers = range(1, min(128, parallel, blocks) + 1)
    best = max(map(filled, numbers))
    return next(splits for splits in numbers if filled(splits) >= 0.85 * best)


def visible(
    lengths: Int[Array, "B"], starts: Int[Array, "B"], queries: int, window: int, slots: int
) -> tuple[Int[Array, "B T"], Int[Array, "B T"]]:
    """First and last (exclusive) place that each query may see in a cache of `slots` places; window 0 is none."""
    after = lengths[:, None] - queries + 1 + jnp.arange(queries, dtype=jnp.int32)  # A query sees its own place.
    first = jnp.maximum(starts[:, None], after - window if window else 0)
    return jnp.broadcast_to(jnp.maximum(first, 0), after.shape), jnp.clip(after, 0, slots)


def parts(
    first: Int[Array, "B T"], last: Int[Array, "B T"], size: int, splits: int
) -> tuple[Int[Array, "B splits"], Int[Array, "B splits"]]:
    """First block and number of blocks (of `size` places) of each part: live blocks only, evenly over the parts.

    `first` and `last` come from `visible`: both grow with the query, so the first and the last query bound a row.
    """
    begin, end = first[:, :1], last[:, -1:]
    live = jnp.where(end > begin, (end + size - 1) // size - begin // size, 0)
    each = (live + splits - 1) // splits
    before = each * jnp.arange(splits, dtype=jnp.int32)
    return begin // size + before, jnp.clip(live - before, 0, each)


def next_live(count: Array, groups: int = 1) -> Array:
    """For each piece of work the next one behind it that has blocks, or its own number where there is none; the pieces
    are cut into `groups` that do not look beyond themselves."""
    none = count.shape[0]
    own = jnp.arange(none, dtype=jnp.int32).reshape(groups, -1)
    live = lax.cummin(jnp.where(count.reshape(own.shape) > 0, own, none), axis=1, reverse=True)
    after = jnp.pad(live[:, 1:], ((0, 0), (0, 1)), constant_values=none)
    return jnp.where(after < none, after, own).reshape(-1)
