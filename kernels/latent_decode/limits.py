"""What each implementation of the latent decode op can do, as declared facts, and the sizes of its blocks."""

import dataclasses
from typing import Any

import jax.numpy as jnp

from kernels import _triton
from kernels.platform import device_kind, not_hopper

_WITHOUT_FP8 = ("A100", "A800", "A10", "A30", "A40", "V100", "T4")
#: Places of the cache per step of the XLA form.
XLA_BLOCK = 512
#: Entries of a block table that fit a TPU's scalar memory beside all else.
TPU_TABLE = 1 << 17
#: Places per step, and rows per warpgroup, of the Mosaic GPU kernel.
HOPPER_BLOCK = 64


@dataclasses.dataclass(frozen=True)
class Case:
    """The facts of one call that decide which implementations can do it."""

    q: tuple[int, ...]  # [B, T, H, C].
    rope_width: int
    values: tuple[int, ...]  # Of a contiguous cache [B, S, g, C], or of pages [P, page, g, C].
    blocks: int  # Of channels with a scale of their own.
    dtype: Any
    kept: Any  # The type of the cache.
    table: tuple[int, ...] | None  # [B, n] of a cache in pages.
    splits: int | None

    @property
    def slots(self) -> int:
        """Places of a row's cache."""
        return self.values[1] * (1 if self.table is None else self.table[1])

    @property
    def rows(self) -> int:
        """Queries times heads that read one slice of one row of the batch."""
        return self.q[1] * self.q[2] // max(self.values[2], 1)


def reference(case: Case) -> str | None:
    """The reference forms the whole map at once."""
    return "it reads a cache in one part: leave splits out" if (case.splits or 1) > 1 else None


def pallas_tpu(case: Case) -> str | None:
    """Mosaic takes caches as XLA lays them out, and holds all scores of a block."""
    if case.dtype not in (jnp.bfloat16, jnp.float32):
        return f"it computes in bfloat16 and float32, not in {case.dtype}"
    width, page = case.q[3], 0 if case.table is None else case.values[1]
    if width % 128 or width // case.blocks % 128:
        return f"latents of {width} channels in {case.blocks} blocks: it takes blocks of multiples of 128"
    if case.rows > 1024:
        return f"{case.q[1]} queries of {case.q[2]} heads are too many rows at once: it is made for a few queries"
    if page % 128:
        return f"scales in pages of {page} places lie scattered in memory: it takes multiples of 128"
    if case.rows * page > 1 << 20:
        return f"pages of {page} places are too many at once for {case.rows} rows: make pages smaller"
    if case.table is not None and case.table[1] > TPU_TABLE:
        return f"a table of {case.table[1]} pages per row does not fit scalar memory: make pages larger"
    return None


def tpu_block(rows: int, width: int, page: int, slots: int) -> int:
    """Places of the cache per step: 1 MiB of latents, 1 MiB of scores, at most 2048 places."""
    size = min((1 << 20) // width, (1 << 20) // (4 * rows), 2048)
    size = max(128, 1 << (size.bit_length() - 1))
    return max(1, size // page) * page if page else min(size, slots)


def triton(case: Case) -> str | None:
    """Triton reads any cache by pointers; a row's accumulator must fit the registers."""
    missing = _triton.available()
    if missing is not None:
        return missing
    if case.dtype not in (jnp.bfloat16, jnp.float16, jnp.float32):
        return f"it computes in bfloat16, float16 and float32, not in {case.dtype}"
    kind = device_kind()
    if case.kept == jnp.float8_e4m3fn and any(name in kind for name in _WITHOUT_FP8):
        return f"{kind} does not know float8_e4m3fn: keep the cache in int8"
    width = case.q[3]
    if case.blocks > 1 and width // case.blocks & (width // case.blocks - 1):
        return f"latents of {width} channels in {case.blocks} blocks: it takes blocks of a power of two, or one block"
    if width > 512 or triton_sizes(case.rows, width, case.rope_width, case.dtype.itemsize, kind) is None:
        return f"latents of {width} and keys of {case.rope_width} are too much for registers or shared memory"
    return None


@dataclasses.dataclass(frozen=True)
class TritonSizes:
    """Tiles of the Triton kernel; the latent's width is padded to `main`, the rotary key's to `rest`."""

    rows: int
    block: int
    main: int
    rest: int
    warps: int
    stages: int


def triton_sizes(rows: int, width: int, rope_width: int, itemsize: int, kind: str) -> TritonSizes | None:
    """Up to 64 rows and 64 places, or 32 beside an accumulator that fills the registers, as far as the shared memory of
    this kind of device goes; None where it does not hold 16 of each."""
    main, rest = max(16, _triton.power_of_two(width)), max(16, _triton.power_of_two(rope_width))
    memory = _triton.shared_memory(kind)
    stages = 3 if memory > 128 << 10 else 2
    tile = min(max(16, _triton.power_of_two(rows)), 64)
    block = 64 if tile * main < 64 * 256 else 32

    def taken() -> int:
        under_way = block * (main + itemsize * rest + 32)
        return itemsize * (tile * (main + rest) + block * main) + stages * under_way

    while taken() > memory:
        if tile == block == 16:
            return None
        tile, block = (tile // 2, block) if tile > block else (tile, block // 2)
    return TritonSizes(tile, block, main, rest, 8 if main > 256 else 4, stages)


def mosaic_gpu(case: Case) -> str | None:
    """TMA and the tensor cores take whole blocks of 64 places and 64 columns; an accumulator must fit the registers."""
    reason = not_hopper()
    if reason is not None:
        return reason
    if case.dtype not in (jnp.bfloat16, jnp.float16):
        return f"it computes in bfloat16 and float16, not in {case.dtype}"
    width = case.q[3]
    if width % 64 or width // case.blocks % 64 or case.rope_width % 64 or (width > 256 and width % 128):
        return (
            f"latents of {width} in {case.blocks} blocks and keys of {case.rope_width}: it takes multiples of 64, "
            "and of 128 above 256"
        )
    page = case.values[1] if case.table is not None else HOPPER_BLOCK
    if page % HOPPER_BLOCK or case.slots < HOPPER_BLOCK or case.slots % 8:
        return f"{case.slots} places in pages of {page}: it takes pages of multiples of 64, or 64, 72, 80 .. places"
    if width > 512 or hopper_sizes(case.rows, width, case.rope_width) is None:
        return f"latents of {width} and keys of {case.rope_width} are too much for registers or shared memory"
    return None


@dataclasses.dataclass(frozen=True)
class HopperSizes:
    """Of the Mosaic GPU kernel: computing warpgroups that share the rows or the value columns of a block, tiles of
    what is multiplied out, and steps that the eight-bit cache is ahead."""

    row_groups: int
    column_groups: int
    tiles: int
    stages: int

    @property
    def groups(self) -> int:
        """Warpgroups that compute."""
        return self.row_groups * self.column_groups


def hopper_sizes(rows: int, width: int, rope_width: int) -> HopperSizes | None:
    """Two tiles where shared memory holds them beside two stages, else one; None where it does not hold that."""
    column_groups = 1 if width <= 256 else 2
    row_groups = 2 if rows > HOPPER_BLOCK and column_groups == 1 else 1
    tile = 2 * HOPPER_BLOCK * (width + rope_width)
    for tiles in (2, 1):
        left = _triton.shared_memory("H100") - 2048 - tile * (row_groups + tiles)
        stages = min(4, left // (HOPPER_BLOCK * width))
        if stages >= 2:
            return HopperSizes(row_groups, column_groups, tiles, stages)
    return None
