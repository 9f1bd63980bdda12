"""The blockwise attention op on CPU: against torch SDPA, against plain jax.numpy, and sparse masks against dense ones.

    python benchmarks/attention_cpu.py                                   about ten minutes on two cores
    python benchmarks/attention_cpu.py --cases=dense,training --lengths=1024,4096 --rounds=9

Rivals alternate (A B A B ...) with one untimed call before each timed one. The speed of a shared machine drifts, so
read the paired ratios: their minimum is the gate, their median the ordinary case. `cpu` is the processor time of all
threads, which a busy neighbour disturbs least. torch is measured where it is installed. Both sides have huge pages
(the program starts itself again with GLIBC_TUNABLES set). Results go to benchmarks/results/attention_cpu.json.
"""

import argparse
import dataclasses
import importlib.util
import pathlib
import sys
import time
from collections.abc import Callable
from typing import Any

ROOT = pathlib.Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
from machine import describe, with_huge_pages, write  # noqa: E402

from kernels.attention import attention, masks  # noqa: E402
from kernels.attention.masks import Mask  # noqa: E402
from kernels.tokens import packed  # noqa: E402

CAUSAL = masks.causal()


@dataclasses.dataclass
class Rival:
    """Something to time: `run` blocks until it is done."""

    name: str
    run: Callable[[], Any]
    temporary_mib: float | None = None
    seconds: list[float] = dataclasses.field(default_factory=list)
    cpu_seconds: list[float] = dataclasses.field(default_factory=list)


def inputs(batch: int, length: int, heads: int, kv_heads: int, width: int) -> list[np.ndarray]:
    """q, k, v and the gradient of the output, float32."""
    rng = np.random.default_rng(0)
    shapes = [(batch, length, n, width) for n in (heads, kv_heads, kv_heads, heads)]
    return [rng.standard_normal(shape, dtype=np.float32) for shape in shapes]


def ours(name: str, function: Callable[..., Any], arrays: list[np.ndarray], gradient: bool) -> Rival:
    """A compiled JAX function of q, k, v, alone or with its gradients."""
    q, k, v, d_out = map(jnp.asarray, arrays)
    if gradient:
        jitted = jax.jit(lambda q, k, v, d_out: jax.vjp(function, q, k, v)[1](d_out))
    else:
        jitted = jax.jit(lambda q, k, v, d_out: function(q, k, v))
    compiled = jitted.lower(q, k, v, d_out).compile()
    temporary = compiled.memory_analysis().temp_size_in_bytes / 2**20
    return Rival(name, lambda: jax.block_until_ready(compiled(q, k, v, d_out)), temporary)


def torch_sdpa(arrays: list[np.ndarray], gradient: bool) -> Rival | None:
    """torch's CPU attention in its own layout, or None where torch is not installed."""
    try:
        import torch
    except ImportError:
        return None
    sdpa = torch.nn.functional.scaled_dot_product_attention
    q, k, v, d_out = (torch.from_numpy(a).transpose(1, 2).contiguous() for a in arrays)
    if not gradient:
        return Rival("torch", lambda: sdpa(q, k, v, is_causal=True))
    for x in (q, k, v):
        x.requires_grad_(True)
    return Rival("torch", lambda: torch.autograd.grad(sdpa(q, k, v, is_causal=True), (q, k, v), d_out))


def measure(title: str, rivals: list[Rival], rounds: int, target: float | None = None) -> dict[str, Any]:
    """Times the first rival against the others and prints one line per rival; ratios are first / other."""
    for _ in range(rounds):
        for rival in rivals:
            rival.run()
            begun, cpu_begun = time.perf_counter(), time.process_time()
            rival.run()
            rival.seconds.append(time.perf_counter() - begun)
            rival.cpu_seconds.append(time.process_time() - cpu_begun)
    first, record = rivals[0], {"case": title, "rounds": rounds, "target": target, "rivals": {}}
    print(f"\n{title}" + (f"   (target: ratio at most {target:.3f})" if target else ""))
    for rival in rivals:
        ratios = np.array(first.seconds) / np.array(rival.seconds)
        row = {
            "median_ms": 1e3 * float(np.median(rival.seconds)),
            "min_ms": 1e3 * min(rival.seconds),
            "min_cpu_ms": 1e3 * min(rival.cpu_seconds),
            "temporary_mib": rival.temporary_mib,
            "ratio_min": float(ratios.min()),
            "ratio_median": float(np.median(ratios)),
            "ratio_cpu": min(first.cpu_seconds) / min(rival.cpu_seconds),
        }
        record["rivals"][rival.name] = row
        memory = "" if rival.temporary_mib is None else f"  temporaries {rival.temporary_mib:6.1f} MiB"
        ratio = (
            ""
            if rival is first
            else "  ratio min {ratio_min:.3f} median {ratio_median:.3f} cpu {ratio_cpu:.3f}".format(**row)
        )
        print(
            f"  {rival.name:18s} median {row['median_ms']:9.1f} ms  min {row['min_ms']:9.1f}  cpu {row['min_cpu_ms']:9.1f}"  # noqa: E501
            f"{ratio}{memory}",
            flush=True,
        )
    return record


