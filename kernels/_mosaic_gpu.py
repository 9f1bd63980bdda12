"""What kernels for Hopper share: tiles in shared memory, rings of them filled by TMA, matrix products, the launch.

A block is one or two warpgroups that compute, and one that copies for them. What the interpreter cannot do (products of
operands in registers) is in `Products` alone, so that the schedule and everything else runs there as on a GPU.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import io_callback
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels import _compat

SHARED_BYTES = 227 * 1024  # What one block may use on Hopper.
ROW, COL, TILE = plgpu.Layout.WGMMA.reduce(1), plgpu.Layout.WGMMA.reduce(0), plgpu.Layout.WGMMA


def unusable() -> str | None:
    """Why kernels cannot be trusted with this machine's CUDA, if so."""
    version = _compat.cuda_version()
    if version is not None and 12080 <= version < 12091:
        return f"CUDA {version // 1000}.{version % 1000 // 10} miscompiles masked loops (ptxas); 12.9.1 is mended"
    return None


def tile(*shape: int, dtype: Any) -> Any:
    """Shared memory for matrices that TMA fills and WGMMA reads; the last axis is a multiple of 64 two-byte numbers."""
    return plgpu.SMEM(shape, dtype, transforms=(plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128)))


def stages(fixed: int, slot: int, most: int, least: int = 1) -> int:
    """How many stages of `slot` bytes, at most `most`, fit beside `fixed` bytes of tiles and a few barriers.

    Raises: `NotImplementedError` where not even `least` do.
    """
    count = min(most, (SHARED_BYTES - 512 - fixed) // slot)
    if count < least:
        raise NotImplementedError(f"it takes {fixed + slot} bytes of shared memory; a Hopper GPU has {SHARED_BYTES}")
    return count


def tokens_first(*arrays: jax.Array) -> list[jax.Array]:
    """[B, H, T, D] as [B, T, H, D], and back: TMA reads either, and this undoes what a driver does to get the other."""
    return [x.swapaxes(1, 2) for x in arrays]


def counts_first(visits: Any) -> tuple[Any, Any, Any]:
    """A list of live blocks as kernels take it: how many are full, how many live, and which."""
    return visits.full, visits.live, visits.order


def more_registers(groups: int) -> None:
    """What each of `groups` computing warpgroups asks for at its start; 128 (2 * 240 + 32) are the 65,536 there are."""
    if groups == 2:  # With one, all have plenty from the start.
        plgpu.set_max_registers(240, action="increase")


def fewer_registers(groups: int) -> None:
    """What the copying warpgroup leaves to the others."""
    if groups == 2:
        plgpu.set_max_registers(32, action="decrease")


def of(ref: Any, row: Any, head: Any) -> Any:
    """The part of an array [B|1, H|1, ...] that belongs to a batch row and a head."""
    return ref.at[row if ref.shape[0] > 1 else 0, head if ref.shape[1] > 1 else 0]


@dataclasses.dataclass(frozen=True)
class Visits:
    """The steps of one block through its list of live blocks, each walked in parts of `part` tokens."""

    order: Any  # Numbers of the live blocks, those that need no mask first.
    first: Any  # The first step, where those that need a mask begin, and the end.
    masked: Any
    end: Any
    block: int
    part: int

    @classmethod
    def of(cls, lists: Any, row: Any, head: Any, number: Any, block: int, part: int, first: Any = 0) -> "Visits":
        """Those of block `number`, from `counts_first(lists)` in global memory."""
        full, live, order = (of(ref, row, head).at[number] for ref in lists)
        parts = block // part
        return cls(order, first, first + full[()] * parts, first + live[()] * parts, block, part)

    def tokens(self, step: Any) -> Any:
        """The number of the first token of a step; of any token where there is no such step."""
        parts = self.block // self.part
        step = jnp.clip(step - self.first, 0, self.order.shape[0] * parts - 1)
        return self.order[lax.div(step, parts)] * self.block + lax.rem(step, parts) * self.part


def each(first: Any, last: Any, body: Callable[[Any, Any, Any], Any], carry: Any, place: Any = None) -> Any:
    """The carry after `body(step, place(step), carry)` of all steps; places are looked up one step ahead."""
    if place is None:
        return lax.fori_loop(first, last, lambda step, carry: body(step, None, carry), carry)

    def one(step: Any, state: Any) -> Any:
        here, carry = state
        ahead = place(step + 1)
        return ahead, body(step, here, carry)

    return lax.fori_loop(first, last, one, (place(first), carry))[1]


@dataclasses.dataclass(frozen=True)
class Ring:
    """Slots that one warpgroup fills and others read, step by step; a slot may be of several arrays."""

    slots: tuple[Any, ...]
    ready: Any
    free: Any

    @staticmethod
    def scratch(stages: int, readers: int, *slots: Any, pieces: int = 1) -> tuple[Any, Any, Any]:
        """What to allocate for it; `slots` are its arrays [stages, ...], which may come from elsewhere, and which
        `fill` gets in so many pieces."""
        return (
            slots,
            plgpu.Barrier(num_barriers=stages, num_arrivals=max(len(slots), 1) * pieces),
            plgpu.Barrier(num_barriers=stages, num_arrivals=readers),
        )

    @property
    def stages(self) -> int:
        return self.slots[0].shape[0]

    def _slot(self, step: Any) -> Any:
        return lax.rem(step, jnp.int32(self.stages))

    def fill(self, step: Any, *sources: Any) -> None:
        """Copies `sources` to the slot of `step` once what it held has been read; a list is the pieces of an array."""
        slot = self._slot(step)

        @pl.when(step >= self.stages)
        def _() -> None:
            plgpu.barrier_wait(self.free.at[slot])

        for source, slots in zip(sources, self.slots, strict=True):
            pieces = source if isinstance(source, list) else [source]
            size = slots.shape[1] // len(pieces)
            for n, piece in enumerate(pieces):
                place = slots.at[slot, pl.ds(n * size, size)] if len(pieces) > 1 else slots.at[slot]
                plgpu.copy_gmem_to_smem(piece, place, self.ready.at[slot])

    def drain(self, steps: Any) -> None:
        """Waits until all of the first `steps` have been read."""

        @pl.loop(jnp.maximum(steps - self.stages, 0), steps)
        def _(step: Any) -> None:
            plgpu.barrier_wait(self.free.at[self._slot(step)])

    def wait(self, step: Any) -> None:
        plgpu.barrier_wait(self.ready.at[self._slot(step)])

    def at(self, step: Any) -> list[Any]:
        """The arrays of a step, once `wait` has returned."""
        return [slots.at[self._slot(step)] for slots in self.slots]

    def release(self, step: Any) -> None:
        plgpu.barrier_arrive(self.free.at[self._slot(step)])


def feed(visits: Visits, *streams: tuple[Ring, Callable[[Any], Any]]) -> None:
    """Fills each ring, step by step, with what its function gives of the step's tokens; returns when all was read."""

    def fill(step: Any, first: Any, carry: None) -> None:
        for ring, source in streams:
            ring.fill(step, source(pl.ds(first, visits.part)))

    each(0, visits.end, fill, None, visits.tokens)
    for ring, _ in streams:
        ring.drain(visits.end)


@dataclasses.dataclass(frozen=True)
class Products:
    """Matrix products, as a GPU does them or as the interpreter can.

    The interpreter has no operands in registers, and does not see what a product reads: there such operands go through
    a tile, and the others are read once before, so that a missing barrier shows.
    """

    interpret: bool

    def start(self, ref: Any, a: Any, b: Any) -> None:
        """Begins ref += a b of two tiles; reading `ref` waits for it."""
        if self.interpret:
            for operand in (a, b):
                operand[...]  # noqa: B018
            plgpu.commit_smem()
        plgpu.wgmma(ref, a, b)

    def add(
        self,
        accs: Sequence[jax.Array],
        operands: Sequence[tuple[Callable[[], jax.Array], Any]],
        spare: Any,
        meanwhile: Callable[[], None] = lambda: None,
    ) -> list[jax.Array]:
        """acc + a() b for each acc and its (a, b), a in registers and b a tile, while `meanwhile` runs.

        An a may be computed while the products before it run. `spare` is a tile of a's shape where interpreted.
        """

        def compute(refs: Any) -> None:
            for ref, (a, b) in zip(refs, operands, strict=True):
                plgpu.wgmma(ref, a(), b)
            meanwhile()

        def through_spare(a: jax.Array, b: Any) -> jax.Array:
            def compute(ref: Any) -> jax.Array:
                self.start(ref, spare, b)
                return ref[...]

            spare[...] = a
            plgpu.commit_smem()
            return pl.run_scoped(compute, plgpu.ACC((a.shape[0], b.shape[1]), jnp.float32))

        if not self.interpret:
            return pl.run_state(compute)([plgpu.ACC.init(acc) for acc in accs])
        accs = [acc + through_spare(a(), b) for acc, (a, b) in zip(accs, operands, strict=True)]
        meanwhile()
        return accs


def launch(
    body: Callable[..., None],
    inputs: Sequence[Any],
    *,
    out_type: Any,
    scratch: Any,
    grid: dict[str, int],
    groups: int,
    interpret: bool,
    approximate: bool,
) -> Any:
    """Runs `body(*inputs, *outputs, *scratch)` over a grid, the last axis fastest, with `groups` + 1 warpgroups."""
    if not interpret and unusable() is not None:
        raise NotImplementedError(unusable())
    if 0 in grid.values():
        return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), tuple(out_type))
    run = plgpu.kernel(
        body,
        out_type=out_type,
        scratch_types=scratch,
        grid=tuple(grid.values()),
        grid_names=tuple(grid),
        num_threads=groups + 1,
        thread_name="group",
        interpret=_compat.mosaic_gpu_interpreter() if interpret else None,
        compiler_params=plgpu.CompilerParams(
            approx_math=approximate,
            reduction_scratch_bytes=0,  # Only rows are reduced, and a row is in one warp.
            lowering_semantics=plgpu.LoweringSemantics.Lane,
        ),
    )
    outputs = run(*inputs)
    if interpret:
        io_callback(_compat.check_races, None, ordered=True)
    return outputs
