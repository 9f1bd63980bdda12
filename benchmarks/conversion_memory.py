"""What converting a network takes beside the network itself: the peak of resident memory, against one layer's weights.

    python benchmarks/conversion_memory.py                   a quarter of the width of a 1B model
    python benchmarks/conversion_memory.py --scale=1         the shape of Llama 3.2 1B, random weights

Only Linux says how much memory a process holds (/proc/self/status). Counted is the most that is held at once, beyond
what was held before (the original network) and beyond the new network's own arrays. The allocator is told to give freed
memory back at once; otherwise what it keeps from making the network would hide what converting needs, or add to it.
"""

import argparse
import ctypes
import gc
import os
import pathlib
import sys
import threading
import time

import jax
import numpy as np
from flax import nnx

ROOT = pathlib.Path(__file__).parents[1]
sys.path[:0] = [str(ROOT)]

import models  # noqa: E402
from configs import attention, base  # noqa: E402
from models.conversion import convert_to_mha_latent, convert_to_transmla  # noqa: E402


def config(scale: float, dtype: str):
    """The shape of Llama 3.2 1B with widths times `scale` (16 layers, 32 query and 8 key/value heads)."""
    made = base.get_config().model
    made.width, made.depth, made.max_length = int(2048 * scale), 16, 1024
    made.mlp.width, made.vocab_size, made.param_dtype, made.compute_dtype = int(8192 * scale), 8192, dtype, dtype
    made.attention = attention.get("gqa")
    made.attention.heads, made.attention.kv_heads, made.attention.head_dim = 32, 8, int(64 * scale)
    return made


def resident() -> float:
    """MiB that this process holds."""
    lines = pathlib.Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmRSS")) / 1024


class Peak:
    """The most that is held while it is open, looked at every 20 ms."""

    def __enter__(self) -> "Peak":
        self.most, self._open = resident(), True
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def _watch(self) -> None:
        while self._open:
            self.most = max(self.most, resident())
            time.sleep(0.02)

    def __exit__(self, *_: object) -> None:
        self._open = False
        self._thread.join()


def size(state) -> float:
    """MiB of arrays."""
    return sum(leaf.nbytes for leaf in jax.tree.leaves(state)) / 2**20


def main() -> None:
    """Builds a network, converts it, and prints what was held."""
    if "MALLOC_MMAP_THRESHOLD_" not in os.environ:  # glibc reads it when a process starts.
        os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | {"MALLOC_MMAP_THRESHOLD_": "1048576"})
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("--scale", type=float, default=0.25)
    flags.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    flags.add_argument("--rows", type=int, default=8, help="of 256 tokens each, for calibration")
    flags.add_argument("--kv_lora_rank", type=int, default=0, help="0: half of what the cache has")
    flags.add_argument("--to", default="transmla", choices=("transmla", "mha_latent"))
    options = flags.parse_args()
    wanted = config(options.scale, options.dtype)
    model = jax.block_until_ready(models.build(wanted, vocab_size=8192, rngs=nnx.Rngs(0)))
    ids = np.random.default_rng(0).integers(0, 8192, (options.rows, 256)).astype(np.int32)
    heads = wanted.attention
    rank = options.kv_lora_rank or heads.kv_heads * heads.head_dim
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    before, layer = resident(), size(nnx.state(model.stacks[0])) / wanted.depth
    began = time.perf_counter()
    with Peak() as peak:
        if options.to == "transmla":
            made = convert_to_transmla(
                model, wanted, kv_lora_rank=rank, qk_mqa_dim=heads.head_dim, freqfold=1, calibration_ids=ids
            )
        else:
            made = convert_to_mha_latent(model, wanted)
    owned = {id(leaf) for leaf in jax.tree.leaves(nnx.state(model))}
    new = sum(leaf.nbytes for leaf in jax.tree.leaves(nnx.state(made.model)) if id(leaf) not in owned) / 2**20
    beyond = peak.most - before - new
    print(f"network {size(nnx.state(model)):,.0f} MiB, one layer {layer:,.0f} MiB, {options.dtype}, to {options.to}")
    print(f"new arrays of the converted network: {new:,.0f} MiB; hidden states of the calibration text: "
          f"{ids.size * wanted.width * np.dtype(options.dtype).itemsize / 2**20:,.0f} MiB")  # fmt: skip
    print(f"held before {before:,.0f} MiB, at most {peak.most:,.0f} MiB, {time.perf_counter() - began:,.0f} s")
    print(f"beyond both networks: {beyond:,.0f} MiB, {beyond / layer:.2f} layers")


if __name__ == "__main__":
    main()
