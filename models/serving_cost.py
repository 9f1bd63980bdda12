"""What one decode step of latent attention costs on several devices, before anything runs: a model, not a measurement.

    v3, tpla = SHAPES["deepseek-v3"], Scheme("tpla", slices=2)
    cost = decode_cost(v3, CHIPS["h100"], tpla, devices=2, batch=16, context=32768)
    print(cost.cache_bytes, cost.weight_bytes, cost.seconds)

Counts are exact for one device, one attention layer and one new token per request, in the absorbed form: queries are
taken into the latent space and attend to one cached row [latent, rotary key] per token (MLA: DeepSeek-V2, arXiv
2405.04434, section 2.1; TPLA: arXiv 2508.15881; sequence: Helix parallelism, arXiv 2507.07120). Times are a roofline
over these counts, with the shares of the peaks that `Chip` states. `docs/serving-cost.md` has formulas and limits.
"""

import dataclasses
import math

KINDS = ("mla_tp", "tpla", "gla", "sequence", "data_parallel")
OUTPUTS = ("allreduce", "scatter_heads")


@dataclasses.dataclass(frozen=True)
class Shape:
    """The attention of a model. Widths in elements; `q_lora_rank` 0 is one plain query projection."""

    name: str
    width: int
    layers: int
    heads: int
    q_lora_rank: int = 1536
    kv_lora_rank: int = 512
    qk_rope_head_dim: int = 64
    qk_nope_head_dim: int = 128
    v_head_dim: int = 128


# Hidden size, layers (without V3's extra prediction layer) and heads: the models' published config.json.
SHAPES = {
    shape.name: shape
    for shape in (
        Shape("deepseek-v2", 5120, 60, 128),
        Shape("deepseek-v3", 7168, 61, 128),
        Shape("kimi-k2", 7168, 61, 64),
    )
}


@dataclasses.dataclass(frozen=True)
class Chip:
    """One device and its links: data-sheet peaks, and the shares of them that are assumed to be reached.

    Attributes:
        name: for people.
        flops: dense bfloat16 FLOP/s.
        bandwidth: bytes/s of its memory.
        memory: bytes.
        link_bandwidth: bytes/s in one direction along one axis of the network.
        link_axes: axes of a torus; a collective over k devices uses min(link_axes, log2 k) of them. 1 is a switch.
        collective_seconds: what a collective takes however small. Assumed 6 us: NCCL took that on two H100 with CUDA
            graphs (github.com/NVIDIA/nccl/issues/1259), a gather over four TPU v5e chips 8 us (jax-ml.github.io
            scaling-book, part 3). Good one-shot kernels are faster, more devices slower.
        lane: a cached row's latent and rotary key are each padded to this many elements; 1 is no padding.
        row_tile: query heads are computed in tiles of this many rows, filled or not.
        matmul_efficiency: share of `flops`. Assumed 0.67, FlashMLA's 660 of 989 TFLOP/s on H800 (its README).
        bandwidth_efficiency: share of `bandwidth`. Assumed 0.85; FlashMLA reached 84 % on H100, 90 % on H800.
        link_efficiency: share of the link bandwidth. Assumed 0.8; NCCL reached 365 of 450 GB/s on H100
            (github.com/NVIDIA/nccl/issues/1455).
        memory_fraction: share of `memory` that weights and caches may fill; the rest is for activations. Assumed.
    """

    name: str
    flops: float
    bandwidth: float
    memory: float
    link_bandwidth: float
    link_axes: int = 1
    collective_seconds: float = 6e-6
    lane: int = 1
    row_tile: int = 1
    matmul_efficiency: float = 0.67
    bandwidth_efficiency: float = 0.85
    link_efficiency: float = 0.8
    memory_fraction: float = 0.9

    def link(self, devices: int) -> float:
        """Bytes/s that each device can send in a collective over so many devices."""
        axes = min(self.link_axes, max(1, int(math.log2(devices))))
        return self.link_efficiency * self.link_bandwidth * axes


