"""What is known about each token besides its content: the columns that masks and positions read."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("index", "segment", "start", "position", "valid", "modality", "image", "frame", "prompt"),
    meta_fields=(),
)
@dataclasses.dataclass(frozen=True)
class Tokens:
    """Token metadata, one column per array; every column has shape [B, T], or [1, T] where all rows agree.

    `index` orders the sequence and decides causality. `position` is what rotary embeddings see: a float, and free
    of the order (it restarts in every packed document, it may be shared by the tokens of a video frame).
    """

    index: Int[Array | np.ndarray, "B T"]
    segment: Int[Array, "B T"] | None = None  # Packed document; attention never crosses documents.
    start: Int[Array, "B T"] | None = None  # Index of the first token of the document; None means 0.
    position: Float[Array, "B T"] | None = None  # None means index.
    valid: Bool[Array, "B T"] | None = None  # False marks padding; None means all valid.
    modality: Int[Array, "B T"] | None = None
    image: Int[Array, "B T"] | None = None
    frame: Int[Array, "B T"] | None = None
    prompt: Bool[Array, "B T"] | None = None

    @property
    def length(self) -> int:
        """T."""
        return self.index.shape[-1]

    def positions(self) -> Float[Array, "B T"]:
        """Rotary positions, float32."""
        return (self.index if self.position is None else self.position).astype(jnp.float32)  # type: ignore[return-value]

    def map(self, function: Any) -> "Tokens":
        """The same columns, each passed through `function`; absent columns stay absent."""
        return jax.tree.map(function, self)


def sequence(length: int, start: int | Int[Array, "B"] = 0, *, valid: Bool[Array, "B T"] | None = None) -> Tokens:
    """Consecutive tokens of one document per row, beginning at index `start` (one number, or one per row).

    A plain number gives a NumPy index, so that masks know their blocks while tracing.
    """
    if isinstance(start, int):
        return Tokens(index=start + np.arange(length, dtype=np.int32)[None], valid=valid)
    first = jnp.atleast_1d(jnp.asarray(start, jnp.int32))
    return Tokens(index=first[:, None] + jnp.arange(length, dtype=jnp.int32)[None], valid=valid)


def packed(segment: Int[Array, "B T"], position: Float[Array, "B T"] | None = None) -> Tokens:
    """Several documents per row, told apart by `segment`; segment 0 is padding.

    Positions restart in each document unless given.
    """
    index = jnp.broadcast_to(jnp.arange(segment.shape[1], dtype=jnp.int32), segment.shape)
    first = jnp.concatenate([jnp.ones_like(segment[:, :1], bool), segment[:, 1:] != segment[:, :-1]], axis=1)
    start = jax.lax.cummax(jnp.where(first, index, 0), axis=1)
    if position is None:
        position = (index - start).astype(jnp.float32)
    return Tokens(index=index, segment=segment, start=start, position=position, valid=segment > 0)
