"""Which arrays of a network are which tensors of a checkpoint, and how one becomes the other."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

Arrays = tuple[np.ndarray, ...]


def same(*arrays: np.ndarray) -> Arrays:
    """The arrays as they are."""
    return arrays


def transposed(*arrays: np.ndarray) -> Arrays:
    """The last two axes of each exchanged: a Linear of ours is [in, out], theirs is [out, in]."""
    return tuple(array.swapaxes(-1, -2) for array in arrays)


@dataclasses.dataclass(frozen=True)
class Mapped:
    """Some arrays of a network, and the tensors of a checkpoint they are made from.

    Both functions only move numbers (views, transposes, permutations, splits, concatenations), so that there and back
    is bit-exact. Use one function object for all layers: what it does to shapes is worked out once for each.

    Attributes:
        ours: dotted names inside block `layer` ("attention.query.weight"), or inside the network where layer is None
            ("embedding.table").
        theirs: names of tensors, whole ("model.layers.3.self_attn.q_proj.weight").
        layer: number of the block, counted from 0.
        at: place inside the arrays of ours, where one is stacked from many tensors: (e,) for expert e of [E, D, I].
        read: the tensors, in the order of `theirs` -> the arrays, in that of `ours`.
        write: the reverse.
    """

    ours: tuple[str, ...]
    theirs: tuple[str, ...]
    layer: int | None = None
    at: tuple[int, ...] = ()
    read: Callable[..., Arrays] = same
    write: Callable[..., Arrays] = same


def array(ours: str, theirs: str, layer: int | None = None, at: tuple[int, ...] = ()) -> Mapped:
    """One array that is stored as it is: a table, a gain, a bias."""
    return Mapped((ours,), (theirs,), layer, at)


def matrix(ours: str, theirs: str, layer: int | None = None, at: tuple[int, ...] = ()) -> Mapped:
    """One matrix, [in, out] here and [out, in] there."""
    return Mapped((ours,), (theirs,), layer, at, transposed, transposed)


def linear(ours: str, theirs: str, layer: int | None = None, *, bias: bool = False) -> list[Mapped]:
    """A Linear: `.weight` and, with `bias`, `.bias`."""
    found = [matrix(f"{ours}.weight", f"{theirs}.weight", layer)]
    return found + ([array(f"{ours}.bias", f"{theirs}.bias", layer)] if bias else [])


def fused(sizes: Sequence[int]) -> dict[str, Any]:
    """`read` and `write` of matrices that a checkpoint keeps as one, beside each other along its output axis.

    `sizes` are the outputs of each: Mapped(("attention.query.weight", ...), ("...qkv_proj.weight",), layer,
    **fused(sizes)).
    """
    cuts = list(np.cumsum(sizes)[:-1])

    def read(whole: np.ndarray) -> Arrays:
        return tuple(part.T for part in np.split(whole, cuts))

    def write(*parts: np.ndarray) -> Arrays:
        return (np.concatenate([part.T for part in parts]),)

    return {"read": read, "write": write}
