"""Is lightning attention's speed constant in length? Tokens per second and temporary memory from 1K to 128K tokens.

    python benchmarks/lightning_cpu.py                         about seven minutes on two cores
    python benchmarks/lightning_cpu.py --longest=16384 --rounds=9

One row of 8 heads of width 64, alibi decay, whole chunks and packed documents. Lengths alternate within each round
and the best round counts, since the machines this runs on drift. Wanted: forward within 10% and forward with gradient
within 20% between the slowest and the fastest length, and memory in proportion to length. Memory comes in huge pages
(the program starts itself again with GLIBC_TUNABLES set). Results go to benchmarks/results/lightning_cpu.json.
"""

import argparse
import pathlib
import sys
import time

ROOT = pathlib.Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]
WANTED = {"forward": 0.10, "gradient": 0.20}


def programs(length: int, dtype: str, packed_rows: bool) -> tuple[tuple, dict]:
    """Inputs, and the compiled forward pass and forward with gradient."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from kernels.lightning import decay_rates, lightning_attention
    from kernels.tokens import packed

    rng = np.random.default_rng(0)
    q, k, v = (jnp.asarray(rng.normal(size=(1, length, 8, 64)), dtype) for _ in range(3))
    tokens = packed(jnp.asarray(np.arange(length)[None] // 700 + 1)) if packed_rows else None
    rates = decay_rates(8, 0, 8)

    def forward(q, k, v):
        return lightning_attention(q, k, v, rates, tokens=tokens)

    def loss(q, k, v):
        return jnp.sum(forward(q, k, v)[0].astype(jnp.float32) ** 2)

    functions = {"forward": forward, "gradient": jax.value_and_grad(loss, argnums=(0, 1, 2))}
    return (q, k, v), {name: jax.jit(f).lower(q, k, v).compile() for name, f in functions.items()}


def measure(lengths: list[int], dtype: str, packed_rows: bool, rounds: int) -> dict:
    """Best tokens per second and temporary bytes per length, and the spread over lengths."""
    import jax

    made = {length: programs(length, dtype, packed_rows) for length in lengths}
    best = {name: dict.fromkeys(lengths, float("inf")) for name in WANTED}
    for _ in range(rounds):
        for length, (inputs, compiled) in made.items():
            for name, program in compiled.items():
                # The other lengths' memory has gone back to the system: what it takes to get it again is not timed.
                jax.block_until_ready(program(*inputs))
                for _ in range(1 + 32768 // length):
                    begin = time.perf_counter()
                    jax.block_until_ready(program(*inputs))
                    best[name][length] = min(best[name][length], time.perf_counter() - begin)
    rates = {name: {length: length / seconds for length, seconds in times.items()} for name, times in best.items()}
    memory = {
        name: {length: made[length][1][name].memory_analysis().temp_size_in_bytes for length in lengths}
        for name in WANTED
    }
    spread = {name: max(rates[name].values()) / min(rates[name].values()) - 1 for name in WANTED}
    return {"tokens_per_second": rates, "temporary_bytes": memory, "spread": spread}


def main() -> None:
    from machine import describe, with_huge_pages, write

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--longest", type=int, default=131072)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--dtypes", default="float32,bfloat16")
    parser.add_argument("--output", type=pathlib.Path, default=ROOT / "benchmarks/results/lightning_cpu.json")
    options = parser.parse_args()
    with_huge_pages()
    lengths = [1024 * 2**i for i in range(20) if 1024 * 2**i <= options.longest]
    results = describe("jax", "jaxlib", "numpy")
    print(f"{results['device']}; {results['versions']}")
    print(f"{'':30}" + "".join(f"{length // 1024:>9}K" for length in lengths) + "   spread")
    for dtype in options.dtypes.split(","):
        for packed_rows in (False, True):
            case = f"{dtype}, packed" if packed_rows else dtype
            found = results[case] = measure(lengths, dtype, packed_rows, options.rounds)
            for name, rates in found["tokens_per_second"].items():
                cells = "".join(f"{rate:10.0f}" for rate in rates.values())
                verdict = "ok" if found["spread"][name] <= WANTED[name] else f"above {WANTED[name]:.0%}"
                print(f"{case + ', ' + name:30}{cells}   {found['spread'][name]:.1%} {verdict}", flush=True)
            per_token = found["temporary_bytes"]["gradient"][lengths[-1]] / lengths[-1]
            print(f"{'  temporaries of the gradient':30}{per_token:10.0f} bytes per token (a state: {8 * 64 * 64 * 4})")
    write(results, options.output)


if __name__ == "__main__":
    main()
