"""Is loading a pretrained folder limited by reading it? Seconds against a plain read of its bytes, and peak memory.

    python benchmarks/pretrained_loading.py                     a random Llama of 1 GB in bfloat16, four shards
    python benchmarks/pretrained_loading.py --layers=2 --rounds=9

Both find the files in the page cache. A plain read takes every file whole into fresh memory (`read_bytes`, one file
after the other). Loads and reads alternate within each round, and medians and best rounds are kept, since the machines
this runs on drift. Memory is what the peak of a process of its own grows by. Wanted: time within 1.5 times the read,
and memory within the parameters and 1.3 times the largest file. Results go to
benchmarks/results/pretrained_loading.json.
"""

import argparse
import json
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time

ROOT = pathlib.Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]
WIDTH, HIDDEN, HEADS, KV_HEADS, VOCABULARY = 2048, 5632, 32, 4, 32000  # TinyLlama's.


def folder(path: pathlib.Path, layers: int, shards: int, dtype: str) -> pathlib.Path:
    """Writes the checkpoint; layers lie one after the other in the files."""
    import ml_dtypes
    import numpy as np
    from safetensors.numpy import save_file

    kv = WIDTH * KV_HEADS // HEADS
    shapes = {"model.embed_tokens.weight": (VOCABULARY, WIDTH), "model.norm.weight": (WIDTH,)}
    for layer in range(layers):
        block = {
            "input_layernorm": (WIDTH,), "post_attention_layernorm": (WIDTH,), "self_attn.q_proj": (WIDTH, WIDTH),
            "self_attn.k_proj": (kv, WIDTH), "self_attn.v_proj": (kv, WIDTH), "self_attn.o_proj": (WIDTH, WIDTH),
            "mlp.gate_proj": (HIDDEN, WIDTH), "mlp.up_proj": (HIDDEN, WIDTH), "mlp.down_proj": (WIDTH, HIDDEN),
        }  # fmt: skip
        shapes |= {f"model.layers.{layer}.{name}.weight": shape for name, shape in block.items()}
    config = {
        "model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": VOCABULARY, "hidden_size": WIDTH,
        "intermediate_size": HIDDEN, "num_hidden_layers": layers, "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS, "max_position_embeddings": 2048, "tie_word_embeddings": True,
    }  # fmt: skip
    path.mkdir(parents=True)
    (path / "config.json").write_text(json.dumps(config))
    names, index, rng = list(shapes), {}, np.random.default_rng(0)
    bits, kind = (np.uint16, ml_dtypes.bfloat16) if dtype == "bfloat16" else (np.uint32, np.float32)
    for number in range(shards):
        file = f"model-{number + 1:05}-of-{shards:05}.safetensors"
        held = names[number * len(names) // shards : (number + 1) * len(names) // shards]
        made = {name: rng.integers(0, np.iinfo(bits).max, shapes[name], bits).view(kind) for name in held}
        save_file(made, path / file)
        index |= dict.fromkeys(held, file)
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    return path


def plain(path: pathlib.Path) -> float:
    """Seconds to read every file."""
    begin = time.perf_counter()
    kept = [file.read_bytes() for file in sorted(path.glob("*.safetensors"))]
    seconds = time.perf_counter() - begin
    del kept
    return seconds


def load(path: pathlib.Path) -> float:
    """Seconds to a network that can be used."""
    import jax
    from flax import nnx

    from models import load_pretrained

    begin = time.perf_counter()
    loaded = load_pretrained(path)
    jax.block_until_ready(nnx.state(loaded.model))
    return time.perf_counter() - begin


def peak(path: pathlib.Path) -> int:
    """Bytes that the peak of a process of its own grows by while it loads."""
    program = (
        "import sys, jax, jax.numpy as jnp\n"
        "import models\n"
        "jnp.zeros(8).block_until_ready()\n"
        "def size(name):\n"
        "    line = next(line for line in open('/proc/self/status') if line.startswith(name))\n"
        "    return int(line.split()[1])\n"
        "open('/proc/self/clear_refs', 'w').write('5')\n"  # Forgets the peak so far, which is the parent's own.
        "before = size('VmRSS')\n"
        "loaded = models.load_pretrained(sys.argv[1])\n"
        "jax.block_until_ready(jax.tree.leaves(loaded.model))\n"
        "print(size('VmHWM') - before)\n"
    )
    done = subprocess.run([sys.executable, "-c", program, str(path)], cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr)
    return 1024 * int(done.stdout)


def main() -> None:
    """Measures, prints, writes."""
    import machine

    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("--layers", type=int, default=10)
    flags.add_argument("--shards", type=int, default=4)
    flags.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"))
    flags.add_argument("--rounds", type=int, default=7)
    flags.add_argument("--folder", default="", help="a folder of one's own in place of the random one")
    options = flags.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        path = pathlib.Path(options.folder or folder(pathlib.Path(scratch, "model"), options.layers, options.shards,
                                                     options.dtype))  # fmt: skip
        sizes = [file.stat().st_size for file in path.glob("*.safetensors")]
        plain(path), load(path)
        reads, loads = zip(*((plain(path), load(path)) for _ in range(options.rounds)), strict=True)
        grown = peak(path)
    results = machine.describe("jax", "jaxlib", "flax", "numpy", "safetensors") | {
        "bytes": sum(sizes),
        "largest_file": max(sizes),
        "seconds": {
            name: {"median": statistics.median(times), "best": min(times)}
            for name, times in (("read", reads), ("load", loads))
        },
        "ratio": {"median": statistics.median(loads) / statistics.median(reads), "best": min(loads) / min(reads)},
        "peak_growth": grown,
        "allowed": int(sum(sizes) + 1.3 * max(sizes)),
    }
    print(json.dumps(results, indent=1))
    machine.write(results, ROOT / "benchmarks" / "results" / "pretrained_loading.json")


if __name__ == "__main__":
    main()
