"""Attention on Hopper GPUs through Pallas's Mosaic GPU: block sizes, and the two passes.

Figures per block of the grid, two-byte types, width D = Dv = 128: forward 128 x 128 in two stages, 160 KiB of shared
memory; backward 128 x 128 walked in steps of 64 and three stages, 160 KiB for the gradient of q, 162 KiB for those of
k and v. All fit the 227 KiB a block may have (`shared_bytes`).
"""

from typing import Any

from kernels.attention import mosaic_gpu_backward, mosaic_gpu_forward
from kernels.attention.fused import Sizes
from kernels.attention.mosaic_gpu_backward import backward
from kernels.attention.mosaic_gpu_forward import forward

__all__ = ["backward", "chosen", "forward", "padded", "shared_bytes"]


def padded(width: int) -> int:
    """The head width the kernels work on: whole rows of 128 bytes, as TMA swizzles them."""
    return -(-width // 64) * 64


def chosen(q: tuple[int, ...], k: tuple[int, ...], v: tuple[int, ...], dtype: Any) -> Sizes:
    """Block sizes [queries, keys] of both passes, for shapes [batch, tokens, heads, width].

    Forward each of two warpgroups owns 64 queries, whose scores and output fill its registers. Backward a warpgroup
    owns 64 queries or 64 keys; where two accumulators are too wide for its registers, or two warpgroups' tiles for
    shared memory, a block has 64 of them (`mosaic_gpu_backward`).
    """
    width, value_width = padded(q[3]), padded(v[3])
    forward = (128, 128) if width + value_width <= 320 else (128, 64)
    queries = 128 if width + value_width <= 384 else 64
    keys = 128 if width + value_width <= 256 else 64
    return Sizes(forward, (queries, keys))


def shared_bytes(q: tuple[int, ...], v: tuple[int, ...], sizes: Sizes) -> dict[str, int]:
    """Bytes of shared memory of each kernel with these sizes."""
    widths = padded(q[3]), padded(v[3])
    return {
        "forward": mosaic_gpu_forward.shape_of(*sizes.forward, *widths)[2],
        "queries": mosaic_gpu_backward.queries_shape(sizes.backward[0], *widths)[2],
        "keys": mosaic_gpu_backward.keys_shape(sizes.backward[1], *widths)[2],
    }
