"""Kinds of arrays a network holds besides its parameters."""

from flax import nnx


class Constant(nnx.Variable):
    """A fixed array that belongs to a layer: saved and sharded with it, never trained."""
