"""From the op to a kernel and back: what every attention kernel needs done around it, done once.

A kernel computes whole blocks of [batch, heads, tokens, width] arrays (`Kernel`). Here are the layouts, the padding to
blocks and widths, the lists of live blocks, what keeps inf and NaN from those who may not see them, numbers in the
denominator, and the custom gradient.
"""

import dataclasses
import functools
import math
import operator
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from kernels import tuning
from kernels.attention import program, worklist
from kernels.attention.masks import FULL, And, Mask, everything
from kernels.attention.masks.lists import Blocks
from kernels.attention.program import Program, Streams
from kernels.attention.scores import check_closure
from kernels.attention.worklist import Lists
from kernels.platform import interpreting
from kernels.tokens import Tokens
from kernels.varying import alike


class Sizes(NamedTuple):
    """Query and key tokens of a block, forwards and backwards."""

    forward: tuple[int, int]
    backward: tuple[int, int]


@dataclasses.dataclass(frozen=True, eq=False)
class Call:
    """The static part of one pass of a kernel."""

    program: Program
    block_q: int
    block_k: int
    interpret: bool
    known: Lists | None  # The lists, where they are known while tracing.


class Kernel(Protocol):
    """A module with the two passes. Shapes are whole blocks; see `_forward` and `_backward` for what is promised."""

    def chosen(self, q: tuple[int, ...], k: tuple[int, ...], v: tuple[int, ...], dtype: Any) -> Sizes: ...
    def padded(self, width: int) -> int: ...
    def forward(
        self, call: Call, q: Array, k: Array, v: Array, streams: Streams, lists: Lists
    ) -> tuple[Array, Array]: ...
    def backward(
        self,
        call: Call,
        q: Array,
        k: Array,
        v: Array,
        d_out: Array,
        lse: Array,
        delta: Array,
        streams: Streams,
        lists: Lists,
    ) -> tuple[Array, Array, Array, Streams]: ...


@dataclasses.dataclass(frozen=True, eq=False)
class _Plan:
    """The static part of one call."""

    kernel: Kernel
    program: Program
    sizes: Sizes
    length: int
    keys: int
    interpret: bool
    clean: bool  # Some pair is masked, so inf and NaN must be kept from where they may not go.
    known: tuple[Lists | None, Lists | None]

    def call(self, backward: bool, streams: Streams) -> tuple[Call, Streams]:
        """One pass, and its streams padded to whole blocks."""
        block_q, block_k = self.sizes[backward]
        padded = _up(self.keys, block_k)
        program_, streams = program.with_inside(self.program, streams, self.keys, padded)
        rows = tuple(_pad(x, 2, _up(self.length, block_q), "edge") for x in streams.rows)
        cols = tuple(_pad(x, 2, padded, "edge") for x in streams.cols)
        tile = streams.tile
        if tile is not None:
            tile = _pad(_pad(tile, 2, _up(self.length, block_q)), 3, padded)
        return Call(program_, block_q, block_k, self.interpret, self.known[backward]), Streams(rows, cols, tile)


def attention(
    kernel: Kernel,
    q: Array,
    k: Array,
    v: Array,
    *,
    mask: Mask,
    q_tokens: Tokens,
    k_tokens: Tokens,
    scale: Any,
    soft_cap: float,
    sinks: Array | None,
    bias: Array | None,
    score_mod: Callable[..., Array] | None,
    score_arrays: tuple[Array, ...],
    dropout: float,
    dropout_seed: Any,
    blocks: Sizes | None = None,
) -> tuple[Array, Array]:
    """As `kernels.attention.attention`, through `kernel`; `blocks` overrides its choice of sizes."""
    check_closure(score_mod)
    if not isinstance(scale, (int, float)):
        q, scale = (q * scale).astype(q.dtype), 1.0
    if 0 in (*q.shape, *k.shape, *v.shape):
        out, lse = jnp.zeros((*q.shape[:3], v.shape[3]), q.dtype), jnp.full(q.shape[:3], -jnp.inf)
        out, lse = alike((out, lse), q, k, v)
        return (out, lse) if sinks is None else with_sinks(out, lse, sinks)
    ruled, listed = divided(mask, q_tokens, k_tokens)
    made, streams = program.build(
        q.shape,
        k.shape,
        mask=ruled,
        q_tokens=q_tokens,
        k_tokens=k_tokens,
        scale=float(scale),
        soft_cap=float(soft_cap),
        bias=bias,
        score_mod=score_mod,
        score_arrays=score_arrays,
        rate=float(dropout),
        seed=dropout_seed,
    )
    sizes = blocks or _tuned(kernel, q, k, v) or kernel.chosen(q.shape, k.shape, v.shape, q.dtype)
    sizes = Sizes(*(_within(size, listed) for size in sizes))
    columns = mask.prepare(q_tokens, k_tokens)
    status = [worklist.classes(mask, columns, q.shape[1], k.shape[1], *size) for size in sizes]
    lists = [worklist.lists(x) for x in status]
    known = [isinstance(x, np.ndarray) for x in status]
    plan = _Plan(
        kernel=kernel,
        program=made,
        sizes=sizes,
        length=q.shape[1],
        keys=k.shape[1],
        interpret=interpreting(),
        clean=not (known[0] and bool((status[0] == FULL).all())),
        known=tuple(x if yes else None for x, yes in zip(lists, known, strict=True)),  # type: ignore[arg-type]
    )
    streams = jax.tree.map(jnp.asarray, streams)
    q, k, v, streams = alike((q, k, v, streams), *jax.tree.leaves((q, k, v, streams)))
    out, lse = _attention(plan, q, k, v, streams, tuple(lists))
    return (out, lse) if sinks is None else with_sinks(out, lse, sinks)


