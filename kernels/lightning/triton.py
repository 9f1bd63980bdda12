"""Lightning attention on GPU (Triton): the sweeps of `fused`, one program per row, head and block of state columns.

A program walks the chunks of its head with D x 32 or D x 64 of the state in registers, in float32. Cutting each sweep
by its OWN output's columns (those of c) makes programs independent: dq and dk too leave as finished columns, with no
partial sums over value blocks, which would cost 8 bytes per element and block. The price is that scores are computed
once per block; the pass is bound by memory, and neighbouring programs find a and b in L2. dq, dk and dv share one
launch, three times as many programs as one of them has.

Where rows and heads are too few for all processors, the sequence is cut into parts: a first pass over b and c alone
gives what each part adds to the state, a scan over parts the state before each; then all parts are swept at once.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
import triton
import triton.language as tl
from jax import lax
from jaxtyping import Array, Float

from kernels import _triton
from kernels.lightning import fused
from kernels.lightning.limits import gpu_sizes
from kernels.lightning.timeline import Timeline

CLOCK_MASK = tl.constexpr(fused.CLOCK_MASK)
DOCUMENT_SHIFT = tl.constexpr(fused.DOCUMENT_SHIFT)


@triton.jit
def _decay(exponent, mask):
    """exp2 of the exponent where the mask holds, else 0: masked before exp2, which may overflow there."""
    return tl.exp2(tl.where(mask, exponent, -float("inf")))


@triton.jit
def _place(BLOCKS: tl.constexpr, HEADS: tl.constexpr, PARTS: tl.constexpr):
    """Row, head, part and block of this program, blocks fastest: those of one part meet in L2."""
    program = tl.cast(tl.program_id(0), tl.int64)
    block, part = tl.cast(program % BLOCKS, tl.int32), tl.cast(program // BLOCKS % PARTS, tl.int32)
    head = program // (BLOCKS * PARTS)
    return head // HEADS, head % HEADS, part, block


@triton.jit
def _sweep(
    a, b, c, out, codes, state, final, last, slope, part, column, width, value, row_step, column_step, reverse,
    LOCAL: tl.constexpr, LENGTH: tl.constexpr, HEADS: tl.constexpr, PARTS: tl.constexpr, CODES: tl.constexpr,
    CHUNK: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """BLOCK columns of one part of one head: a, b [T, width], c, out [T, value], HEADS heads between tokens.

    The state [width, value] is read with steps between its rows and columns, and left in `final` in order, if `last`.
    LOCAL: from 0 and without output.
    """
    i = tl.arange(0, CHUNK)
    x, y = tl.arange(0, WIDTH), column + tl.arange(0, BLOCK)
    wide, narrow = i[:, None] * (HEADS * width) + x[None, :], i[:, None] * (HEADS * value) + y[None, :]
    x_mask, y_mask = x[None, :] < width, y[None, :] < value
    if LOCAL:
        s = tl.zeros([WIDTH, BLOCK], tl.float32)
    else:
        place = x[:, None] * row_step + y[None, :] * column_step
        s = tl.load(state + place, mask=(x[:, None] < width) & y_mask, other=0.0)
    sign = tl.where(reverse, -1, 1)
    order = sign * (i[:, None] - i[None, :]) >= 0
    chunks: tl.constexpr = (LENGTH + CHUNK - 1) // CHUNK
    share: tl.constexpr = (chunks + PARTS - 1) // PARTS
    begin, stop = part * share, tl.minimum((part + 1) * share, chunks)
    for step in range(begin, stop):
        start = tl.where(reverse, begin + stop - 1 - step, step) * CHUNK
        left = LENGTH - start
        if CODES >= 0:
            code, last_code = tl.load(codes + start + i), tl.load(codes + start + CHUNK - 1)
            valid, clock, document = (code & 1) == 1, (code >> 1) & CLOCK_MASK, code >> DOCUMENT_SHIFT
            end, last_document = (last_code >> 1) & CLOCK_MASK, last_code >> DOCUMENT_SHIFT
            live = order & (document[:, None] == document[None, :])
            through = _decay(slope * end, last_document == 0)
            since = _decay(slope * clock, document == 0)
            until = _decay(slope * (end - clock), document == last_document)
        else:
            # Without `valid` in `live`, weights are the same for all chunks; rows beyond the end are zeros.
            valid, clock, end, live = i < left, i + 1, tl.minimum(left, CHUNK), order
            through = tl.exp2(slope * end)
            since = tl.exp2(slope * clock)
            until = _decay(slope * (end - clock), valid)
        near, far = tl.where(reverse, until, since), tl.where(reverse, since, until)

        skip = tl.cast(start, tl.int64) * HEADS  # [T, H, D] may have more than 2^31 elements.
        b_mask, c_mask = valid[:, None] & x_mask, valid[:, None] & y_mask
        b_tile = tl.load(b + skip * width + wide, mask=b_mask, other=0.0)
        c_tile = tl.load(c + skip * value + narrow, mask=c_mask, other=0.0)
        if not LOCAL:
            a_tile = tl.load(a + skip * width + wide, mask=b_mask, other=0.0)
            o = near[:, None] * tl.dot(a_tile, s.to(a_tile.dtype), input_precision=PRECISION)
            weights = _decay(slope * (sign * (clock[:, None] - clock[None, :])), live)
            scores = tl.dot(a_tile, tl.trans(b_tile), input_precision=PRECISION) * weights
            o += tl.dot(scores.to(c_tile.dtype), c_tile, input_precision=PRECISION)
            o = tl.where(valid[:, None], o, 0.0)
            tl.store(out + skip * value + narrow, o.to(c_tile.dtype), mask=(i[:, None] < left) & y_mask)
        faded = (far[:, None] * c_tile).to(c_tile.dtype)
        s = through * s + tl.dot(tl.trans(b_tile), faded, input_precision=PRECISION)
    if last:
        tl.store(final + x[:, None] * value + y[None, :], s, mask=(x[:, None] < width) & y_mask)


@triton.jit
def _local(
    b, c, slopes, codes, added,
    A: tl.constexpr, C: tl.constexpr, REVERSE: tl.constexpr,
    LENGTH: tl.constexpr, HEADS: tl.constexpr, PARTS: tl.constexpr, CODES: tl.constexpr,
    CHUNK: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """What each part adds to the state, [B, P, H, A, C]."""
    row, h, part, block = _place((C + BLOCK - 1) // BLOCK, HEADS, PARTS)
    first = row * LENGTH * HEADS + h
    b, c, codes = b + first * A, c + first * C, codes + row * CODES
    added += ((row * PARTS + part) * HEADS + h) * (A * C)
    _sweep(
        b, b, c, c, codes, added, added, True, tl.load(slopes + h), part, block * BLOCK, A, C, C, 1, REVERSE,
        True, LENGTH, HEADS, PARTS, CODES, CHUNK, WIDTH, BLOCK, PRECISION,
    )  # fmt: skip


@triton.jit
def _forward(
    q, k, v, slopes, codes, starts, out, final,
    D: tl.constexpr, E: tl.constexpr,
    LENGTH: tl.constexpr, HEADS: tl.constexpr, PARTS: tl.constexpr, CODES: tl.constexpr,
    CHUNK: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Output, and the final state from the last part."""
    row, h, part, block = _place((E + BLOCK - 1) // BLOCK, HEADS, PARTS)
    first = row * LENGTH * HEADS + h
    q, k, v, out, codes = q + first * D, k + first * D, v + first * E, out + first * E, codes + row * CODES
    starts += ((row * PARTS + part) * HEADS + h) * (D * E)
    final += (row * HEADS + h) * (D * E)
    _sweep(
        q, k, v, out, codes, starts, final, part == PARTS - 1, tl.load(slopes + h), part, block * BLOCK,
        D, E, E, 1, False, False, LENGTH, HEADS, PARTS, CODES, CHUNK, WIDTH, BLOCK, PRECISION,
    )  # fmt: skip


@triton.jit
def _backward(
    q, k, v, do, slopes, codes, starts, dends, dq, dk, dv, dinitial,
    D: tl.constexpr, E: tl.constexpr, ALIGNED: tl.constexpr,
    LENGTH: tl.constexpr, HEADS: tl.constexpr, PARTS: tl.constexpr, CODES: tl.constexpr,
    CHUNK: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """BLOCK columns of dq by a sweep forwards, or of dk or dv in reverse; dv's first part has the state's gradient.

    Which of the three is chosen by values, so that the sweep is compiled once and takes registers and memory once.
    """
    key_blocks: tl.constexpr = (D + BLOCK - 1) // BLOCK
    row, h, part, block = _place(2 * key_blocks + (E + BLOCK - 1) // BLOCK, HEADS, PARTS)
    reverse, is_dv = block >= key_blocks, block >= 2 * key_blocks
    if is_dv:
        a, b, c, out, state = k, q, do, dv, dends
    elif reverse:
        a, b, c, out, state = v, do, q, dk, dends
    else:
        a, b, c, out, state = do, v, k, dq, starts
    block -= tl.where(is_dv, 2 * key_blocks, tl.where(reverse, key_blocks, 0))
    width, value = tl.multiple_of(tl.where(is_dv, D, E), ALIGNED), tl.multiple_of(tl.where(is_dv, E, D), ALIGNED)
    first = row * LENGTH * HEADS + h
    a, b, c, out, codes = (
        a + first * width,
        b + first * width,
        c + first * value,
        out + first * value,
        codes + row * CODES,
    )
    state += ((row * PARTS + part) * HEADS + h) * (D * E)
    dinitial += (row * HEADS + h) * (D * E)
    _sweep(
        a, b, c, out, codes, state, dinitial, is_dv & (part == 0), tl.load(slopes + h), part, block * BLOCK,
        width, value, tl.where(is_dv, E, 1), tl.where(is_dv, 1, E), reverse,
        False, LENGTH, HEADS, PARTS, CODES, CHUNK, WIDTH, BLOCK, PRECISION,
    )  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Sweeps:
    """Chunk length, columns and parts of the sequence per program, and how programs are launched."""

    chunk: int
    block: int
    parts: int = 1
    warps: int = 4
    stages: int = 2

    def forward(self, q, k, v, slopes, codes, state):
        """Output, final state, and for the backward pass the state before each part."""
        starts = self._starts(k, v, slopes, codes, state, reverse=False)
        blocks = triton.cdiv(v.shape[3], self.block)
        out, final = self._launch(
            _forward, blocks, (q, k, v), slopes, codes, (starts,), (v, state), D=q.shape[3], E=v.shape[3]
        )
        return out, final, starts

    def backward(self, q, k, v, do, slopes, codes, starts, dstate):
        """dq, dk, dv and the gradient of the initial state, in one launch."""
        dends = self._starts(q, do, slopes, codes, dstate, reverse=True)
        width, value = q.shape[3], v.shape[3]
        blocks = 2 * triton.cdiv(width, self.block) + triton.cdiv(value, self.block)
        widths = dict(D=width, E=value, ALIGNED=math.gcd(width, value, 16))
        like = (q, k, v, dstate)
        return self._launch(_backward, blocks, (q, k, v, do), slopes, codes, (starts, dends), like, **widths)

    def _starts(self, b, c, slopes, codes, state, reverse):
        """The state [B, P, H, A, C] that each part begins with, in the order of the sweep."""
        if self.parts == 1:
            return state[:, None]
        shape = jax.ShapeDtypeStruct((state.shape[0], self.parts, *state.shape[1:]), state.dtype)
        widths = dict(A=b.shape[3], C=c.shape[3], REVERSE=reverse)
        blocks = triton.cdiv(c.shape[3], self.block)
        (added,) = self._launch(_local, blocks, (b, c), slopes, codes, (), (shape,), **widths)
        kept = jnp.broadcast_to(self._kept(b.shape[1], slopes, codes), shape.shape[:3])

        def step(state, part):
            added, kept = part
            return kept[..., None, None] * state + added, state

        parts = jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0), (added, kept))
        return jnp.moveaxis(lax.scan(step, state, parts, reverse=reverse)[1], 0, 1)

    def _kept(self, length, slopes, codes):
        """What each part leaves of the state before it, [B, P, H]."""
        chunks = triton.cdiv(length, self.chunk)
        share = triton.cdiv(chunks, self.parts)
        if codes is None:
            ticks = jnp.clip(length - jnp.arange(self.parts) * share * self.chunk, 0, share * self.chunk)[None]
            return jnp.exp2(ticks[..., None] * slopes)
        ends = codes[:, self.chunk - 1 :: self.chunk]
        ends = jnp.pad(ends, ((0, 0), (0, self.parts * share - chunks))).reshape(-1, self.parts, share)
        _, ticks, documents = (x.sum(2)[..., None] for x in fused.decoded(ends))
        return jnp.where(documents == 0, jnp.exp2(ticks * slopes), 0)

    def _launch(self, kernel, blocks, tokens, slopes, codes, states, like, **widths):
        batch, length, heads, width = tokens[0].shape
        widest = max(width, tokens[2].shape[3]) if kernel is _backward else width
        # How far the codes of rows lie apart: 0 where rows agree, less where there are none.
        stride = -1 if codes is None else codes.shape[1] if codes.shape[0] > 1 else 0
        return _triton.call(
            kernel,
            *tokens,
            slopes,
            slopes if codes is None else codes,
            *states,
            out_shape=tuple(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in like),
            grid=batch * heads * self.parts * blocks,
            num_warps=self.warps,
            num_stages=self.stages,
            LENGTH=length,
            HEADS=heads,
            PARTS=self.parts,
            CODES=stride,
            CHUNK=self.chunk,
            WIDTH=max(16, triton.next_power_of_2(widest)),
            BLOCK=self.block,
            PRECISION="tf32x3" if tokens[0].dtype == jnp.float32 else "tf32",
            **widths,
        )


def lightning_attention(
    q: Float[Array, "B T H D"],
    k: Float[Array, "B T H D"],
    v: Float[Array, "B T H E"],
    decay: Float[Array, "H"],
    moments: Timeline | None,
    initial_state: Float[Array, "B H D E"],
    chunk: int,
    sweeps: Sweeps | None = None,
) -> tuple[Float[Array, "B T H E"], Float[Array, "B H D E"]]:
    """Output and final state; `chunk` is a hint for the CPU, `sweeps` overrides the sizes chosen here."""
    sweeps = sweeps or Sweeps(*gpu_sizes(q.shape, v.shape[3], q.dtype))
    return fused.attend(sweeps, q, k, v, decay, moments, initial_state)
