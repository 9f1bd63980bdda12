"""Compiles every TPU kernel, and one sharded training step, for TPUs that are not there, and records what they cost.

    make tpu-compile                                       v5e, v5p and v6e, everything
    python benchmarks/tpu_compile.py --chips=v5e --ops=attention --shapes=t4k

Needs the package libtpu, no TPU. What a row holds: FLOPs and bytes as XLA counts them (custom calls are counted by what
kernels declare), bytes of VMEM that the kernels take, temporary HBM, seconds of compilation, and for the training step
the collectives of one device. A case that does not compile is a row with its error, and the exit code says so.
Results go to benchmarks/results/tpu_compile.json.
"""

import argparse
import os
import pathlib
import re
import sys
import time

os.environ["TPU_SKIP_MDS_QUERY"] = "1"
os.environ["ALLOW_MULTIPLE_LIBTPU_LOAD"] = "1"  # There is no chip that two processes could fight for.
os.environ["JAX_PLATFORMS"] = "cpu"
ROOT = pathlib.Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
from jax.experimental import topologies  # noqa: E402
from jax.sharding import SingleDeviceSharding  # noqa: E402
from kernel_bench import cases  # noqa: E402
from machine import describe, write  # noqa: E402

from kernels.platform import compiling_for  # noqa: E402

CHIPS = {"v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2"}
SHAPES = {
    "attention": ("t4k", "t16k", "gqa4k", "d64", "mla4k", "window16k", "blocks10"),
    "decode": ("gqa32k", "gqa32k_paged", "mla32k", "tpla32k_h64"),
    "latent_decode": ("mla32k", "mla32k_paged", "tpla32k_h64"),
    "lightning": ("t2k", "t16k", "t128k"),
}
_VMEM = re.compile(r'"used_scoped_memory_configs":\[\{"memory_space":"1","offset":"\d+","size":"(\d+)"')


def compiled(function, arguments) -> dict:
    """Compiles and describes; `arguments` are shapes with shardings on the devices compiled for."""
    begun = time.perf_counter()
    program = jax.jit(function).lower(*arguments).compile()
    return described(program) | {"seconds": round(time.perf_counter() - begun, 2)}


def described(program) -> dict:
    """FLOPs, bytes and memory of one device's program."""
    cost, memory, text = program.cost_analysis(), program.memory_analysis(), program.as_text()
    sizes = [int(size) for line in text.splitlines() if "tpu_custom_call" in line for size in _VMEM.findall(line)]
    return {
        "flops": cost.get("flops"),
        "bytes": cost.get("bytes accessed"),
        "vmem_bytes": max(sizes, default=0),
        "temporary_bytes": memory.temp_size_in_bytes,
        "kernels": text.count('custom_call_target="tpu_custom_call"'),
    }


def kernel(op_name: str, name: str, backward: bool, device) -> dict:
    """One kernel at one shape, bfloat16."""
    op = cases.OPS[op_name]
    shape = op.shapes[name]
    place = SingleDeviceSharding(device)
    arrays = jax.eval_shape(lambda: op.inputs(shape, jnp.bfloat16))
    arrays = [jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place) for x in arrays]
    run = op.run(shape, "pallas_tpu")
    if not backward:
        return compiled(run, arrays)
    d_out = jax.eval_shape(run, *arrays)
    d_out = jax.ShapeDtypeStruct(d_out.shape, d_out.dtype, sharding=place)

    def gradients(d_out, *arrays):
        out, pull = jax.vjp(run, *arrays)
        return out, pull(d_out)

    return compiled(gradients, [d_out, *arrays])


def training_step(devices) -> dict:
    """A step of the base language model on four chips, parameters in pieces over two and heads over two."""
    from configs import lm
    from data.tokenizers import ByteTokenizer
    from sharding.collectives import collectives, summary
    from sharding.layout import build
    from training import setup

    config = lm.get_config("attention=gqa,size=base")
    config.data.batch_size = 16
    config.sharding.preset, config.sharding.data, config.sharding.model = "fsdp_tp", 2, 2
    tokenizer, layout = ByteTokenizer(), build(config.sharding, devices)
    training = setup.build(config, setup.network(config, tokenizer), layout, tokenizer)
    size, place = (config.data.batch_size, config.data.length), layout.batch_sharding(config.data.batch_size)
    kinds = dict(inputs=jnp.int32, targets=jnp.int32, segment=jnp.int32, position=jnp.int32, weight=jnp.float32)
    batch = {name: jax.ShapeDtypeStruct(size, kind, sharding=place) for name, kind in kinds.items()}
    begun = time.perf_counter()
    program = training.step.lower(training.abstract, batch).compile()
    found = summary(collectives(program, layout.mesh))
    return described(program) | {
        "seconds": round(time.perf_counter() - begun, 2),
        "state_bytes_per_device": setup.bytes_per_device(training.abstract),
        "collectives": [
            {"name": name, "axes": axes, "runs": runs, "bytes": sent} for (name, axes), (runs, sent) in found.items()
        ],
    }


def jobs(ops: list[str], shapes: list[str]) -> list[tuple[str, str, str]]:
    """What is compiled: op, shape, direction."""
    found = []
    for op in ops:
        if op == "training":
            found.append((op, "lm base, fsdp 2 x tensor 2", "step"))
            continue
        directions = ("forward", "forward+gradient") if cases.OPS[op].differentiable else ("forward",)
        found += [(op, name, direction) for name in shapes or SHAPES[op] for direction in directions]
    return found


def run(op: str, name: str, direction: str, devices) -> dict:
    """One of them, compiled."""
    return training_step(devices) if op == "training" else kernel(op, name, direction != "forward", devices[0])


def main() -> int:
    """Parses the command line, compiles, and returns the number of cases that failed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--chips", default=",".join(CHIPS))
    parser.add_argument("--ops", default=",".join([*SHAPES, "training"]))
    parser.add_argument("--shapes", default="")
    parser.add_argument("--output", type=pathlib.Path, default=ROOT / "benchmarks/results/tpu_compile.json")
    options = parser.parse_args()
    results = describe("jax", "jaxlib", "libtpu") | {"rows": []}
    results["device"] = "none: compiled ahead of time"
    failures = 0
    for chip in options.chips.split(","):
        devices = topologies.get_topology_desc(CHIPS[chip], platform="tpu").devices
        for op, name, direction in jobs(options.ops.split(","), options.shapes.split(",") if options.shapes else []):
            row = {"chip": chip, "kind": devices[0].device_kind, "op": op, "shape": name, "direction": direction}
            try:
                with compiling_for("tpu", devices[0].device_kind):
                    row |= run(op, name, direction, devices)
            except Exception as error:  # What does not compile is what this is for.
                failures += 1
                row["error"] = f"{type(error).__name__}: {str(error)[:500]}"
            results["rows"].append(row)
            write(results, options.output)
            vmem = f"{row['vmem_bytes'] / 2**20:6.1f} MiB of VMEM" if "error" not in row else row["error"][:150]
            print(f"{chip} {op:13s} {name:27s} {direction:17s} {row.get('seconds', ''):>6} s  {vmem}", flush=True)
    return failures


if __name__ == "__main__":
    sys.exit(main() > 0)
