"""What slicing the latent saves a device in decoding: MLA's cache whole against TPLA's half, at 32K tokens.

    python benchmarks/tpla_decode.py                          about five minutes on two cores; imports only kernels/
    python benchmarks/tpla_decode.py --dtypes=bfloat16 --batch=32 --rounds=9          on a GPU

Two devices share a model. With MLA each has half the heads and all 512 + 64 channels of the latent; with TPLA all the
heads and 256 + 64: the same products but for the rotated key, and 1 / 1.8 of the bytes. So TPLA gains where memory is
what decides, and next to nothing where products do. Beside each ratio stands what a roofline of this device predicts,
from a matrix product and a copy timed here; and the ratio at equal head counts, which is what a device saves for one
slice. The runs alternate, and the median of the rounds' ratios counts. Results: benchmarks/results/tpla_decode_*.json.
"""

import argparse
import pathlib
import statistics
import sys

ROOT = pathlib.Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]
#: Model, heads of MLA on one of two devices; TPLA has twice as many.
SHAPES = {"DeepSeek-V2 and V3": 64, "Kimi-K2": 32, "DeepSeek-V2-Lite": 8}
MLA, TPLA = (576, 512), (320, 256)  # Key and value widths.


def rival(name: str, heads: int, widths: tuple[int, int], batch: int, context: int, dtype: str, implementation):
    """A decoding step of one layer's attention, ready to be timed."""
    import jax
    import jax.numpy as jnp
    from kernel_bench.rivals import Rival

    from kernels.decode import decode_attention

    key, value = widths
    keys = jax.random.split(jax.random.key(0), 2)
    q = jax.random.normal(keys[0], (batch, 1, heads, key), dtype)
    rows = jax.random.normal(keys[1], (batch, context, 1, key), dtype)
    lengths = jnp.full((batch,), context, jnp.int32)

    def run(q, rows):
        options = dict(value_width=value, scale=192**-0.5, implementation=implementation)
        return decode_attention(q, rows, None, lengths, **options)[0]

    compiled = jax.jit(run).lower(q, rows).compile()
    return Rival(name, lambda: compiled(q, rows), jax.block_until_ready, list)


def predicted(heads: int, widths: tuple[int, int], batch: int, context: int, itemsize: int, peaks: dict) -> float:
    """Seconds by the roofline."""
    from kernels.decode import cost

    q = (batch, 1, heads, widths[0])
    live, seen = cost.pairs([context] * batch), cost.keys([context] * batch)
    operations = cost.flops(q, widths[1], live) / peaks["flops_per_second"]
    moved = cost.bytes(q, 1, widths[1], seen, itemsize=itemsize, shared=True) / peaks["bytes_per_second"]
    return max(operations, moved)


def main() -> None:
    import jax
    import jax.numpy as jnp
    from kernel_bench.timing import interleaved, peaks
    from machine import describe, write

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--context", type=int, default=32768)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--dtypes", default="float32,bfloat16")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--implementation", default=None)
    parser.add_argument("--output", type=pathlib.Path, default=None)
    options = parser.parse_args()
    kind = jax.devices()[0].device_kind
    results = describe("jax", "jaxlib", "numpy") | {"accelerator": kind, "context": options.context}
    results |= {"batch": options.batch, "cases": []}
    print(f"{kind}, {options.context} tokens of context, batch {options.batch}; {results['versions']}")
    for dtype in options.dtypes.split(","):
        best, itemsize = peaks(dtype), jnp.dtype(dtype).itemsize
        print(f"{dtype}: {best['flops_per_second'] / 1e9:.0f} GFLOP/s, {best['bytes_per_second'] / 1e9:.1f} GB/s here")
        print(f"{'':20}{'heads':>12}{'MLA, ms':>10}{'TPLA, ms':>10}{'MLA / TPLA':>12}{'predicted':>11}")
        for model, heads in SHAPES.items():
            for kindred, tpla_heads in (("two devices", 2 * heads), ("equal heads", heads)):
                size = (options.batch, options.context)
                pair = [
                    rival("mla", heads, MLA, *size, dtype, options.implementation),
                    rival("tpla", tpla_heads, TPLA, *size, dtype, options.implementation),
                ]
                interleaved(pair, options.rounds, least=0.2)
                ratios = [a / b for a, b in zip(pair[0].seconds, pair[1].seconds, strict=True)]
                expected = [
                    predicted(h, widths, *size, itemsize, best) for h, widths in ((heads, MLA), (tpla_heads, TPLA))
                ]
                row = {
                    "model": model, "dtype": dtype, "what": kindred, "heads": [heads, tpla_heads],
                    "milliseconds": [1e3 * statistics.median(one.seconds) for one in pair],
                    "ratio": statistics.median(ratios), "ratios": sorted(ratios),
                    "predicted_ratio": expected[0] / expected[1],
                    "predicted_milliseconds": [1e3 * seconds for seconds in expected],
                }  # fmt: skip
                results["cases"].append({**row, "peaks": best})
                cells = "".join(f"{ms:10.2f}" for ms in row["milliseconds"])
                cells += f"{row['ratio']:12.2f}{row['predicted_ratio']:11.2f}"
                print(f"{model:20}{f'{heads} / {tpla_heads}':>12}{cells}", flush=True)
    where = "cpu" if jax.default_backend() == "cpu" else kind.lower().replace(" ", "-")
    write(results, options.output or ROOT / f"benchmarks/results/tpla_decode_{where}.json")


if __name__ == "__main__":
    main()
