"""What lightning attention costs, from its shapes alone."""

import math


def flops(length: int, heads: int, head_dim: int, value_dim: int, *, chunk: int = 64, backward: bool = False) -> int:
    """Operations of one row in the chunked form (a multiply-add is two), whole chunks counted as they are computed.

    Forward per token and head: scores 2 C D, values 2 C E, reading and writing the state 2 D E each. `backward` counts
    the gradients' two sweeps: dq (scores 2 C E, 2 C D, state 2 D E, state rebuilt 2 D E), then dk and dv
    (4 C (D + E), three state products).
    """
    products, state = 2 * (head_dim + value_dim), 2 * head_dim * value_dim
    pairs = _pairs(length, chunk)
    if backward:
        return heads * (3 * products * pairs + 5 * state * length)
    return heads * (products * pairs + 2 * state * length)


def bytes(
    batch: int,
    length: int,
    heads: int,
    head_dim: int,
    value_dim: int,
    *,
    itemsize: int = 4,
    backward: bool = False,
    parts: int = 1,
) -> int:
    """Bytes that must cross memory once: forward reads q, k, v, writes the output, reads and writes the float32 state.

    `backward` reads q once, k, v and do in both sweeps, and writes dq, dk, dv, besides the states and their gradients.
    A sequence cut into `parts` (the Triton kernels) is first read for what each part adds to the state: k and v, or q
    and do.
    """
    tokens = batch * length * heads * itemsize * (head_dim + value_dim)
    states = batch * heads * head_dim * value_dim * 4
    cut = tokens + 4 * states * parts if parts > 1 else 0
    return cut + (5 * tokens + 4 * states if backward else 2 * tokens + 2 * states)


def state_bytes(heads: int, head_dim: int, value_dim: int) -> int:
    """Bytes of the float32 state that stands for the whole past of one row, whatever its length."""
    return 4 * heads * head_dim * value_dim


def executed(
    length: int,
    heads: int,
    head_dim: int,
    value_dim: int,
    *,
    chunk: int,
    block: int = 0,
    parts: int = 1,
    backward: bool = False,
) -> int:
    """Operations of one row as the kernels do them: every chunk is whole.

    `block` 0: the Pallas kernels, whose sum is that of `flops`. Else the Triton kernels: scores once per `block`
    columns of a result, the state anew for each of dq, dk and dv, and once more where the sequence is cut into `parts`.
    """
    whole = math.ceil(length / chunk) * chunk
    if not block:
        return flops(whole, heads, head_dim, value_dim, chunk=chunk, backward=backward)
    state = 2 * head_dim * value_dim

    def sweep(width: int, columns: int) -> int:
        return 2 * chunk * (width * math.ceil(columns / block) + columns) + 2 * state

    sweeps = sweep(head_dim, value_dim) + 2 * backward * sweep(value_dim, head_dim)
    return heads * whole * (sweeps + (parts > 1) * state)


def _pairs(length: int, chunk: int) -> int:
    """(query, key) pairs computed inside chunks, masked ones included."""
    whole, rest = divmod(length, chunk)
    return whole * chunk * chunk + rest * rest