# H100, H200: NVIDIA data sheets of the SXM parts (FLOP/s without sparsity; half of NVLink's 900 GB/s is one direction).
# H800: an H100 with 400 GB/s of NVLink; 3.35 TB/s and 990 TFLOP/s are also what FlashMLA's authors reckon with.
# Hopper's matrix instruction (wgmma) has 64 rows.
# v5p, v6e: cloud.google.com/tpu/docs/v5p and /v6e (v5p: 2,765 GB/s there, 2.46 TB/s in jax's tpu_info.py). Links: 1,200
# and 800 GB/s there, over both directions of six and four links, so 100 GB/s one way along an axis. Lanes are 128 wide,
# and the TPU kernels of tokamax pad latent and rotary key each. That heads fill a matrix unit's width (128, v6e 256) is
# assumed, and decides much: `dataclasses.replace(chip, row_tile=8)` is the other extreme.
CHIPS = {
    chip.name: chip
    for chip in (
        Chip("h100", 989e12, 3.35e12, 80e9, 450e9, row_tile=64),
        Chip("h200", 989e12, 4.8e12, 141e9, 450e9, row_tile=64),
        Chip("h800", 989e12, 3.35e12, 80e9, 200e9, row_tile=64),
        Chip("v5p", 459e12, 2.765e12, 95 * 2**30, 100e9, link_axes=3, lane=128, row_tile=128),
        Chip("v6e", 918e12, 1.64e12, 32e9, 100e9, link_axes=2, lane=128, row_tile=256),
    )
}


@dataclasses.dataclass(frozen=True)
class Scheme:
    """How the attention of a layer is spread over k devices.

    Attributes:
        kind: one of
            "mla_tp": heads split, the latent cache whole on every device (what tensor parallelism does to MLA). Exact.
            "tpla": the latent in `slices` pieces, each on k/slices devices, which split all heads. Approximate.
            "gla": `slices` latent heads, each seen by its own heads only. A different model, to be trained.
            "sequence": the cached tokens split, partial results combined by log-sum-exp (decode context parallelism,
                Helix). Queries are made by head and gathered. Exact.
            "data_parallel": whole requests split, weights whole on every device. Exact.
        slices: g of "tpla" and "gla"; 1 otherwise.
        output: of "tpla": "allreduce", W_O of all heads of the device's group, one sum (the paper); "scatter_heads",
            values summed to their heads first, W_O split over all devices, one more small collective, same result.
    """

    kind: str
    slices: int = 1
    output: str = "allreduce"

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"kind {self.kind!r} of a scheme: it must be one of {', '.join(KINDS)}")
        if self.output not in OUTPUTS:
            raise ValueError(f"output {self.output!r} of a scheme: it must be one of {', '.join(OUTPUTS)}")
        if self.slices < 1:
            raise ValueError(f"slices={self.slices}: at least 1")
        if self.slices > 1 and self.kind not in ("tpla", "gla"):
            raise ValueError(f"slices={self.slices}: {self.kind} does not slice the latent, only tpla and gla do")
        if self.output != "allreduce" and self.kind != "tpla":
            raise ValueError(f"output={self.output!r}: only tpla has another output than allreduce, not {self.kind}")

    @property
    def name(self) -> str:
        """As in tables: "tpla-2 scatter_heads"."""
        sliced = f"{self.kind}-{self.slices}" if self.slices > 1 else self.kind
        return sliced if self.output == "allreduce" else f"{sliced} {self.output}"


@dataclasses.dataclass(frozen=True)
class Cost:
    """One decode step of one attention layer on one device, the one with most to do.

    Attributes:
        row_bytes: one cached row as held, padding included (whole, even where a device holds every k-th).
        cache_bytes: of all rows that the device holds for this layer; a step reads each of them once.
        weight_bytes: of the layer's attention weights that the device holds; a step reads each once.
        activation_bytes: read and written between the layer's products; small, but not at short contexts.
        attention_flops: scores and weighted sum of latents, of the heads and widths there are; 2 per multiply-add.
        padded_attention_flops: the same as executed, with lanes and row tiles filled up.
        projection_flops: all weight products.
        collectives: how many.
        collective_bytes: that the device sends, ring algorithms.
        attention_seconds: the longer of computing it and of reading cache, queries and writing outputs.
        projection_seconds: the longer of computing and of reading weights and activations.
        collective_seconds: fixed times and bytes over links; nothing is hidden behind computation.
    """

    row_bytes: int
    cache_bytes: int
    weight_bytes: int
    activation_bytes: int
    attention_flops: int
    padded_attention_flops: int
    projection_flops: int
    collectives: int
    collective_bytes: float
    attention_seconds: float
    projection_seconds: float
    collective_seconds: float

    @property
    def seconds(self) -> float:
        """Of one layer and step: projections, attention and collectives run one after another."""
        return self.attention_seconds + self.projection_seconds + self.collective_seconds


