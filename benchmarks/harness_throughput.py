"""What sharing a context saves when continuations are scored: multiple choice of several shapes, shared and apart.

    python benchmarks/harness_throughput.py
    python benchmarks/harness_throughput.py --preset=mla --width=512 --depth=8 --contexts=128

Every row scores the same requests once with each continuation as a row of its own and once with contexts prefilled once
and their caches copied (evaluation/harness/forward.py), after a first pass that compiles. `tokens` is the share of the
tokens that sharing computes, which `plan.WORTH` goes by.
"""

import argparse
import pathlib
import sys
import time
from collections.abc import Callable

ROOT = pathlib.Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

import jax  # noqa: E402
import numpy as np  # noqa: E402
from flax import nnx  # noqa: E402

import models  # noqa: E402
from configs import attention, command_line, fields  # noqa: E402
from evaluation.harness import forward, plan  # noqa: E402

SHAPES = ((16, 4, 4), (32, 4, 8), (64, 4, 32), (256, 4, 16), (512, 4, 32), (512, 2, 128), (32, 4, 64), (896, 4, 1))


def main() -> None:
    """The command line."""
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("--preset", default="gqa", choices=attention.names())
    flags.add_argument("--width", type=int, default=256)
    flags.add_argument("--depth", type=int, default=4)
    flags.add_argument("--vocabulary", type=int, default=8192)
    flags.add_argument("--contexts", type=int, default=32)
    flags.add_argument("--batch_size", type=int, default=16)
    flags.add_argument("--dtype", default="float32")
    options = flags.parse_args()
    changes = {
        "model.width": options.width, "model.depth": options.depth, "model.max_length": 1024,
        "model.compute_dtype": options.dtype,
    }  # fmt: skip
    config = fields.apply(command_line.load(f"configs/lm.py:attention={options.preset}"), changes)
    model = models.build(config.model, vocab_size=options.vocabulary, rngs=nnx.Rngs(0))
    scorer = forward.ContinuationScorer(forward.Device(model), batch_size=options.batch_size)
    print(f"{options.preset}, width {options.width}, depth {options.depth}, {jax.devices()[0].device_kind}")
    print(f"{'context':>8} {'choices':>8} {'answer':>7} {'tokens':>7} {'apart':>9} {'shared':>9} {'times':>6}")
    for context, choices, answer in SHAPES:
        generator = np.random.default_rng(0)
        draw = lambda size, generator=generator: generator.integers(0, options.vocabulary, size).tolist()  # noqa: E731
        asked = [draw(context) for _ in range(options.contexts)]
        requests = [(one, draw(answer)) for one in asked for _ in range(choices)]
        seconds = {}
        for way, worth in (("apart", -1.0), ("shared", 2.0)):
            plan.WORTH = worth
            groups = plan.groups(requests, 1024)
            if way == "apart":
                groups = [
                    plan.Group(group.context, (ids,), (numbers,))
                    for group in groups
                    for ids, numbers in zip(group.continuations, group.asked, strict=True)
                ]
            list(scorer(groups))
            seconds[way] = min(_timed(lambda groups=groups: list(scorer(groups))) for _ in range(3))
        share = (context + choices * (answer - 1)) / (choices * (context + answer - 1))
        times = seconds["apart"] / seconds["shared"]
        print(
            f"{context:>8} {choices:>8} {answer:>7} {share:>7.2f} {seconds['apart']:>8.3f}s {seconds['shared']:>8.3f}s "
            f"{times:>6.2f}"
        )


def _timed(function: Callable[[], object]) -> float:
    began = time.perf_counter()
    function()
    return time.perf_counter() - began


if __name__ == "__main__":
    main()
