"""One training step of a 6.8 million parameter decoder: Tessera against the same model in torch eager, in one process.

    python benchmarks/train_step.py                    both types, seven rounds, about three minutes on two cores
    python benchmarks/train_step.py --rounds=15 --dtypes=bfloat16

Needs the torch-bench extra. Both sides: 8 layers of width 256, 8 heads of 32 with rotary positions, gelu MLP of 1,024,
RMS norms, 2,048 tokens in a tied table; 8 rows of 512 tokens; AdamW with weight decay and clipping by global norm;
float32 weights (bfloat16: products and activations only, under autocast in torch). Torch starts from Tessera's weights,
and the losses are compared before anything is timed. Tessera runs its own training step on packed batches, weights of
tokens and the search for numbers that are not finite included; torch runs the plain causal step, its projections to
q, k and v fused.

The machines this runs on drift by factors within minutes, so the two sides alternate in every round, each timed call
after an untimed one, and the ratio to trust is the paired one. Memory comes in huge pages on both sides (the program
starts itself again with GLIBC_TUNABLES set). Results go to benchmarks/results/train_step.json.
"""

import argparse
import os
import pathlib
import statistics
import sys
import time
import types
from collections.abc import Callable
from typing import Any

ROOT = pathlib.Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]
VOCABULARY, WIDTH, DEPTH, HEADS, HIDDEN = 2048, 256, 8, 8, 1024
RATE, DECAY, CLIP = 1e-3, 0.1, 1.0


def tessera(dtype: str, rows: int, length: int, batch: dict[str, Any]) -> tuple[Callable[[], float], dict[str, Any]]:
    """A function that takes one step and returns the loss before it, and the weights it starts from."""
    import jax
    import numpy as np

    import sharding
    from configs import attention, base
    from training import setup

    config = base.get_config()
    config.model.attention = attention.get("mha")
    config.model.update({"width": WIDTH, "depth": DEPTH, "max_length": length, "compute_dtype": dtype})
    config.model.mlp.update({"kind": "gelu", "width": HIDDEN})
    config.data.update({"length": length, "batch_size": rows})
    config.optimizer.update({"learning_rate": RATE, "weight_decay": DECAY, "schedule": "constant", "warmup_steps": 0})
    tokenizer = types.SimpleNamespace(vocab_size=VOCABULARY)
    layout = sharding.build(config.sharding)
    training = setup.build(config, setup.network(config, tokenizer), layout, tokenizer)
    state = training.init(jax.random.key(0))
    weights = {name: np.asarray(value) for name, value in state.params.items()}
    placed = {name: jax.device_put(value) for name, value in batch.items()}

    def step() -> float:
        nonlocal state
        state, report = training.step(state, placed)
        jax.block_until_ready(state)
        return float(report.metrics["loss"])

    return step, weights


def torch_eager(dtype: str, weights: dict[str, Any], batch: dict[str, Any]) -> Callable[[], float]:
    """The same step in torch eager, from the same weights."""
    import torch
    import torch.nn.functional as F
    from torch import nn

    torch.manual_seed(0)
    rows, length = batch["inputs"].shape
    head = WIDTH // HEADS
    angles = torch.arange(length)[:, None] * 10000.0 ** (-torch.arange(0, head, 2) / head)
    cosine, sine = angles.cos(), angles.sin()

    def rotate(x: torch.Tensor) -> torch.Tensor:
        a, b = x.chunk(2, -1)
        cos, sin = cosine.to(x.dtype), sine.to(x.dtype)
        return torch.cat((a * cos - b * sin, b * cos + a * sin), -1)

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention_norm, self.mlp_norm = nn.RMSNorm(WIDTH, 1e-6), nn.RMSNorm(WIDTH, 1e-6)
            self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH, bias=False), nn.Linear(WIDTH, WIDTH, bias=False)
            self.up, self.down = nn.Linear(WIDTH, HIDDEN, bias=False), nn.Linear(HIDDEN, WIDTH, bias=False)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            q, k, v = self.qkv(self.attention_norm(x)).view(rows, length, 3, HEADS, head).permute(2, 0, 3, 1, 4)
            mixed = F.scaled_dot_product_attention(rotate(q), rotate(k), v, is_causal=True)
            x = x + self.out(mixed.transpose(1, 2).reshape(rows, length, WIDTH))
            return x + self.down(F.gelu(self.up(self.mlp_norm(x)), approximate="tanh"))

    class Decoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = nn.Embedding(VOCABULARY, WIDTH)
            self.blocks = nn.ModuleList(Block() for _ in range(DEPTH))
            self.norm = nn.RMSNorm(WIDTH, 1e-6)

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            x = self.embedding(ids)
            for block in self.blocks:
                x = block(x)
            return F.linear(self.norm(x), self.embedding.weight)

    model = Decoder()
    load(model, weights, torch)
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and "embedding" not in name]
    others = [p for name, p in model.named_parameters() if p.ndim != 2 or "embedding" in name]
    groups = [{"params": matrices, "weight_decay": DECAY}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=RATE, betas=(0.9, 0.95), eps=1e-8, fused=True)
    inputs, targets = (torch.from_numpy(batch[name]).long() for name in ("inputs", "targets"))

    def step() -> float:
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16"):
            logits = model(inputs)
        loss = F.cross_entropy(logits.float().view(-1, VOCABULARY), targets.view(-1))
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        return loss.item()

    return step