@dataclasses.dataclass(frozen=True)
class _Part:
    """One device's part: heads of the projections before and after attention, heads in attention, heads of W_O, width
    of the latent, in how many pieces requests and their tokens are split."""

    projected: int
    attended: int
    output: int
    latent: int
    requests: int = 1
    tokens: int = 1


def decode_cost(
    shape: Shape,
    chip: Chip,
    scheme: Scheme,
    *,
    devices: int,
    batch: int,
    context: int,
    weight_itemsize: float = 2,
    cache_itemsize: float = 2,
    activation_itemsize: float = 2,
) -> Cost:
    """What a step costs in which each of `batch` requests (over all devices) attends to `context` cached tokens.

    Raises:
        ValueError: a size below 1, or a scheme that does not divide the heads, latent or devices, named.
    """
    _positive(batch=batch, context=context)
    part = _part(shape, scheme, devices)
    requests = -(-batch // part.requests)
    cached = requests * -(-context // part.tokens)
    nope, rope, value = shape.qk_nope_head_dim, shape.qk_rope_head_dim, shape.v_head_dim
    latent, padded_latent = part.latent, _up(part.latent, chip.lane)
    row = padded_latent + _up(rope, chip.lane)
    weights = _weights(shape, part)

    queries = part.projected * (nope + rope)
    before = shape.width + 2 * shape.q_lora_rank + latent + rope + 2 * queries + part.projected * (latent + rope)
    after = part.projected * (latent + value) + part.output * value + shape.width
    around = requests * (before + after) * activation_itemsize
    inside = requests * part.attended * (2 * latent + rope) * activation_itemsize

    rows = _up(part.attended, chip.row_tile)
    padded_flops = 2 * rows * cached * (row + padded_latent)
    projection_flops = 2 * requests * weights
    cache_bytes = cached * row * cache_itemsize
    flops_rate, memory_rate = chip.matmul_efficiency * chip.flops, chip.bandwidth_efficiency * chip.bandwidth
    sent = _sent(shape, scheme, part, devices, batch, activation_itemsize)
    return Cost(
        row_bytes=round(row * cache_itemsize),
        cache_bytes=round(cache_bytes),
        weight_bytes=round(weights * weight_itemsize),
        activation_bytes=round(around + inside),
        attention_flops=2 * part.attended * cached * (2 * latent + rope),
        padded_attention_flops=padded_flops,
        projection_flops=projection_flops,
        collectives=len(sent),
        collective_bytes=sum(size for size, _ in sent),
        attention_seconds=max(padded_flops / flops_rate, (cache_bytes + inside) / memory_rate),
        projection_seconds=max(projection_flops / flops_rate, (weights * weight_itemsize + around) / memory_rate),
        collective_seconds=sum(chip.collective_seconds + size / chip.link(group) for size, group in sent),
    )


def max_batch(
    shape: Shape,
    chip: Chip,
    scheme: Scheme,
    *,
    devices: int,
    context: int,
    other_bytes: float = 0.0,
    weight_itemsize: float = 2,
    cache_itemsize: float = 2,
) -> int:
    """The most requests of `context` tokens, over all devices, whose caches of all layers fit beside the attention's
    weights and `other_bytes` (experts, embeddings, per device; 0 is attention alone, as the TPLA paper measured).
    0 if not one does."""
    one = decode_cost(
        shape, chip, scheme, devices=devices, batch=1, context=context,
        weight_itemsize=weight_itemsize, cache_itemsize=cache_itemsize,
    )  # fmt: skip
    left = chip.memory_fraction * chip.memory - other_bytes - shape.layers * one.weight_bytes
    fit = max(0, math.floor(left / (shape.layers * one.cache_bytes)))
    return fit * _part(shape, scheme, devices).requests


def throughput(
    shape: Shape,
    chip: Chip,
    scheme: Scheme,
    *,
    devices: int,
    context: int,
    batch: int | None = None,
    other_bytes: float = 0.0,
    other_seconds: float = 0.0,
    weight_itemsize: float = 2,
    cache_itemsize: float = 2,
) -> float:
    """Tokens per second of all devices together; `batch` None is the largest that fits (`max_batch`).

    `other_seconds` is what the rest of the model adds to a step; 0 is attention layers alone.

    Raises:
        ValueError: as `decode_cost`, or not one request fits.
    """
    if batch is None:
        batch = max_batch(
            shape, chip, scheme, devices=devices, context=context, other_bytes=other_bytes,
            weight_itemsize=weight_itemsize, cache_itemsize=cache_itemsize,
        )  # fmt: skip
        if not batch:
            raise ValueError(f"context={context}: not one request of {shape.name} fits on {chip.name} by {scheme.name}")
    cost = decode_cost(
        shape, chip, scheme, devices=devices, batch=batch, context=context,
        weight_itemsize=weight_itemsize, cache_itemsize=cache_itemsize,
    )  # fmt: skip
    return batch / (shape.layers * cost.seconds + other_seconds)


def break_even(
    shape: Shape,
    chip: Chip,
    scheme: Scheme,
    baseline: Scheme = Scheme("mla_tp"),  # noqa: B008 (frozen)
    *,
    devices: int,
    weight_itemsize: float = 2,
    cache_itemsize: float = 2,
) -> float:
    """Cached tokens of all requests together (batch x context) from which `scheme` reads fewer bytes per step and
    device, weights and caches, than `baseline`; 0 if always, infinite if never."""
    parts = [_part(shape, each, devices) for each in (scheme, baseline)]
    own, other = (_weights(shape, part) * weight_itemsize for part in parts)
    rope = _up(shape.qk_rope_head_dim, chip.lane)
    own_rate, other_rate = (
        (_up(part.latent, chip.lane) + rope) * cache_itemsize / (part.requests * part.tokens) for part in parts
    )
    if own_rate >= other_rate:
        return 0.0 if own < other else math.inf
    return max(0.0, (own - other) / (other_rate - own_rate))


def _part(shape: Shape, scheme: Scheme, devices: int) -> _Part:
    _positive(devices=devices)
    heads, latent, slices = shape.heads, shape.kv_lora_rank, scheme.slices
    if scheme.kind == "data_parallel":
        return _Part(heads, heads, heads, latent, requests=devices)
    if devices % slices:
        raise ValueError(f"slices={slices} of {scheme.kind} must divide devices={devices}")
    if latent % slices:
        raise ValueError(f"slices={slices} of {scheme.kind} must divide kv_lora_rank={latent} of {shape.name}")
    replicas = slices if scheme.kind == "tpla" else 1  # Devices that compute the same heads, each on its slice.
    splits = devices if scheme.output == "scatter_heads" else devices // replicas
    if heads % splits:
        raise ValueError(f"heads={heads} of {shape.name} do not divide over {splits} devices ({scheme.name})")
    own = heads // (devices // replicas)
    if scheme.kind == "sequence":
        return _Part(own, heads, own, latent, tokens=devices)
    return _Part(own, own, heads // splits, latent // slices)


def _weights(shape: Shape, part: _Part) -> int:
    """Elements of one device's attention weights: W_DQ whole, W_UQ by head, W_DKV and W_KR, W_UK and W_UV, W_O."""
    query = part.projected * (shape.qk_nope_head_dim + shape.qk_rope_head_dim)
    down = shape.width * (part.latent + shape.qk_rope_head_dim)
    up = part.projected * part.latent * (shape.qk_nope_head_dim + shape.v_head_dim)
    rank = shape.q_lora_rank
    return (
        (shape.width * rank + rank * query if rank else shape.width * query)
        + down
        + up
        + part.output * shape.v_head_dim * shape.width
    )


def _sent(
    shape: Shape, scheme: Scheme, part: _Part, devices: int, batch: int, itemsize: float
) -> list[tuple[float, int]]:
    """Bytes that a device sends in each collective, and over how many devices it goes."""
    if devices == 1 or scheme.kind == "data_parallel":
        return []
    ring = (devices - 1) / devices  # Of an array in k pieces, what a gather or a scatter sends; a sum sends twice that.
    sent = [(2 * ring * batch * shape.width * itemsize, devices)]  # The layer's output.
    if scheme.kind == "sequence":
        heads, latent = shape.heads, shape.kv_lora_rank
        sent += [
            (ring * batch * heads * (latent + shape.qk_rope_head_dim) * itemsize, devices),  # Queries, gathered.
            (ring * devices * batch * heads * 4, devices),  # Every device's log-sum-exp in float32, gathered.
            (ring * batch * heads * latent * itemsize, devices),  # Outputs, summed to the devices of their heads.
        ]
    if scheme.output == "scatter_heads" and scheme.slices > 1:
        share = (scheme.slices - 1) / scheme.slices
        sent += [(share * batch * part.projected * shape.v_head_dim * itemsize, scheme.slices)]
    return sent


def _up(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple


def _positive(**sizes: int) -> None:
    for name, size in sizes.items():
        if size < 1:
            raise ValueError(f"{name}={size}: at least 1")