def op(mask: Mask = CAUSAL, **options: Any) -> Callable[..., jax.Array]:
    """The attention op as a function of q, k, v alone."""
    return lambda q, k, v: attention(q, k, v, mask=mask, implementation="xla", **options)[0]


def dense(lengths: list[int], rounds: int) -> list[dict[str, Any]]:
    """Causal, B 1 H 8 D 64, against torch."""
    records = []
    for length in lengths:
        arrays = inputs(1, length, 8, 8, 64)
        for gradient, target in ((False, 0.85), (True, 0.75)):
            rivals = [ours("tessera", op(), arrays, gradient), torch_sdpa(arrays, gradient)]
            title = f"dense causal T {length} {'forward+gradient' if gradient else 'forward'}"
            records.append(measure(title, [rival for rival in rivals if rival], rounds, target))
    return records


def training(lengths: list[int], rounds: int) -> list[dict[str, Any]]:
    """Small training shapes, two packed documents per row, against softmax attention in plain jax.numpy."""
    records = []
    for heads, kv_heads, width in ((8, 8, 32), (8, 2, 32), (4, 4, 64)):
        arrays = inputs(8, 512, heads, kv_heads, width)
        segment = jnp.asarray(1 + (np.arange(512) >= 300)[None].repeat(8, axis=0))

        def plain(q: jax.Array, k: jax.Array, v: jax.Array, segment: jax.Array = segment) -> jax.Array:
            k, v = (jnp.repeat(x, q.shape[2] // x.shape[2], axis=2) for x in (k, v))
            s = jnp.einsum("bthd,bshd->bhts", q, k) * q.shape[3] ** -0.5
            allowed = jnp.tril(jnp.ones((512, 512), bool)) & (segment[:, None, :, None] == segment[:, None, None, :])
            return jnp.einsum("bhts,bshd->bthd", jax.nn.softmax(jnp.where(allowed, s, -1e30), axis=-1), v)

        def blockwise(q: jax.Array, k: jax.Array, v: jax.Array, segment: jax.Array = segment) -> jax.Array:
            tokens = packed(segment)
            return op(CAUSAL & masks.segments() & masks.valid(), q_tokens=tokens, k_tokens=tokens)(q, k, v)

        rivals = [ours("tessera", blockwise, arrays, True), ours("jax.numpy", plain, arrays, True)]
        title = f"packed training B 8 T 512 H {heads}/{kv_heads} D {width} forward+gradient"
        records.append(measure(title, rivals, rounds, 1.0))
    return records


def window(lengths: list[int], rounds: int) -> list[dict[str, Any]]:
    """A window of 1024 at the longest length against our own dense causal form."""
    length = max(lengths)
    arrays, records = inputs(1, length, 8, 8, 64), []
    for gradient in (False, True):
        near = ours("window 1024", op(CAUSAL & masks.sliding_window(1024)), arrays, gradient)
        title = f"window 1024 T {length} {'forward+gradient' if gradient else 'forward'}"
        records.append(measure(title, [near, ours("dense", op(), arrays, gradient)], rounds, 1 / 4.5))
    return records


def blocks(lengths: list[int], rounds: int) -> list[dict[str, Any]]:
    """A mask with a tenth of its blocks live against full attention."""
    length = min(max(lengths), 4096)
    arrays, records = inputs(1, length, 8, 8, 64), []
    for size, target in ((256, 1 / 5), (128, 1 / 4)):
        count = length // size
        live = np.zeros(count * count, bool)
        live[np.random.default_rng(0).permutation(count * count)[: count * count // 10]] = True
        mask = masks.blocks(live.reshape(count, count), size)
        for gradient in (False, True):
            sparse = ours("tenth live", op(mask), arrays, gradient)
            title = f"blocks of {size} T {length} {'forward+gradient' if gradient else 'forward'}"
            full = ours("full", op(masks.everything()), arrays, gradient)
            records.append(measure(title, [sparse, full], rounds, target))
    return records


CASES = {"dense": dense, "training": training, "window": window, "blocks": blocks}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", default=",".join(CASES), help="some of " + ",".join(CASES))
    parser.add_argument("--lengths", default="1024,4096,16384")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--output", type=pathlib.Path, default=ROOT / "benchmarks/results/attention_cpu.json")
    options = parser.parse_args()
    with_huge_pages()
    torch = ["torch"] if importlib.util.find_spec("torch") else []
    results = describe("jax", "jaxlib", "numpy", *torch) | {"records": []}
    print(f"{results['device']}; {results['versions']}")
    for name in options.cases.split(","):
        results["records"] += CASES[name]([int(length) for length in options.lengths.split(",")], options.rounds)
        results["load_average_after"] = describe()["load_average"]
        write(results, options.output)  # After every case, so that a stop loses little.


if __name__ == "__main__":
    main()