def load(model: Any, weights: dict[str, Any], torch: Any) -> None:
    """Tessera's arrays into the torch model; every one of them is used."""
    import numpy as np

    left = dict(weights)

    def take(name: str) -> Any:
        return left.pop(next(key for key in left if key.endswith(name)))

    def put(parameter: Any, array: Any) -> None:
        assert tuple(parameter.shape) == array.shape, (tuple(parameter.shape), array.shape)
        parameter.data.copy_(torch.from_numpy(np.array(array)))

    qkv = np.concatenate([take(f"attention.{name}.weight") for name in ("query", "key", "value")], -1)
    stacked = {"out": take("attention.out.weight"), "up": take("mlp.up.weight"), "down": take("mlp.down.weight")}
    stacked |= {"qkv": qkv, "attention_norm": take("attention_norm.gain"), "mlp_norm": take("mlp_norm.gain")}
    for i, block in enumerate(model.blocks):
        for name, array in stacked.items():
            put(getattr(block, name).weight, array[i].T if array.ndim == 3 else array[i])
    put(model.embedding.weight, take("embedding.table"))
    put(model.norm.weight, take("norm.gain"))
    assert not left, f"weights without a place: {sorted(left)}"


def compare(dtype: str, rows: int, length: int, rounds: int) -> dict[str, Any]:
    """Losses compared, then `rounds` of A B with an untimed call before each timed one."""
    import numpy as np

    rng = np.random.default_rng(0)
    ids = rng.integers(0, VOCABULARY, (rows, length + 1), dtype=np.int32)
    batch = {
        "inputs": ids[:, :-1].copy(), "targets": ids[:, 1:].copy(), "segment": np.ones((rows, length), np.int32),
        "position": np.tile(np.arange(length, dtype=np.int32), (rows, 1)),
        "weight": np.ones((rows, length), np.float32),
    }  # fmt: skip
    ours, weights = tessera(dtype, rows, length, batch)
    theirs = torch_eager(dtype, weights, batch)
    sides = {"tessera": ours, "torch": theirs}
    losses = {name: [step() for _ in range(3)] for name, step in sides.items()}
    tolerance = 1e-4 if dtype == "float32" else 1e-2
    difference = max(abs(a / b - 1) for a, b in zip(*losses.values(), strict=True))
    if difference > tolerance:
        raise SystemExit(f"the two sides are not the same model: losses {losses}")
    milliseconds: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(rounds):
        for name, step in sides.items():
            step()
            begin = time.perf_counter()
            step()
            milliseconds[name].append(1000 * (time.perf_counter() - begin))
    ratios = [b / a for a, b in zip(milliseconds["tessera"], milliseconds["torch"], strict=True)]
    return {
        "parameters": int(sum(array.size for array in weights.values())),
        "milliseconds": milliseconds,
        "best_milliseconds": {name: min(times) for name, times in milliseconds.items()},
        "tokens_per_second": {name: rows * length / min(times) * 1000 for name, times in milliseconds.items()},
        "ratio_of_best": min(milliseconds["torch"]) / min(milliseconds["tessera"]),
        "ratio_paired_median": statistics.median(ratios),
        "ratios": ratios,
        "loss_difference": difference,
    }


def main() -> None:
    from machine import describe, with_huge_pages, write

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--dtypes", default="float32,bfloat16")
    parser.add_argument("--output", type=pathlib.Path, default=ROOT / "benchmarks/results/train_step.json")
    options = parser.parse_args()
    with_huge_pages()
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    results = describe("jax", "jaxlib", "flax", "optax", "numpy", "torch")
    results |= {"rows": options.rows, "length": options.length}
    print(f"{results['device']}; {results['versions']}")
    print(f"{'':10}{'tessera ms':>12}{'torch ms':>12}{'tokens/s':>12}{'best':>8}{'paired':>8}   rounds")
    for dtype in options.dtypes.split(","):
        found = results[dtype] = compare(dtype, options.rows, options.length, options.rounds)
        best = found["best_milliseconds"]
        print(
            f"{dtype:10}{best['tessera']:12.0f}{best['torch']:12.0f}{found['tokens_per_second']['tessera']:12.0f}"
            f"{found['ratio_of_best']:7.2f}x{found['ratio_paired_median']:7.2f}x   "
            + " ".join(f"{ratio:.2f}" for ratio in found["ratios"]),
            flush=True,
        )
    write(results, options.output)


if __name__ == "__main__":
    main()
