"""What the recurrence needs to know of the tokens: where documents begin, and what is padding."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from kernels.tokens import Tokens


class Timeline(NamedTuple):
    """Where states are forgotten, and which tokens are real.

    Two tokens share a state where no document begins after the earlier one up to the later one; their distance, by
    which decay runs, is the number of valid tokens after the earlier one up to the later one: padding ages nothing.
    """

    begins: Bool[Array, "B T"]  # The first valid token of a document; never where `valid` is False.
    valid: Bool[Array, "B T"]


def timeline(tokens: Tokens) -> Timeline:
    """The timeline of `tokens`.

    A document begins at a valid token whose segment differs from that of the valid token before it, and at one whose
    index is its own `start`. So an initial state lives on in the first document of the call unless `start` says that
    this document begins here.
    """
    columns = [x for x in (tokens.index, tokens.segment, tokens.start, tokens.valid) if x is not None]
    shape = jnp.broadcast_shapes(*(x.shape for x in columns))
    valid = jnp.ones(shape, bool) if tokens.valid is None else jnp.broadcast_to(tokens.valid, shape)
    first = jnp.zeros(shape, bool) if tokens.start is None else jnp.broadcast_to(tokens.index == tokens.start, shape)
    if tokens.segment is not None:
        first |= _changes(jnp.broadcast_to(tokens.segment, shape), valid)
    return Timeline(first & valid, valid)


def _changes(segment: Int[Array, "B T"], valid: Bool[Array, "B T"]) -> Bool[Array, "B T"]:
    """Where a token's segment differs from that of the last valid token before it (False where there is none)."""
    last = jax.lax.cummax(jnp.where(valid, jnp.arange(segment.shape[1], dtype=jnp.int32), -1), axis=1)
    before = jnp.pad(last, ((0, 0), (1, 0)), constant_values=-1)[:, :-1]
    return (before >= 0) & (segment != jnp.take_along_axis(segment, jnp.maximum(before, 0), axis=1))
