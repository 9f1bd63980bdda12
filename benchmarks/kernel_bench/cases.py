"""What is measured: ops, the shapes that are asked of them, and what each costs at least."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kernels.attention import attention, masks
from kernels.attention import cost as attention_cost
from kernels.decode import cost as decode_cost
from kernels.decode import decode_attention, paged_decode_attention
from kernels.latent_decode import Quantised, latent_decode, paged_latent_decode, quantise
from kernels.latent_decode import cost as latent_decode_cost
from kernels.lightning import cost as lightning_cost
from kernels.lightning import decay_rates, lightning_attention


@dataclasses.dataclass(frozen=True)
class Shape:
    """Sizes of one case. `length` is the number of tokens, or of cached tokens for decode; `pattern` is the mask."""

    batch: int
    length: int
    heads: int
    kv_heads: int
    width: int
    value_width: int = 0  # 0: as width.
    pattern: str = "causal"
    page: int = 0  # Tokens of a page of a cache; 0: not in pages.

    @property
    def values(self) -> int:
        """Width of a value."""
        return self.value_width or self.width


@dataclasses.dataclass(frozen=True)
class Op:
    """One op. `run(shape, implementation)` is a function of what `inputs(shape, dtype)` gives."""

    shapes: dict[str, Shape]
    inputs: Callable[[Shape, Any], list[jax.Array]]
    run: Callable[[Shape, str | None], Callable[..., Any]]
    flops: Callable[[Shape, bool], float]
    bytes: Callable[[Shape, int, bool], float]
    differentiable: bool = True


def mask_of(shape: Shape) -> masks.Mask:
    """The mask of a pattern: causal, full, window<N>, or blocks<percent>x<size>."""
    if shape.pattern == "full":
        return masks.everything()
    if shape.pattern.startswith("window"):
        return masks.causal() & masks.sliding_window(int(shape.pattern.removeprefix("window")))
    if shape.pattern.startswith("blocks"):
        percent, size = map(int, shape.pattern.removeprefix("blocks").split("x"))
        count = -(-shape.length // size)
        live = np.zeros(count * count, bool)
        live[np.random.default_rng(0).permutation(count * count)[: max(count * count * percent // 100, 1)]] = True
        return masks.blocks(live.reshape(count, count), size)
    if shape.pattern != "causal":
        raise ValueError(f"unknown pattern {shape.pattern!r}: causal, full, window<N>, blocks<percent>x<size>")
    return masks.causal()


def _normal(shapes: list[tuple[int, ...]], dtype: Any) -> list[jax.Array]:
    keys = jax.random.split(jax.random.key(0), len(shapes))
    return [jax.random.normal(key, shape, jnp.float32).astype(dtype) for key, shape in zip(keys, shapes, strict=True)]


def _qkv(shape: Shape, dtype: Any) -> list[jax.Array]:
    b, t, d = shape.batch, shape.length, shape.width
    return _normal([(b, t, shape.heads, d), (b, t, shape.kv_heads, d), (b, t, shape.kv_heads, shape.values)], dtype)


def _sides(shape: Shape) -> tuple[tuple[int, ...], tuple[int, ...]]:
    return (shape.batch, shape.length, shape.heads, shape.width), (
        shape.batch,
        shape.length,
        shape.kv_heads,
        shape.values,
    )


def _attention_flops(shape: Shape, backward: bool) -> float:
    live = attention_cost.pairs(mask_of(shape), shape.length)
    return attention_cost.flops(*_sides(shape), live, backward=backward)


ATTENTION = Op(
    shapes={
        "tiny": Shape(1, 256, 4, 2, 64),
        "small": Shape(1, 1024, 8, 8, 64),
        "cpu4k": Shape(1, 4096, 8, 8, 64),
        "t1k": Shape(16, 1024, 16, 16, 128),
        "t4k": Shape(4, 4096, 16, 16, 128),
        "t8k": Shape(2, 8192, 16, 16, 128),
        "t16k": Shape(1, 16384, 16, 16, 128),
        "full8k": Shape(2, 8192, 16, 16, 128, pattern="full"),
        "gqa4k": Shape(4, 4096, 32, 8, 128),
        "d64": Shape(4, 4096, 16, 16, 64),
        "mla4k": Shape(2, 4096, 16, 16, 192, 128),
        "window16k": Shape(1, 16384, 16, 16, 128, pattern="window1024"),
        "blocks50": Shape(1, 16384, 16, 16, 128, pattern="blocks50x256"),
        "blocks10": Shape(1, 16384, 16, 16, 128, pattern="blocks10x256"),
        "blocks2": Shape(1, 16384, 16, 16, 128, pattern="blocks2x256"),
    },
    inputs=_qkv,
    run=lambda shape, name: lambda q, k, v: attention(q, k, v, mask=mask_of(shape), implementation=name)[0],
    flops=_attention_flops,
    bytes=lambda shape, size, backward: attention_cost.bytes(*_sides(shape), itemsize=size, backward=backward),
)


def _decode_inputs(shape: Shape, dtype: Any) -> list[jax.Array]:
    shared = shape.values < shape.width
    q = (shape.batch, 1, shape.heads, shape.width)
    page = shape.page or shape.length
    pages = (shape.batch * (shape.length // page), page) if shape.page else (shape.batch, shape.length)
    caches = [(*pages, shape.kv_heads, width) for width in (shape.width, *(() if shared else (shape.values,)))]
    lengths = jnp.full(shape.batch, shape.length, jnp.int32)
    if not shape.page:
        return [*_normal([q, *caches], dtype), lengths]
    table = jax.random.permutation(jax.random.key(1), pages[0]).astype(jnp.int32).reshape(shape.batch, -1)
    return [*_normal([q, *caches], dtype), lengths, table]


def _decode(shape: Shape, name: str | None) -> Callable[..., Any]:
    shared = shape.values < shape.width
    options = dict(value_width=shape.values if shared else None, implementation=name)

    def run(q: jax.Array, k: jax.Array, *rest: jax.Array) -> jax.Array:
        v, (lengths, *table) = (None, rest) if shared else (rest[0], rest[1:])
        if table:
            return paged_decode_attention(q, k, v, table[0], lengths, **options)[0]
        return decode_attention(q, k, v, lengths, **options)[0]

    return run


def _decode_bytes(shape: Shape, size: int, backward: bool) -> float:
    q, seen = (shape.batch, 1, shape.heads, shape.width), decode_cost.keys([shape.length] * shape.batch)
    return decode_cost.bytes(q, shape.kv_heads, shape.values, seen, itemsize=size, shared=shape.values < shape.width)


DECODE = Op(
    shapes={
        "tiny": Shape(2, 256, 4, 2, 64),
        "small": Shape(4, 4096, 8, 2, 64),
        "gqa32k": Shape(16, 32768, 32, 8, 128),
        "gqa32k_paged": Shape(16, 32768, 32, 8, 128, page=64),
        "mla4k": Shape(128, 4096, 16, 1, 576, 512),
        "mla32k": Shape(32, 32768, 16, 1, 576, 512),
        "mla32k_h64": Shape(32, 32768, 64, 1, 576, 512),
        "mla32k_h128": Shape(32, 32768, 128, 1, 576, 512),
        "tpla32k_h64": Shape(32, 32768, 64, 1, 320, 256),
    },
    inputs=_decode_inputs,
    run=_decode,
    flops=lambda shape, backward: decode_cost.flops(
        (shape.batch, 1, shape.heads, shape.width), shape.values, decode_cost.pairs([shape.length] * shape.batch)
    ),
    bytes=_decode_bytes,
    differentiable=False,
)


def _latent_inputs(shape: Shape, dtype: Any) -> list[jax.Array]:
    """Of a shape as `DECODE` has it: the latent is the value, what is left of the width the rotary key."""
    rotary = shape.width - shape.values
    q, *cache, lengths = _decode_inputs(dataclasses.replace(shape, page=0), dtype)
    rows, table = cache[0][:, :, 0], []
    if shape.page:
        pages = shape.batch * shape.length // shape.page
        rows = rows.reshape(pages, shape.page, shape.width)
        table = [jax.random.permutation(jax.random.key(1), pages).astype(jnp.int32).reshape(shape.batch, -1)]
    values, scales = quantise(rows[..., : shape.values])
    return [q[..., : shape.values], q[..., -rotary:], values, scales, rows[..., -rotary:], lengths, *table]


def _latent_decode(shape: Shape, name: str | None) -> Callable[..., Any]:
    def run(q, q_rope, values, scales, rope, lengths, *table):
        options: dict[str, Any] = dict(scale=shape.width**-0.5, implementation=name)
        latent = Quantised(values, scales)
        if table:
            return paged_latent_decode(q, q_rope, latent, rope, table[0], lengths, **options)[0]
        return latent_decode(q, q_rope, latent, rope, lengths, **options)[0]

    return run


def _latent_sizes(shape: Shape) -> tuple[tuple[int, ...], int]:
    return (shape.batch, 1, shape.heads, shape.values), shape.width - shape.values


LATENT_DECODE = Op(
    shapes={
        "tiny": Shape(2, 256, 4, 1, 144, 128),
        "small": Shape(2, 4096, 8, 1, 576, 512),
        "mla32k": Shape(32, 32768, 16, 1, 576, 512),
        "mla32k_paged": Shape(32, 32768, 16, 1, 576, 512, page=128),
        "mla32k_h64": Shape(32, 32768, 64, 1, 576, 512),
        "tpla32k_h64": Shape(32, 32768, 64, 1, 320, 256),
    },
    inputs=_latent_inputs,
    run=_latent_decode,
    flops=lambda shape, backward: latent_decode_cost.flops(
        *_latent_sizes(shape), latent_decode_cost.pairs([shape.length] * shape.batch)
    ),
    bytes=lambda shape, size, backward: latent_decode_cost.bytes(
        *_latent_sizes(shape), latent_decode_cost.keys([shape.length] * shape.batch),
        blocks=max(1, shape.values // 128), itemsize=size,
    ),
    differentiable=False,
)  # fmt: skip

LIGHTNING = Op(
    shapes={
        "tiny": Shape(1, 256, 4, 4, 64),
        "small": Shape(1, 4096, 8, 8, 64),
        "t2k": Shape(8, 2048, 16, 16, 128),
        "t16k": Shape(1, 16384, 16, 16, 128),
        "t128k": Shape(1, 131072, 16, 16, 128),
    },
    inputs=_qkv,
    run=lambda shape, name: (
        lambda q, k, v: lightning_attention(q, k, v, decay_rates(shape.heads, 0, 2), implementation=name)[0]
    ),
    flops=lambda shape, backward: (
        shape.batch
        * lightning_cost.flops(shape.length, shape.heads, shape.width, shape.values, chunk=64, backward=backward)
    ),
    bytes=lambda shape, size, backward: lightning_cost.bytes(
        shape.batch, shape.length, shape.heads, shape.width, shape.values, itemsize=size, backward=backward
    ),
)

OPS = {"attention": ATTENTION, "decode": DECODE, "latent_decode": LATENT_DECODE, "lightning": LIGHTNING}
# What is measured where nothing is asked for.
USUAL = {
    "cpu": {
        "attention": ("small", "cpu4k"),
        "decode": ("small",),
        "latent_decode": ("small",),
        "lightning": ("small",),
    },
    "gpu": {op: tuple(n for n in OPS[op].shapes if n not in ("tiny", "small", "cpu4k")) for op in OPS},
}
USUAL["tpu"] = USUAL["gpu"]
