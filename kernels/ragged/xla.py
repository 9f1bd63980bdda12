"""The ragged layer as XLA's own ragged products (TPU, GPU), with gradients of the weights in their own type."""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

_FORWARD = lax.RaggedDotDimensionNumbers((((1,), (1,)), ((), ())), lhs_ragged_dimensions=[0], rhs_group_dimensions=[0])
_INPUT = lax.RaggedDotDimensionNumbers((((1,), (2,)), ((), ())), lhs_ragged_dimensions=[0], rhs_group_dimensions=[0])
_WEIGHT = lax.RaggedDotDimensionNumbers((((0,), (0,)), ((), ())), lhs_ragged_dimensions=[0], rhs_group_dimensions=[])


@jax.custom_vjp
def ragged(x: Float[Array, "R I"], w: Float[Array, "N I O"], sizes: Int[Array, " N"]) -> Float[Array, "R O"]:
    """Row r times the matrix of its group; 0 where no group holds r."""
    return _rows(x, w, sizes, _FORWARD)


def _forward(x, w, sizes):
    return ragged(x, w, sizes), (x, w, sizes)


def _backward(saved, dy):
    x, w, sizes = saved
    held = _held(x, sizes)
    dw = _product(jnp.where(held, x, 0), jnp.where(held, dy, 0), sizes, _WEIGHT)
    return _rows(dy, w, sizes, _INPUT), dw.astype(w.dtype), None


ragged.defvjp(_forward, _backward)


def _rows(x, w, sizes, dimensions):
    y = _product(x, w.astype(x.dtype), sizes, dimensions).astype(x.dtype)
    return jnp.where(_held(x, sizes), y, 0)  # A kernel may leave alone what lies behind the last group.


def _held(x, sizes):
    """Which rows are in a group."""
    return (jnp.arange(x.shape[0]) < jnp.sum(sizes))[:, None]


def _product(a, b, sizes, dimensions):
    wide = jnp.promote_types(a.dtype, jnp.float32)
    return lax.ragged_dot_general(a, b, sizes, dimensions, preferred_element_type=wide)
