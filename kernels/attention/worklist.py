"""Lists of live blocks for kernels: which key blocks a query block visits, and the other way round."""

from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int, Int8

from kernels.attention.masks import EMPTY, FULL, Mask


class Visits(NamedTuple):
    """For each of n blocks the blocks of the other side that are live: the full ones first, each kind in order.

    Places beyond `live` repeat the last live block (0 where there is none), so that a pipeline fetches nothing new.
    """

    order: Int[Array, "B|1 H|1 n m"]
    full: Int[Array, "B|1 H|1 n"]  # How many of them are full.
    live: Int[Array, "B|1 H|1 n"]  # How many there are.


class Lists(NamedTuple):
    """The live blocks of one map, seen from both sides."""

    by_query: Visits
    by_key: Visits


def classes(
    mask: Mask, columns: Any, length: int, keys: int, block_q: int, block_k: int
) -> Int8[Array, "B|1 H|1 nq nk"]:
    """The classes of all blocks, the last key block partial where it has places without a key."""
    status = mask.classify_columns(*columns, block_q, block_k, length, keys)
    if keys % block_k:
        last = np.arange(status.shape[3]) == status.shape[3] - 1
        status = status - ((status == FULL) & last).astype(status.dtype)
    return status


def lists(status: Int8[Array, "B|1 H|1 nq nk"]) -> Lists:
    """The lists from the classes of blocks; NumPy in, NumPy out, and then no longer than the longest."""
    return Lists(_visits(status), _visits(status.swapaxes(2, 3)))


def _visits(status: Any) -> Visits:
    xp = np if isinstance(status, np.ndarray) else jnp
    live, full = (status != EMPTY).sum(-1), (status == FULL).sum(-1)
    rank = xp.where(status == FULL, 0, xp.where(status != EMPTY, 1, 2))
    order = xp.argsort(rank, axis=-1, stable=True)
    if xp is np:
        order = order[..., : max(int(live.max(initial=0)), 1)]
    place = xp.minimum(xp.arange(order.shape[-1]), xp.maximum(live - 1, 0)[..., None])
    order = xp.where(live[..., None] > 0, xp.take_along_axis(order, place, axis=-1), 0)
    return Visits(*(x.astype(np.int32) for x in (order, full, live)))
