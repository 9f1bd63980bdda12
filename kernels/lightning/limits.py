"""What the kernels can do and in which sizes, from shapes and types alone: nothing here imports a kernel."""

import math
from typing import Any

import jax.numpy as jnp

from kernels import _triton

LANES = 128
WIDEST = 256  # Columns of a state in registers.
PROCESSORS = 132  # Of an H100 or H200: programs below that leave some idle.
VMEM_BYTES = 24 * 2**20  # A step's working set by the count below; the compiler is allowed twice as much.


def tpu_refusal(case: Any) -> str | None:
    """Why the Pallas kernels for TPU cannot do the case."""
    return _common(case) or (
        None
        if tpu_sizes(case.q, case.v[3], case.dtype)
        else f"heads of width {case.q[3]} and {case.v[3]} ({case.q[2]} of them) do not fit {VMEM_BYTES} bytes of VMEM"
    )


def tpu_sizes(q: tuple[int, ...], value: int, dtype: Any) -> tuple[int, int] | None:
    """Chunk length and heads per step, or None where nothing fits.

    Heads lie side by side in lanes, so that a step takes whole tiles of 128 lanes or all heads; up to 512 lanes where
    that leaves two steps or more for the two cores of a chip. Per chunk C of 256, D = E = 128, the products do 192
    operations per byte moved, about what v5e and v5p can do; twice C would only add operations.
    """
    batch, length, heads, width = q
    for chunk in (256, 128) if length > LANES else (LANES,):
        groups = [g for g in range(1, heads + 1) if heads % g == 0 and (g == heads or _aligned(g, width, value))]
        groups = [g for g in groups if _vmem(chunk, g, width, value, jnp.dtype(dtype).itemsize) <= VMEM_BYTES]
        if groups:
            wide = [g for g in groups if g * max(width, value) <= 4 * LANES and batch * heads // g >= 2]
            return chunk, max(wide, default=groups[0])
    return None


def _aligned(group: int, *widths: int) -> bool:
    return all(group * width % LANES == 0 for width in widths)


def _vmem(chunk: int, group: int, width: int, value: int, itemsize: int) -> int:
    """Bytes of the sweep for dk and dv: six token blocks and two states, each twice, and temporaries of one head."""
    lanes = [math.ceil(n / LANES) * LANES for n in (group * width, group * value)]
    tokens = 3 * chunk * sum(lanes) * itemsize
    states = 2 * group * width * math.ceil(value / LANES) * LANES * 4
    return 2 * (tokens + states) + 4 * chunk * (6 * chunk + 2 * sum(lanes) // group)


def gpu_refusal(case: Any) -> str | None:
    """Why the Triton kernels cannot do the case."""
    if max(case.q[3], case.v[3]) > WIDEST:
        return f"heads of width {max(case.q[3], case.v[3])}: it holds at most {WIDEST} columns of q and k on chip"
    return _common(case) or _triton.available()


def gpu_sizes(q: tuple[int, ...], value: int, dtype: Any) -> tuple[int, int, int, int, int]:
    """Chunk length, columns of the state per program, parts of the sequence, warps and pipeline stages.

    Wider programs read q and k less often, narrower ones are more. Only where those are too few is the sequence cut
    into parts, which costs a pass over k and v.
    """
    batch, length, heads, width = q
    widest = max(width, value)
    if dtype == jnp.float32:  # Three products each: registers bound the tiles.
        return 16 if widest > 64 else 32, 32, 1, 8, 2
    chunk, parts = 64, 1
    wide, narrow = (batch * heads * math.ceil(value / n) for n in (64, 32))
    block = 64 if widest <= 128 and wide >= PROCESSORS else 32
    if narrow < PROCESSORS:
        parts = max(1, min(math.ceil(2 * PROCESSORS / wide), length // (16 * chunk)))
        block = 64 if widest <= 128 and wide * parts > narrow else 32
    return chunk, block, parts, 4, 2


def _common(case: Any) -> str | None:
    if case.dtype not in (jnp.bfloat16, jnp.float32):
        return f"it computes in bfloat16 and float32, not in {jnp.dtype(case.dtype).name}"
    if case.q[1] == 1:
        return "one token needs no kernel: `xla` does decoding steps"
    if 0 in case.q or 0 in case.v:
        return "there is nothing to compute"
    return None
