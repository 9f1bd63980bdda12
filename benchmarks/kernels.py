"""Every implementation of the attention, decode and lightning ops that can run here, against other libraries' kernels.

    python benchmarks/kernels.py                                                what is usual on this device
    python benchmarks/kernels.py --ops=attention --shapes=t4k,t8k --implementations=mosaic_gpu,"jax.nn cudnn"
    python benchmarks/kernels.py --ops=attention --shapes=2,8192,16,4,128 --dtype=float16 --directions=forward

Needs jax, numpy and jaxtyping; matplotlib for the picture. Other libraries take part where they are installed. Rivals
are checked against the reference in the same process, then timed in turns (A B A B ...); a wrong one is not timed.
`share_of_roofline` is the least time that the case's FLOPs and bytes take at the rates of a matrix product and a copy,
measured first on this device, over the time found. Results are written after every row, as JSON, then as a picture.
"""

import argparse
import importlib.util
import os
import pathlib
import sys

ROOT = pathlib.Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
from kernel_bench import cases, picture, rivals, timing  # noqa: E402
from machine import describe, with_huge_pages, write  # noqa: E402

from kernels.tolerance import relative_error, tolerance  # noqa: E402


def shape_of(op: str, text: str) -> cases.Shape:
    """A named shape of the op, or batch,length,heads,kv_heads,width[,value_width][:pattern]."""
    known = cases.OPS[op].shapes
    if text in known:
        return known[text]
    sizes, _, pattern = text.partition(":")
    try:
        shape = cases.Shape(*map(int, sizes.split(",")), pattern=pattern or "causal")
        cases.mask_of(shape)
    except (TypeError, ValueError) as error:
        raise SystemExit(
            f"error: shape {text!r} of {op}: {error}; known: {', '.join(known)}, or "
            "batch,length,heads,kv_heads,width[,value_width][:pattern]"
        ) from None
    return shape


def measure(op_name: str, name: str, shape: cases.Shape, wanted: list[str], backward: bool, options) -> dict:
    """One row: all rivals of one op, shape and direction."""
    op = cases.OPS[op_name]
    arrays = op.inputs(shape, options.dtype)
    right = rivals.exact(op_name, op, shape, arrays, backward) if options.check else None
    contenders, refused = [], {}
    for rival_name in wanted:
        try:
            rival = rivals.make(op_name, op, shape, arrays, rival_name, backward)
            if right is not None:
                rival.error = max(relative_error(a, b) for a, b in zip(rival.result(), right, strict=True))
                limit = tolerance(options.dtype).gradient if backward else tolerance(options.dtype).out
                if not rival.error <= 2 * limit:
                    raise rivals.Refused(f"wrong: relative error {rival.error:.1e}, at most {2 * limit:.1e} allowed")
            contenders.append(rival)
        except rivals.Refused as reason:
            refused[rival_name] = str(reason)
    timing.interleaved(contenders, options.rounds, 0.02 if jax.default_backend() != "cpu" else 0.0)
    itemsize = jnp.dtype(options.dtype).itemsize
    flops = op.flops(shape, False) + (op.flops(shape, True) if backward else 0)
    moved = op.bytes(shape, itemsize, False) + (op.bytes(shape, itemsize, True) if backward else 0)
    least = max(flops / options.peaks["flops_per_second"], moved / options.peaks["bytes_per_second"])
    row = {
        "op": op_name,
        "shape": name,
        "sizes": vars(shape) | {"mask": repr(cases.mask_of(shape))},
        "direction": "forward+gradient" if backward else "forward",
        "flops": flops,
        "bytes": moved,
        "least_seconds": least,
        "rivals": {},
        "refused": refused,
    }
    for rival in contenders:
        low, middle, high = np.quantile(rival.seconds, (0.25, 0.5, 0.75))
        row["rivals"][rival.name] = {
            "median": middle,
            "lower_quartile": low,
            "upper_quartile": high,
            "tflops": flops / middle / 1e12,
            "gigabytes_per_second": moved / middle / 1e9,
            "share_of_roofline": least / middle,
            "relative_error": rival.error,
            "temporary_bytes": rival.temporary,
        }
    show(row)
    return row


def show(row: dict) -> None:
    """The row, for people."""
    print(f"\n{row['op']} {row['shape']} {row['direction']}: {row['flops']:.3g} FLOP, {row['bytes']:.3g} bytes")
    for name, found in row["rivals"].items():
        spread = f"{1e3 * found['lower_quartile']:.3f} to {1e3 * found['upper_quartile']:.3f}"
        error = "" if found["relative_error"] is None else f"  error {found['relative_error']:.1e}"
        print(
            f"  {name:14s} {1e3 * found['median']:10.3f} ms ({spread})  {found['tflops']:8.3f} TFLOP/s "
            f"{found['gigabytes_per_second']:8.1f} GB/s  {100 * found['share_of_roofline']:5.1f}%{error}",
            flush=True,
        )
    for name, reason in row["refused"].items():
        print(f"  {name:14s} {reason}", flush=True)


def main() -> None:
    """Parses the command line and measures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ops", default=",".join(cases.OPS))
    parser.add_argument("--implementations", default="", help="names of ours and of others; all by default")
    parser.add_argument("--shapes", default="", help="names, or batch,length,heads,kv_heads,width; several by ;")
    parser.add_argument("--directions", default="forward,forward+gradient")
    parser.add_argument("--dtype", default="float32" if jax.default_backend() == "cpu" else "bfloat16")
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--check", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--output", type=pathlib.Path, default=None)
    options = parser.parse_args()
    platform = jax.default_backend()
    if platform == "cpu":
        with_huge_pages()
    device = jax.devices()[0].device_kind
    output = options.output or ROOT / f"benchmarks/results/kernels_{device.lower().replace(' ', '_')}.json"
    options.peaks = timing.peaks(options.dtype)
    results = describe("jax", "jaxlib", "numpy") | {"dtype": options.dtype, "peaks": options.peaks, "rows": []}
    if platform != "cpu":
        results["device"] = device
    print(f"{results['device']}; {results['versions']}")
    print("at best {flops_per_second:.3g} FLOP/s, {bytes_per_second:.3g} bytes/s".format(**options.peaks))
    for op in options.ops.split(","):
        if op not in cases.OPS:
            raise SystemExit(f"error: unknown op {op!r}: known: {', '.join(cases.OPS)}")
        every = [*rivals.OURS[op], *rivals.THEIRS[op]]
        wanted = options.implementations.split(",") if options.implementations else every
        if unknown := [
            name for name in wanted if not any(name in (*rivals.OURS[o], *rivals.THEIRS[o]) for o in cases.OPS)
        ]:
            raise SystemExit(f"error: unknown implementation {unknown[0]!r}: known for {op}: {', '.join(every)}")
        separator = ";" if ";" in options.shapes or any(c.isdigit() for c in options.shapes.split(",")[0][:1]) else ","
        names = options.shapes.split(separator) if options.shapes else cases.USUAL[platform][op]
        for name in names:
            shape = shape_of(op, name)
            for direction in options.directions.split(","):
                if direction == "forward" or cases.OPS[op].differentiable:
                    row = measure(op, name, shape, [n for n in wanted if n in every], direction != "forward", options)
                    results["rows"].append(row)
                    write(results, output)
    print(f"\nwrote {os.path.relpath(output)}")
    if importlib.util.find_spec("matplotlib"):
        picture.draw(results, output.with_suffix(".png"))
        print(f"wrote {os.path.relpath(output.with_suffix('.png'))}")


if __name__ == "__main__":
    main()
