"""Lightning attention on TPU (Pallas, Mosaic): the sweeps of `fused`, several heads a step, the state in VMEM.

The grid is (row, heads, chunk), chunks in order on one core. Heads lie side by side in the lanes of [B, T, H * D], as a
projection leaves them: no transposed copy, and two heads of width 64 share one tile. The state is the block of the
final state itself, which stays in VMEM while chunks pass. dk and dv come from one sweep with a second output, `mirror`:
sum_j M_ij (e_i . c_j) b_j + near_i S e_i.
"""

import dataclasses
import functools

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float

from kernels import platform
from kernels.lightning import fused
from kernels.lightning.limits import VMEM_BYTES, tpu_sizes
from kernels.lightning.timeline import Timeline
from kernels.varying import result


@dataclasses.dataclass(frozen=True)
class Sweeps:
    """Chunk length, heads per step, and whether to interpret (True, or `pltpu.InterpretParams`)."""

    chunk: int
    group: int
    interpret: bool | pltpu.InterpretParams = False

    def forward(self, q, k, v, slopes, codes, state):
        """Output and final state, and the initial one for the backward pass."""
        return *self._sweep((q, k, v), slopes, codes, state), state

    def backward(self, q, k, v, do, slopes, codes, state, dstate):
        """dq by a sweep forwards that rebuilds the states; dk, dv and the state's gradient by one in reverse."""
        dq, _ = self._sweep((do, v, k), slopes, codes, jnp.swapaxes(state, 2, 3))
        dv, dk, dinitial = self._sweep((k, q, do, v), slopes, codes, dstate, reverse=True)
        return dq, dk, dv, dinitial

    def _sweep(self, tokens, slopes, codes, state, reverse=False):
        """Output and final state from a, b, c; from a, b, c, e the mirrored output too, after the other."""
        batch, length, heads, width = tokens[0].shape
        value, chunk, steps = tokens[2].shape[3], self.chunk, pl.cdiv(length, self.chunk)
        outs = (tokens[2], tokens[1])[: len(tokens) - 2]

        def place(i):
            return steps - 1 - i if reverse else i

        def block(x):
            return pl.BlockSpec((None, chunk, self.group * x.shape[3]), lambda b, h, i: (b, place(i), h))

        def flat(x):
            return x.reshape(batch, length, -1)

        whole = pl.BlockSpec((None, self.group, width, value), lambda b, h, i: (b, h, 0, 0))
        inputs = [slopes, *map(flat, tokens), state]
        specs = [pl.BlockSpec(memory_space=pltpu.SMEM), *map(block, tokens), whole]
        if codes is not None:
            rows = codes.shape[0] > 1
            inputs.append(codes[:, None])
            specs.append(pl.BlockSpec((None, 1, chunk), lambda b, h, i: (b * rows, 0, place(i))))
        results = [result(x.shape, x.dtype, *inputs) for x in (*map(flat, outs), state)]
        # For each output scores, their product and the state read; the state written once.
        work = len(outs) * chunk * (width + value) + (len(outs) + 1) * width * value
        *found, final = pl.pallas_call(
            functools.partial(_body, self, length, reverse, len(tokens), codes is not None),
            out_shape=results,
            grid=(batch, heads // self.group, steps),
            in_specs=specs,
            out_specs=[*map(block, outs), whole],
            compiler_params=pltpu.CompilerParams(
                dimension_semantics=("parallel", "parallel", "arbitrary"), vmem_limit_bytes=2 * VMEM_BYTES
            ),
            cost_estimate=pl.CostEstimate(
                flops=2 * batch * heads * steps * chunk * work,
                transcendentals=batch * heads * steps * chunk * chunk,
                bytes_accessed=sum(x.size * x.dtype.itemsize for x in (*inputs, *results)),
            ),
            interpret=self.interpret,
            name="lightning_reverse" if reverse else "lightning",
        )(*inputs)
        return *(x.reshape(y.shape) for x, y in zip(found, outs, strict=True)), final


def _body(sweeps, length, reverse, count, timed, slopes, *refs):
    """One chunk of the heads of a step; refs: `count` token blocks, state, codes where `timed`, outputs, state."""
    tokens, state_in, codes = refs[:count], refs[count], refs[count + 1] if timed else None
    *outs, state = refs[count + 1 + timed :]
    group, step, steps = pl.program_id(1), pl.program_id(2), pl.num_programs(2)

    @pl.when(step == 0)
    def _():
        state[...] = state_in[...]

    start = (steps - 1 - step if reverse else step) * sweeps.chunk
    valid, decays = _moments(codes, sweeps.chunk, length - start, reverse)
    full = not timed and length % sweeps.chunk == 0

    def part(ref, g):
        width = ref.shape[1] // sweeps.group
        return slice(None), slice(g * width, (g + 1) * width)

    def clean(x):
        return x if full else jnp.where(valid, x, jnp.zeros_like(x))

    for g in range(sweeps.group):
        slope = slopes[group * sweeps.group + g]
        a, b, c, *e = (ref[part(ref, g)] for ref in tokens)
        b, c, s = clean(b), clean(c), state[g]
        # Masked before exp2, which may overflow where nothing is to be seen.
        weights, near, far, through = (jnp.exp2(jnp.where(there, slope * ticks, -jnp.inf)) for there, ticks in decays)
        narrow = s.astype(c.dtype)
        out = _dot(_dot(a, b, 1, 1, weights), c, 1, 0) + near * _dot(a, narrow, 1, 0)
        outs[0][part(outs[0], g)] = clean(out.astype(c.dtype))
        for x in e:
            out = _dot(_dot(x, c, 1, 1, weights), b, 1, 0) + near * _dot(x, narrow, 1, 1)
            outs[1][part(outs[1], g)] = clean(out.astype(b.dtype))
        state[g] = through * s + _dot(b, (far * c).astype(c.dtype), 0, 0)


def _dot(a, b, contract_a, contract_b, weights=None):
    """A product accumulated in float32; with `weights`, weighed and narrowed for the product to come."""
    precision = lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    found = lax.dot_general(
        a, b, (((contract_a,), (contract_b,)), ((), ())), precision=precision, preferred_element_type=jnp.float32
    )
    return found if weights is None else (found * weights).astype(b.dtype)


def _moments(codes, chunk, left, reverse):
    """Who is valid; and of M, near, far and through where they are not 0 and over how many ticks they decay."""
    row, column = (lax.broadcasted_iota(jnp.int32, (chunk, chunk), axis) for axis in (1, 0))
    if codes is None:
        across, down = row[:1], column[:, :1]
        (_, clock_across, document_across), (valid, clock, document) = (
            (x < left, jnp.minimum(x + 1, left), jnp.zeros_like(x)) for x in (across, down)
        )
    else:
        across = codes[...]
        # The codes as a column: the row's diagonal, summed over lanes.
        diagonal = jnp.where(row == column, across.astype(jnp.float32), 0.0)
        down = jnp.sum(diagonal, axis=1, keepdims=True).astype(jnp.int32)
        _, clock_across, document_across = fused.decoded(across)
        valid, clock, document = fused.decoded(down)
        valid = valid == 1
    end, last = clock_across[:, -1:], document_across[:, -1:]
    distance, order = clock - clock_across, column >= row
    if reverse:
        distance, order = -distance, column <= row
    live = order & (document == document_across)
    since, until = (document == 0, clock), (document == last, end - clock)
    decays = (live, distance), *((until, since) if reverse else (since, until)), (last == 0, end)
    return valid, [(there, ticks.astype(jnp.float32)) for there, ticks in decays]


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
    if sweeps is None:
        sweeps = Sweeps(*tpu_sizes(q.shape, v.shape[3], q.dtype), interpret=platform.interpreting())
    return fused.attend(sweeps, q, k, v, decay, moments, initial_state)
