"""Sizes of blocks on TPU, by what they take of VMEM."""

import math
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp

from kernels import platform
from kernels.attention.fused import Sizes

LANES = 128
_MIB = 1 << 20
_BLOCKS = (1024, 768, 512, 384, 256, 128)  # Query and key tokens, the first that fits.
_RESIDENT = 2 / 7  # Of VMEM, for the gradients of queries.


def vmem_limit() -> int:
    """Bytes of VMEM that a kernel may take: 7/8 of a core's 16 MiB (v4 and older), 128 (v5e, v6e) or 64 (others)."""
    kind = platform.device_kind()
    old, large = (any(name in kind for name in names) for names in (("v2", "v3", "v4"), ("v5e", "v5 lite", "v6")))
    return (14 if old else 112 if large else 56) * _MIB


def folding(group: int, blocks: int, width: int, block_q: int) -> tuple[int, int]:
    """For the backward pass: heads of a group whose queries' gradients stay in VMEM together, and query blocks of each.

    They are float32, twice (one group's are written out while the next one's are summed), in `_RESIDENT` of VMEM.
    """
    room = max(int(vmem_limit() * _RESIDENT) // (2 * block_q * _lanes(width) * 4), 1)
    few = min(blocks, 4)  # Query blocks of a head, rather than fewer, for which key blocks are worth fetching again.
    fold = max(n for n in range(1, group + 1) if group % n == 0 and (n == 1 or n * few <= room))
    chunks = math.ceil(blocks / max(room // fold, 1))
    return fold, math.ceil(blocks / chunks)


def part_of(keys: int, most: int = 512) -> int:
    """Keys worked on at once: a divisor of the block, so that products of one part hide the softmax of another."""
    return next((n for n in range(most, 0, -LANES) if keys % n == 0), keys)


def forward_bytes(block_q: int, block_k: int, width: int, value: int, itemsize: int) -> int:
    """VMEM of the forward pass: two buffers of what comes and goes, a bias too, sums, and what is being computed.

    The last is up to half of this as compiled.
    """
    width, value = _lanes(width), _lanes(value)
    moving = (block_q + block_k) * (width + value) * itemsize + block_q * block_k * 4
    sums = block_q * (value + 2 * LANES) * 4
    return 2 * moving + sums + 3 * block_q * part_of(block_k) * 4


def backward_bytes(block_q: int, block_k: int, width: int, value: int, itemsize: int, resident: int = 0) -> int:
    """The same of the backward pass, where the gradients of `resident` query blocks stay."""
    width, value = _lanes(width), _lanes(value)
    moving = (block_q + block_k) * (width + value) * itemsize + block_k * (width + value) * 4
    bias = 2 * block_q * block_k * 4
    sums = 2 * resident * block_q * width * 4
    return 2 * (moving + bias) + sums + 4 * block_q * part_of(block_k) * 4


def chosen(q: tuple[int, ...], k: tuple[int, ...], v: tuple[int, ...], dtype: Any) -> Sizes:
    """Blocks of 1024 by 1024 where VMEM allows, evenly cut: a sequence shorter than a block is one block."""
    width, value, itemsize = q[3], v[3], jnp.dtype(dtype).itemsize
    # float32 takes six products for one: code, and time to compile it.
    sizes = [n for n in _BLOCKS if n * itemsize <= 2048]

    def fitting(used: Callable[..., int], room: float) -> tuple[int, int]:
        most = next((n for n in sizes if used(n, n, width, value, itemsize) <= room), sizes[-1])
        return _even(q[1], most, 16), _even(k[1], most, LANES)

    return Sizes(fitting(forward_bytes, vmem_limit()), fitting(backward_bytes, vmem_limit() * (1 - _RESIDENT)))


def padded(width: int) -> int:
    """Head widths stay what they are: arrays and registers of a TPU pad lanes by themselves."""
    return width


def _even(length: int, most: int, unit: int) -> int:
    """A block of at most `most` tokens that cuts the length evenly: a multiple of 128, or of `unit` if it is short."""
    length = max(length, 1)
    blocks = math.ceil(length / most)
    unit = unit if length < LANES else LANES
    return math.ceil(math.ceil(length / blocks) / unit) * unit


def _lanes(width: int) -> int:
    return math.ceil(width / LANES) * LANES
