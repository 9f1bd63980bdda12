"""What each implementation of the decode op can do, as declared facts, and the sizes of its blocks."""

import dataclasses
from typing import Any

import jax.numpy as jnp

from kernels import _triton
from kernels.platform import device_kind, not_hopper

#: Places of the cache per step of the XLA form.
XLA_BLOCK = 512
#: Entries of a block table that fit a TPU's scalar memory beside all else.
TPU_TABLE = 1 << 17


@dataclasses.dataclass(frozen=True)
class Case:
    """The facts of one call that decide which implementations can do it."""

    q: tuple[int, ...]
    k: tuple[int, ...]  # Of a contiguous cache [B, S, Hk, D], or of pages [P, page, Hk, D].
    value_width: int
    shared: bool  # The values are columns of the keys.
    dtype: Any
    table: tuple[int, ...] | None  # [B, n] of a cache in pages.
    splits: int | None

    @property
    def slots(self) -> int:
        """Places of a row's cache."""
        return self.k[1] if self.table is None else self.k[1] * self.table[1]


def reference(case: Case) -> str | None:
    """The reference forms the whole map at once."""
    return "it reads a cache in one part: leave splits out" if (case.splits or 1) > 1 else None


def pallas_tpu(case: Case) -> str | None:
    """Mosaic takes caches as XLA lays them out, and holds all scores of a block."""
    kv_heads, width = case.k[2:]
    if case.dtype not in (jnp.bfloat16, jnp.float32):
        return f"it computes in bfloat16 and float32, not in {case.dtype}"
    if not case.shared and (width % 128 == 0) != (case.value_width % 128 == 0):
        return (
            f"keys of width {width} and values of width {case.value_width} lie differently in memory: pad both to a "
            f"multiple of 128, or neither"
        )
    layout = tpu_layout(kv_heads, width, width if case.shared else case.value_width)
    together = kv_heads if layout in ("merged", "tiled") else 1
    rows = case.q[1] * case.q[2] * together // kv_heads
    if rows * together > 8192:
        return f"{case.q[1]} queries of {case.q[2]} heads are too many rows at once: it is made for a few queries"
    if case.table is None:
        return None
    if layout == "columns":
        return f"pages of width {width} are scattered in memory: pad the cache to a multiple of 128"
    if layout == "heads":
        return f"pages of {kv_heads} key/value heads are scattered in memory: it takes 1, 2, 4 or a multiple of 8"
    tile = 8 * 4 // case.dtype.itemsize
    if layout == "merged" and case.k[1] * kv_heads % tile:
        return f"a page of {case.k[1]} places of {kv_heads} heads must fill tiles of {tile} rows"
    if case.table[1] > TPU_TABLE:
        return f"a table of {case.table[1]} pages per row does not fit scalar memory: make pages larger"
    return None


def triton(case: Case) -> str | None:
    """Triton reads any cache by pointers; a row's accumulator must fit the registers."""
    missing = _triton.available()
    if missing is not None:
        return missing
    if case.dtype not in (jnp.bfloat16, jnp.float16, jnp.float32):
        return f"it computes in bfloat16, float16 and float32, not in {case.dtype}"
    width, rows = case.k[3], case.q[1] * case.q[2] // case.k[2]
    fits = triton_sizes(rows, width, case.value_width, case.shared, case.dtype.itemsize, device_kind())
    if case.value_width > 512 or fits is None:
        return f"keys {width} and values {case.value_width} wide are too much for registers or shared memory"
    return None


