"""What the kernels for accelerators share: one derivative, one sweep over chunks, one number that dates a token.

Every pass is the same sweep over chunks of C tokens, with a state S that never leaves the chip:

    out_i = sum_j M_ij (a_i . b_j) c_j + near_i a_i S,    S <- through S + sum_j b_j (far_j c_j)^T

Forwards M_ij = exp(-s (clock_i - clock_j)) for j <= i of one document, near decays from the chunk's beginning to i, far
from j to its end. With (a, b, c) = (q, k, v) the sweep gives the output and the final state (arXiv 2405.17381); with
(dO, v, k) and the transposed state it gives dq. In reverse (M transposed, near and far exchanged, chunks from the last
to the first, S the gradient of the state) (k, q, dO) gives dv and the gradient of the initial state, (v, dO, q) gives
dk. So no state is ever stored, and only the inputs are kept for the backward pass.
"""

import functools
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from kernels.lightning.timeline import Timeline
from kernels.varying import alike

# A code holds valid (1 bit), the clock and the document (11 bits each): exact in float32, as TPUs sum lanes.
DOCUMENT_SHIFT = 12
CLOCK_MASK = 2**11 - 1


class Kernels(Protocol):
    """The passes of one route; hashable. Slopes are -s log2(e), so that decay over n tokens is exp2(slope n)."""

    chunk: int

    def forward(
        self, q: Array, k: Array, v: Array, slopes: Array, codes: Any, state: Array
    ) -> tuple[Array, Array, Any]:
        """Output, final state, and the state (or states) that `backward` takes."""

    def backward(
        self, q: Array, k: Array, v: Array, do: Array, slopes: Array, codes: Any, states: Any, dstate: Array
    ) -> tuple[Array, Array, Array, Array]:
        """dq, dk, dv and the gradient of the initial state."""


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def attend(
    kernels: Kernels,
    q: Float[Array, "B T H D"],
    k: Float[Array, "B T H D"],
    v: Float[Array, "B T H E"],
    decay: Float[Array, "H"],
    moments: Timeline | None,
    initial_state: Float[Array, "B H D E"],
) -> tuple[Float[Array, "B T H E"], Float[Array, "B H D E"]]:
    """Output and final state by `kernels`; `decay` is a constant."""
    return _forward(kernels, q, k, v, decay, moments, initial_state)[0]


def _forward(kernels, q, k, v, decay, moments, initial_state):
    slopes = decay.astype(jnp.float32) * np.float32(-np.log2(np.e))
    slopes, code, state = alike((slopes, codes(moments, kernels.chunk), initial_state), q, k, v)
    out, final, states = alike(kernels.forward(q, k, v, slopes, code, state), q, k, v)
    return (out, final), (q, k, v, slopes, code, states)


def _backward(kernels, saved, cotangents):
    q, k, v, slopes, code, states = saved
    found = kernels.backward(q, k, v, cotangents[0], slopes, code, states, cotangents[1])
    dq, dk, dv, dinitial = alike(found, q, k, v)
    return dq, dk, dv, None, None, dinitial


attend.defvjp(_forward, _backward)


def codes(moments: Timeline | None, chunk: int) -> Int[Array, "B N*C"] | None:
    """One integer per token, padded to whole chunks: valid + 2 clock + 2^12 document.

    Within each chunk of C tokens the clock counts valid tokens and the document beginnings, up to and including the
    token itself: the state before the chunk has clock 0 and document 0.
    """
    if moments is None:
        return None
    begins, valid = (jnp.pad(x, ((0, 0), (0, -x.shape[1] % chunk))).astype(jnp.int32) for x in moments)
    clock, document = (jnp.cumsum(x.reshape(x.shape[0], -1, chunk), axis=2).reshape(x.shape) for x in (valid, begins))
    return valid + 2 * clock + 2**DOCUMENT_SHIFT * document


def decoded(code: Array) -> tuple[Array, Array, Array]:
    """Valid (0 or 1), clock and document of `codes`."""
    return code & 1, (code >> 1) & CLOCK_MASK, code >> DOCUMENT_SHIFT