def tuning_case(q: Any, k: Any, v: Any) -> dict[str, Any]:
    """What block sizes are looked up by: the facts of a call on which the fastest ones depend."""
    lengths = {"length": q.shape[1], "keys": k.shape[1]}
    return {"dtype": jnp.dtype(q.dtype).name, "width": q.shape[3], "value_width": v.shape[3], **lengths}


def _tuned(kernel: Kernel, q: Array, k: Array, v: Array) -> Sizes | None:
    found = tuning.lookup("attention", kernel.__name__.rpartition(".")[2], **tuning_case(q, k, v))  # type: ignore[attr-defined]
    return None if found is None else Sizes(tuple(found["forward"]), tuple(found["backward"]))


def divided(mask: Mask, q_tokens: Tokens, k_tokens: Tokens) -> tuple[Mask, tuple[Blocks, ...]]:
    """The mask in two parts, both of which must allow a pair: rules, evaluated by pair, and lists of whole blocks.

    Kernel blocks are cut so that each lies within one block of every list; then their classes say all there is to say.
    Raises `NotImplementedError` where that cannot be: a list inside an `|` or `~`, blocks that are no multiples of 16,
    tokens that do not begin where a block does.
    """
    terms = mask.terms if isinstance(mask, And) else (mask,)
    listed = tuple(term for term in terms if isinstance(term, Blocks))
    for term in listed:
        for side, size in ((q_tokens, term.size_q), (k_tokens, term.size_k)):
            index = side.index
            known = isinstance(index, np.ndarray) and index.size > 0
            if not known or (index != index[:, :1] + np.arange(index.shape[1])).any() or (index[:, 0] % size).any():
                raise NotImplementedError(f"mask {term} over tokens that are not known to begin where a block does")
            if size % 16:
                raise NotImplementedError(f"mask {term}; a kernel's blocks are multiples of 16")
    rules = [term for term in terms if not isinstance(term, Blocks)]
    return functools.reduce(operator.and_, rules, everything()), listed


def _within(size: tuple[int, int], listed: tuple[Blocks, ...]) -> tuple[int, int]:
    return math.gcd(size[0], *(x.size_q for x in listed)), math.gcd(size[1], *(x.size_k for x in listed))


def elementwise(q: Any, k: Any, *, mask: Mask, q_tokens: Tokens, k_tokens: Tokens, **changes: Any) -> None:
    """Raises `NotImplementedError` where no kernel can do what is asked of scores q.k."""
    ruled, _ = divided(mask, q_tokens, k_tokens)
    program.build(q.shape, k.shape, mask=ruled, q_tokens=q_tokens, k_tokens=k_tokens, scale=1.0, **changes)


def with_sinks(out: Array, lse: Array, sinks: Array) -> tuple[Array, Array]:
    """The result with exp(sinks) added to the denominators; `sinks` broadcasts against lse [B, T, H]."""
    sinks = sinks.astype(lse.dtype)
    top = jax.lax.stop_gradient(jnp.maximum(lse, sinks))
    top = jnp.where(top == -jnp.inf, 0, top)
    own = jnp.exp(lse - top)
    total = own + jnp.exp(sinks - top)
    empty = total == 0
    total = jnp.where(empty, 1, total)
    out = out * (own / total)[..., None]
    return out.astype(out.dtype), jnp.where(empty, -jnp.inf, top + jnp.log(total))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(
    plan: _Plan, q: Array, k: Array, v: Array, streams: Streams, lists: tuple[Lists, Lists]
) -> tuple[Array, Array]:
    return _forward(plan, q, k, v, streams, lists)[0]


