"""What lightning attention costs, from its shapes alone."""


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
    batch: int, length: int, heads: int, head_dim: int, value_dim: int, *, itemsize: int = 4, backward: bool = False
) -> int:
    """Bytes that must cross memory once: forward reads q, k, v, writes the output, reads and writes the float32 state.

    `backward` reads q once, k, v and do in both sweeps, and writes dq, dk, dv, besides the states and their gradients.
    """
    tokens = batch * length * heads * itemsize
    states = batch * heads * head_dim * value_dim * 4
    if backward:
        return tokens * (5 * head_dim + 5 * value_dim) + 4 * states
    return tokens * (2 * head_dim + 2 * value_dim) + 2 * states


def state_bytes(heads: int, head_dim: int, value_dim: int) -> int:
    """Bytes of the float32 state that stands for the whole past of one row, whatever its length."""
    return 4 * heads * head_dim * value_dim


def _pairs(length: int, chunk: int) -> int:
    """(query, key) pairs computed inside chunks, masked ones included."""
    whole, rest = divmod(length, chunk)
    return whole * chunk * chunk + rest * rest
