"""The dense layer on CPU: the form of kernels/linear against plain jnp, forward and backward, by shape and type.

    python benchmarks/linear_cpu.py                 about a minute on two cores

Rows are 4,096 tokens; shapes are those of the 6.8 million parameter model of train_step.py. The two forms alternate,
and the best of the rounds counts. Memory comes in huge pages (the program starts itself again with GLIBC_TUNABLES
set). Results go to benchmarks/results/linear_cpu.json.
"""

import argparse
import pathlib
import sys
import time

ROOT = pathlib.Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]
SHAPES = ((256, 256), (256, 1024), (1024, 256), (256, 2048))


def main() -> None:
    from machine import describe, with_huge_pages, write

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=4096)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--output", type=pathlib.Path, default=ROOT / "benchmarks/results/linear_cpu.json")
    options = parser.parse_args()
    with_huge_pages()
    import jax
    import jax.numpy as jnp
    import numpy as np

    from kernels.linear import cost, linear

    results = describe("jax", "jaxlib", "numpy")
    print(f"{results['device']}; {results['versions']}; GFLOP/s, kernels/linear (plain jnp)")
    print(f"{'':24}{'forward':>16}{'dx':>16}{'dw':>16}")
    rng = np.random.default_rng(0)
    for dtype in ("float32", "bfloat16"):
        for inputs, outputs in SHAPES:
            x, dy = (jnp.asarray(rng.normal(size=(options.rows, n)), dtype) for n in (inputs, outputs))
            w = jnp.asarray(rng.normal(size=(inputs, outputs)), jnp.float32)

            def calls(implementation, x=x, w=w, dy=dy):
                def product(x, w):
                    return linear(x, w, implementation=implementation)

                parts = {
                    "forward": product,
                    "dx": lambda x, w: jax.vjp(lambda x: product(x, w), x)[1](dy),
                    "dw": lambda x, w: jax.vjp(lambda w: product(x, w), w)[1](dy),
                }
                return {name: jax.jit(part) for name, part in parts.items()}

            forms = {"cpu": calls("cpu"), "reference": calls("reference")}
            best = {(form, part): float("inf") for form in forms for part in forms[form]}
            for turn in range(options.rounds + 1):
                for form, parts in forms.items():
                    for part, call in parts.items():
                        begin = time.perf_counter()
                        jax.block_until_ready(call(x, w))
                        if turn:
                            best[form, part] = min(best[form, part], time.perf_counter() - begin)
            flops = cost.flops(options.rows, inputs, outputs)
            rates = {f"{part}, {form}": flops / seconds / 1e9 for (form, part), seconds in best.items()}
            results[f"{dtype} {inputs}x{outputs}"] = rates
            cells = "".join(
                f"{rates[f'{part}, cpu']:8.0f} ({rates[f'{part}, reference']:4.0f})" + " "
                for part in ("forward", "dx", "dw")
            )
            print(f"{dtype} {inputs}x{outputs}".ljust(24) + cells, flush=True)
    write(results, options.output)


if __name__ == "__main__":
    main()