def mosaic_gpu(case: Case) -> str | None:
    """TMA and the tensor cores take whole rows of 128 bytes; an accumulator must fit the registers."""
    reason = not_hopper()
    if reason is not None:
        return reason
    if case.dtype not in (jnp.bfloat16, jnp.float16):
        return f"it computes in bfloat16 and float16, not in {case.dtype}"
    width, page = case.k[3], 0 if case.table is None else case.k[1]
    if width % 64 or case.value_width % (64 if case.value_width <= 256 else 128):
        return f"keys {width} and values {case.value_width} wide: it takes multiples of 64, of 128 for values above 256"
    if not page and case.slots % 8:
        return f"a cache of {case.slots} places: it takes a multiple of 8"
    if page not in (0, 8, 16, 32) and page % 64:
        return f"pages of {page} places: it takes 8, 16, 32 and multiples of 64"
    if case.value_width > 512 or hopper_sizes(width, case.value_width, case.shared, page) is None:
        return f"keys {width} and values {case.value_width} wide are too much for registers or shared memory"
    return None


def tpu_layout(kv_heads: int, width: int, value_width: int) -> str:
    """How XLA for TPU lays out a cache [.., S, Hk, D]: which axes the kernel finds together (see `pallas_tpu.py`)."""
    if width % 128 or value_width % 128:
        return "columns"
    if kv_heads % 8 == 0 or kv_heads == 1 or (kv_heads in (2, 4) and width == value_width == 128):
        return "merged"
    return "tiled" if kv_heads in (2, 4) else "heads"


def tpu_block(layout: str, heads: int, rows: int, width: int, value_width: int, itemsize: int) -> int:
    """Places of the cache per step: 4 MiB of keys and values, 2 MiB of scores, and 2048 places, or as
    many more as a place is narrower than 128."""
    tile = 8 if layout == "columns" else 128
    place = itemsize * heads * sum(-(-x // tile) * tile for x in (width, value_width))
    size = min((4 << 20) // place, (2 << 20) // (4 * rows * heads), 2048 * max(1, 128 // width))
    return max(128, 1 << (size.bit_length() - 1))


@dataclasses.dataclass(frozen=True)
class TritonSizes:
    """Tiles of the Triton kernel; a width is read as `main` and `rest` columns, values as `values`."""

    rows: int
    block: int
    main: int
    rest: int
    values: int
    warps: int
    stages: int


def triton_sizes(rows: int, width: int, value_width: int, shared: bool, itemsize: int, kind: str) -> TritonSizes | None:
    """Blocks of about 40 KiB, of which two under way keep the memory of a Hopper busy, and up to 64 rows, as far as the
    shared memory of this kind of device goes; None where it does not hold 16."""
    main = max(16, 1 << (width.bit_length() - 1))
    rest = 0 if width <= main else max(16, _triton.power_of_two(width - main))
    values = max(16, _triton.power_of_two(value_width))
    place = itemsize * (main + rest + (0 if shared and value_width == main else values))
    block = min(max(16, 1 << ((40960 // place).bit_length() - 1)), 128)
    memory = _triton.shared_memory(kind)
    stages = 3 if memory > 128 << 10 else 2
    tile = min(max(16, _triton.power_of_two(rows)), 64)
    # A block is being read from shared memory while the next come; wgmma, from 64 rows on, reads one more.
    while tile * (main + rest) * itemsize + (stages - (tile < 64)) * block * place > memory:
        tile //= 2
        if tile < 16:
            return None
    return TritonSizes(tile, block, main, rest, values, 8 if tile * values > 64 * 256 else 4, stages)


@dataclasses.dataclass(frozen=True)
class HopperSizes:
    """Of the Mosaic GPU kernel: warpgroups that compute, places per step, copies they take, and steps under way."""

    groups: int
    block: int
    pieces: int
    stages: int


def hopper_sizes(width: int, value_width: int, shared: bool, page: int) -> HopperSizes | None:
    """Blocks of 64 places, or 128 where keys and values are narrow; None where shared memory does not hold two.

    A latent of 576 columns takes 216 of 227 KiB: 64 queries and two blocks of 64.
    """
    groups = 1 if value_width <= 256 else 2
    row = 2 * (width + (0 if shared else value_width))
    block = 128 if row <= 512 and page % 128 == 0 else 64
    stages = min(4, (_triton.shared_memory("H100") - 2048 - 128 * width) // (block * row))
    return HopperSizes(groups, block, max(1, block // page) if page else 1, stages) if stages >= 2 else None
