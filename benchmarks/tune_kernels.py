"""Searches the block sizes of attention kernels on this device and writes the fastest to kernels/tuned/.

    python benchmarks/tune_kernels.py                                             every kernel that runs here
    python benchmarks/tune_kernels.py --implementations=triton --shapes=t4k,d64 --dtype=float16

Sizes are searched first forwards, then, with the fastest of those, backwards. Candidates are compiled one by one,
checked against the blockwise form, and timed in turns; one that does not compile, or is wrong, is listed and left out.
A result is written as soon as it is found, so that a search that is stopped keeps what it has.
"""

import argparse
import importlib
import itertools
import os
import pathlib
import sys
from collections.abc import Callable
from typing import Any

ROOT = pathlib.Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
from kernel_bench import cases, rivals, timing  # noqa: E402
from machine import describe  # noqa: E402

from kernels import tuning  # noqa: E402
from kernels.attention import IMPLEMENTATIONS, fused  # noqa: E402
from kernels.platform import default_platform, device_kind  # noqa: E402
from kernels.tokens import sequence  # noqa: E402
from kernels.tolerance import relative_error, tolerance  # noqa: E402

# Query and key tokens of a block; a kernel says which of them it can do by compiling.
CANDIDATES = {
    "gpu": list(itertools.product((64, 128, 256), (32, 64, 128))),
    "tpu": list(itertools.product((256, 512, 1024, 2048), (256, 512, 1024, 2048))),
}


def search(
    kernel: Any, shape: cases.Shape, dtype: str, candidates: list[tuple[int, int]], time: Callable[[list], None]
) -> dict[str, Any]:
    """The fastest sizes of a kernel for one shape: {"forward": [bq, bk], "backward": [bq, bk], "seconds": {...}}.

    `time(rivals)` appends to each rival's `seconds`. Raises `ValueError`, with all reasons, where no candidate works.
    """
    arrays = cases.ATTENTION.inputs(shape, dtype)
    usual = kernel.chosen(*(x.shape for x in arrays), arrays[0].dtype)
    chosen, seconds = {}, {}
    for backward in (False, True):
        right = rivals.exact("attention", cases.ATTENTION, shape, arrays, backward)
        limit = 2 * (tolerance(dtype).gradient if backward else tolerance(dtype).out)
        found, refused = {}, {}
        for size in dict.fromkeys([usual[backward], *candidates]):
            sizes = fused.Sizes(tuple(chosen["forward"]), size) if backward else fused.Sizes(size, usual.backward)
            try:
                rival = rivals.compiled(str(size), _through(kernel, shape, sizes), arrays, backward)
                error = max(relative_error(a, b) for a, b in zip(rival.result(), right, strict=True))
                if not error <= limit:
                    raise rivals.Refused(f"wrong: relative error {error:.1e}")
                found[size] = rival
            except Exception as reason:  # Sizes that do not compile are what a search is there to find.
                refused[size] = f"{type(reason).__name__}: {(str(reason).splitlines() or [''])[0][:120]}"
        for size, reason in refused.items():
            print(f"  {size}: {reason}", flush=True)
        if not found:
            raise ValueError(f"no candidate works: {refused}")
        time(list(found.values()))
        times = {size: float(np.median(rival.seconds)) for size, rival in found.items()}
        best = min(times, key=times.__getitem__)
        name = "backward" if backward else "forward"
        chosen[name], seconds[name] = list(best), times[best]
        listed = ", ".join(f"{q} x {k} {1e3 * t:.3f} ms" for (q, k), t in sorted(times.items(), key=lambda x: x[1]))
        print(f"  {name}: {listed}", flush=True)
    return {**chosen, "seconds": seconds}


def _through(kernel: Any, shape: cases.Shape, sizes: fused.Sizes) -> Callable[..., jax.Array]:
    both = sequence(shape.length)
    options = dict(
        mask=cases.mask_of(shape), q_tokens=both, k_tokens=both, scale=shape.width**-0.5, soft_cap=0.0, sinks=None,
        bias=None, score_mod=None, score_arrays=(), dropout=0.0, dropout_seed=0, blocks=sizes,
    )  # fmt: skip
    return lambda q, k, v: fused.attention(kernel, q, k, v, **options)[0]


def main() -> None:
    """Parses the command line and searches."""
    here = [
        n for n, one in IMPLEMENTATIONS.items() if one.kernel and default_platform() in one.platforms and n != "cudnn"
    ]
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--implementations", default=",".join(here))
    parser.add_argument("--shapes", default="t4k,t16k,d64,gqa4k,mla4k")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    if not options.implementations:
        raise SystemExit(f"error: no attention kernel runs on {default_platform()}; there is nothing to tune")
    for name, text in itertools.product(options.implementations.split(","), options.shapes.split(",")):
        shape, kernel = cases.ATTENTION.shapes[text], importlib.import_module(f"kernels.attention.{name}")
        print(f"{name} {text} on {device_kind()}", flush=True)
        candidates = CANDIDATES[default_platform()]
        try:
            result = search(
                kernel, shape, options.dtype, candidates, lambda found: timing.interleaved(found, options.rounds, 0.01)
            )
        except (ValueError, NotImplementedError) as reason:
            print(f"  {reason}", flush=True)
            continue
        q, k, v = (
            jax.ShapeDtypeStruct(x.shape, x.dtype) for x in cases.ATTENTION.inputs(shape, jnp.dtype(options.dtype))
        )
        seconds = result.pop("seconds")
        entry = {"settings": result, "seconds": seconds, "versions": describe("jax", "jaxlib")["versions"]}
        file = tuning.record(device_kind(), "attention", name, fused.tuning_case(q, k, v), entry)
        print(f"  wrote {os.path.relpath(file)}", flush=True)


if __name__ == "__main__":
    main()
