"""The dense layer with its own backward pass, as plain dots (GPU, TPU) and as the dots XLA's CPU backend is fast at.

What the CPU form does and why (measured figures: docs/kernels.md):

- Rank 2: rows are flattened first. Everything around the dots (bias, activation and its backward) then runs on rank 2,
  which is where most of the gain in a training step comes from.
- bfloat16 dots give float32 and are cast afterwards: only bf16 x bf16 -> f32 has a fast kernel, bf16 -> bf16 has none.
- Weight gradients contract the row axis. The fast kernels want the left side stored with the contracted axis last, so
  the narrower of x and dy is transposed into memory first.
- Both sides of a bf16 dot must be row-major when the compiler looks at it, and a transpose (also one that the caller
  made, as of a tied embedding) is at that time only a layout: the dot would be done in float32. A barrier and a reshape
  put it into memory.
- A barrier behind each dot keeps later transposes of the result from being folded into the dot; for bf16 that fold
  produces a dot the CPU runtime does not have.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

FEW_ROWS = 16  # Below, as in decoding, a dot costs about as much as reading w: no copy of w is worth a faster kernel.


def linear_xla(
    x: Float[Array, "... I"], w: Float[Array, "I O"], bias: Float[Array, "O"] | None = None
) -> Float[Array, "... O"]:
    """Plain dots over the last axis; leading axes are kept, so that their sharding stays theirs."""
    return _linear(_plain, _plain_weight_gradient, x, w, bias)


def linear_cpu(
    x: Float[Array, "... I"], w: Float[Array, "I O"], bias: Float[Array, "O"] | None = None
) -> Float[Array, "... O"]:
    """Rank-2 dots, weight gradients with the narrower side transposed in memory."""
    rows = x.reshape(-1, x.shape[-1])
    return _linear(_pinned, _transposed_weight_gradient, rows, w, bias).reshape(*x.shape[:-1], w.shape[1])


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _linear(dot, weight_gradient, x, w, bias):
    out = dot(x, w.astype(x.dtype), 0)
    return (out if bias is None else out + bias.astype(out.dtype)).astype(x.dtype)


def _linear_forward(dot, weight_gradient, x, w, bias):
    return _linear(dot, weight_gradient, x, w, bias), (x, w, bias)


def _linear_backward(dot, weight_gradient, saved, dy):
    x, w, bias = saved
    dx = dot(dy, w.astype(x.dtype), 1).astype(x.dtype)
    dw = weight_gradient(x, dy).astype(w.dtype)
    if bias is None:
        return dx, dw, None
    return dx, dw, jnp.sum(dy, axis=tuple(range(dy.ndim - 1)), dtype=_wide(dy)).astype(bias.dtype)


_linear.defvjp(_linear_forward, _linear_backward)


def _wide(x: Array) -> jnp.dtype:
    """The type sums are kept in."""
    return jnp.promote_types(x.dtype, jnp.float32)


def _plain(a: Array, b: Array, axis: int) -> Array:
    """a's last axis against `axis` of the matrix b."""
    return lax.dot_general(a, b, (((a.ndim - 1,), (axis,)), ((), ())), preferred_element_type=_wide(a))


def _pinned(a: Array, b: Array, axis: int) -> Array:
    if a.dtype.itemsize == 2 and a.shape[0] >= FEW_ROWS:
        a, b = _stored(a), _stored(b)
    return lax.optimization_barrier(_plain(a, b, axis))


def _plain_weight_gradient(x: Array, dy: Array) -> Array:
    rows = tuple(range(x.ndim - 1))
    return lax.dot_general(x, dy, ((rows, rows), ((), ())), preferred_element_type=_wide(x))


def _transposed_weight_gradient(x: Array, dy: Array) -> Array:
    if x.shape[1] <= dy.shape[1]:
        return _pinned(_transposed(x), dy, 0)
    return _pinned(_transposed(dy), x, 0).T


def _transposed(x: Array) -> Array:
    return _stored(x.T)


def _stored(x: Array) -> Array:
    """The matrix x, row-major in memory and opaque to the simplifier; costs nothing where it is so already."""
    return lax.optimization_barrier(x[None]).reshape(x.shape)