def _forward(
    plan: _Plan, q: Array, k: Array, v: Array, streams: Streams, lists: tuple[Lists, Lists]
) -> tuple[Any, Any]:
    """A key row with inf or NaN, or whose value row has any, becomes NaN wholly, and such values 0: so those who may
    see the key get NaN from its score, and no one else meets it."""
    call, padded = plan.call(False, streams)
    keys, values = k, v
    if plan.clean:
        fine = jnp.isfinite(k).all(-1, keepdims=True) & jnp.isfinite(v).all(-1, keepdims=True)
        keys, values = jnp.where(fine, k, jnp.nan), jnp.where(fine, v, 0)
    inputs = _laid_out(plan, call, q, keys, values)
    out, lse = plan.kernel.forward(call, *inputs, padded, lists[0])
    out = out.swapaxes(1, 2)[:, : plan.length, :, : v.shape[3]]
    lse = lse.swapaxes(1, 2)[:, : plan.length]
    return (out, lse), (q, k, v, streams, lists, out, lse)


def _backward(plan: _Plan, saved: Any, cotangents: tuple[Array, Array]) -> tuple[Any, ...]:
    """p = exp(s - lse) and ds = p (dP - delta): what a row loses to its normalisation and what it gains through lse are
    both in delta. Rows without keys get lse = inf, hence p = 0; rows with non-finite parts get NaN."""
    q, k, v, streams, lists, out, lse = saved
    d_out, d_lse = cotangents
    call, padded = plan.call(True, streams)
    delta = jnp.einsum("bthe,bthe->bth", d_out, out, preferred_element_type=jnp.float32) - d_lse
    fine = jnp.isfinite(delta)
    lse = jnp.where(lse == -jnp.inf, jnp.inf, jnp.where(fine, lse, jnp.nan))
    delta = jnp.where(fine, delta, 0)
    clean = (lambda x: jnp.where(jnp.isfinite(x), x, 0)) if plan.clean else lambda x: x
    inputs = _laid_out(plan, call, *(clean(x) for x in (q, k, v)))
    rows = _up(plan.length, call.block_q)
    d_out = _pad(_pad(clean(d_out).swapaxes(1, 2), 2, rows), 3, inputs[2].shape[3])
    lse = _pad(lse.swapaxes(1, 2), 2, rows, value=jnp.inf)
    delta = _pad(delta.swapaxes(1, 2), 2, rows)
    d_q, d_k, d_v, d_streams = plan.kernel.backward(call, *inputs, d_out, lse, delta, padded, lists[1])
    d_qkv = (
        d.swapaxes(1, 2)[:, : x.shape[1], :, : x.shape[3]].astype(x.dtype)
        for d, x in zip((d_q, d_k, d_v), (q, k, v), strict=True)
    )
    return *d_qkv, _gathered(d_streams, streams), None


_attention.defvjp(_forward, _backward)


def _laid_out(plan: _Plan, call: Call, q: Array, k: Array, v: Array) -> tuple[Array, Array, Array]:
    """q, k, v as the kernel wants them: heads first, whole blocks, padded widths."""
    lengths = (_up(plan.length, call.block_q), _up(plan.keys, call.block_k), _up(plan.keys, call.block_k))
    return tuple(  # type: ignore[return-value]
        _pad(_pad(x.swapaxes(1, 2), 2, length), 3, plan.kernel.padded(x.shape[3]))
        for x, length in zip((q, k, v), lengths, strict=True)
    )


def _gathered(found: Streams, streams: Streams) -> Any:
    """Gradients of the streams, summed over what was shared; None for those that have none."""

    def one(d: Array | None, x: Array | None) -> Array | None:
        if d is None or x is None or not jnp.issubdtype(x.dtype, jnp.floating):
            return None
        d = d[tuple(slice(n if axis > 1 else None) for axis, n in enumerate(x.shape))]
        return d.sum(tuple(axis for axis, n in enumerate(x.shape) if n == 1 < d.shape[axis]), keepdims=True)

    pairs = [zip(a, b, strict=False) for a, b in ((found.rows, streams.rows), (found.cols, streams.cols))]
    rows, cols = (tuple(one(d, x) for d, x in side) for side in pairs)
    gradients = Streams(rows, cols, one(found.tile, streams.tile))
    zeros = jax.tree.map(_zero, streams)
    return jax.tree.map(
        lambda zero, d: zero if d is None else d.astype(zero.dtype), zeros, gradients, is_leaf=lambda x: x is None
    )


def _zero(x: Array) -> Any:
    return jnp.zeros_like(x) if jnp.issubdtype(x.dtype, jnp.floating) else np.zeros(x.shape, jax.dtypes.float0)


def _up(n: int, block: int) -> int:
    return -(-n // block) * block


def _pad(x: Array, axis: int, size: int, mode: str = "constant", value: float = 0.0) -> Array:
    missing = size - x.shape[axis]
    if not missing:
        return x
    widths = [(0, missing if n == axis else 0) for n in range(x.ndim)]
    return jnp.pad(x, widths, mode=mode, **({"constant_values": value} if mode == "constant" else {}))
