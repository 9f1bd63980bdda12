"""Token embeddings, in and out."""

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from kernels.linear import linear
from layers.setting import Setting
from sharding import logical


class Embedding(nnx.Module):
    """A [V, D] table: rows in, and (tied) its transpose out."""

    def __init__(self, setting: Setting, vocab_size: int, *, scale: float = 1.0, rngs: nnx.Rngs) -> None:
        self.scale, self.compute_dtype = scale, setting.compute_dtype
        table = setting.normal(rngs.params(), (vocab_size, setting.width), setting.init_std)
        self.table = nnx.Param(table, axes=("vocab", "embed"))

    def __call__(self, ids: Int[Array, "B T"]) -> Float[Array, "B T D"]:
        """The rows of `ids`, scaled, in the compute dtype.

        Ids outside the table give rows of NaN, never a neighbour.
        """
        table = logical.gather(self.table[...], ("vocab", "embed"))
        rows = (
            table.at[ids].get(mode="fill", fill_value=jnp.nan, wrap_negative_indices=False).astype(self.compute_dtype)
        )
        return rows if self.scale == 1.0 else rows * jnp.asarray(self.scale, rows.dtype)

    def logits(self, x: Float[Array, "B T D"]) -> Float[Array, "B T V"]:
        """x times the transposed table."""
        return linear(x, logical.gather(self.table[...].astype(x.dtype), ("vocab", "embed")).T)
