"""Kills a training run with SIGKILL at random moments, and demands the numbers of the run that was not killed.

    python benchmarks/resume_chaos.py                     20 kills, about three minutes on two cores
    python benchmarks/resume_chaos.py --kills=100 --seed=7

Half of the kills come at a moment drawn uniformly from the life of the process (imports done, compiling, stepping,
finishing), half while a checkpoint is seen to be unfinished on disk. Compared bitwise at the end: every number of every
logged step, and every array of the last checkpoint. The children are forked from a process that has imported everything
and touched no device, which saves the imports of each.
"""

import argparse
import os
import pathlib
import random
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

ROOT = pathlib.Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))


def tiny(folder: pathlib.Path, steps: int, cache: str = "") -> Any:
    """A config of few operations and many checkpoints, on the files of this repository's `configs`."""
    from configs import fields
    from configs.command_line import load

    return fields.apply(
        load(f"{ROOT / 'configs' / 'lm.py'}:attention=gqa,smoke"),
        {
            "run_dir": str(folder), "train.steps": steps, "train.compilation_cache": cache,
            "log.every": 1, "log.tensorboard": False,
            "checkpoint.every": 3, "checkpoint.keep": 2, "eval.tasks": (), "eval.sample_prompts": (),
            "data.sources": (str(ROOT / "configs"),), "data.length": 32, "data.batch_size": 2,
            "model.width": 8, "model.depth": 1, "model.mlp.width": 8, "model.attention.heads": 2,
            "model.attention.kv_heads": 1, "model.attention.head_dim": 4, "optimizer.ema_decay": 0.9,
        },
    )  # fmt: skip


def fork(action: Callable[[], Any], output: pathlib.Path) -> int:
    """Runs `action` in a child whose output goes to a file; the child's process id."""
    child = os.fork()
    if child:
        return child
    status = 1
    try:
        descriptor = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
        action()
        status = 0
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def unfinished(folder: pathlib.Path) -> set[str]:
    """The checkpoints that are being written at this moment: their folder is there and their manifest is not."""
    try:
        return {path.name for path in (folder / "checkpoints").iterdir() if not (path / "manifest.json").exists()}
    except FileNotFoundError:  # The folder, or one in it, came or went.
        return set()


def chaos(folder: pathlib.Path, *, kills: int, steps: int, seed: int, cache: bool = False) -> None:
    """Runs both runs and compares them; AssertionError, naming the first difference, if they differ.

    With `cache` the children share compiled programs, which makes each of them seconds shorter.
    """
    import train  # noqa: F401, I001
    import data  # noqa: F401
    import evaluation.report  # noqa: F401
    import models  # noqa: F401
    from training import checkpoints, evaluating, journal, loading, manifest, run_folder  # noqa: F401
    from jax._src import xla_bridge

    assert not xla_bridge.backends_are_initialized(), "a module touches a device on import, so it must not be forked"
    rng, output = random.Random(seed), folder / "output.txt"
    kept = str(folder / "cache") if cache else ""
    sound, victim = tiny(folder / "sound", steps, kept), tiny(folder / "victim", steps, kept)
    if cache:
        assert finished(fork(lambda: train.run(tiny(folder / "first", 3, kept)), output)), output.read_text()
    began = time.monotonic()
    assert finished(fork(lambda: train.run(sound), output)), output.read_text()
    life = time.monotonic() - began
    print(f"a run that is not killed takes {life:.1f} s", flush=True)

    done = while_saving = 0
    while done < kills:
        left = unfinished(folder / "victim")  # By the kill before this one.
        child, began = fork(lambda: train.run(victim), output), time.monotonic()
        wanted, moment = done % 2, rng.uniform(0, life)
        while (status := os.waitpid(child, os.WNOHANG))[0] == 0:
            if unfinished(folder / "victim") - left if wanted else time.monotonic() - began > moment:
                time.sleep(rng.uniform(0, 0.02) if wanted else 0)
                while_saving += bool(unfinished(folder / "victim") - left)
                os.kill(child, signal.SIGKILL)
                os.waitpid(child, 0)
                done += 1
                break
            time.sleep(0.0005)
        else:
            assert status[1] == 0, output.read_text()
            # It came to its end before its moment: from the start again, so that every kill is one.
            (folder / "victim").rename(folder / f"complete-{time.monotonic_ns()}")
            continue
        steps_kept = checkpoints.steps(folder / "victim" / "checkpoints")
        how = "while saving" if wanted else f"at {moment:.2f} s"
        print(f"kill {done}/{kills} {how}: checkpoints {steps_kept}", flush=True)
    assert finished(fork(lambda: train.run(victim), output)), output.read_text()
    compare(folder / "sound", folder / "victim", steps)
    for complete in folder.glob("complete-*"):
        compare(folder / "sound", complete, steps)
    print(f"{kills} kills, {while_saving} of them with a checkpoint unfinished: every number is the same")


def finished(child: int) -> bool:
    """Waits for a child; whether it ended well."""
    return os.waitpid(child, 0)[1] == 0


def compare(sound: pathlib.Path, victim: pathlib.Path, steps: int) -> None:
    """AssertionError unless both folders hold the same numbers: metrics line by line, and the last checkpoint."""
    from training import run_folder

    numbers = [run_folder.lines(folder / "metrics.jsonl") for folder in (sound, victim)]
    for line in (*numbers[0], *numbers[1]):
        line.pop("time")
        line.pop("tokens_per_second", None)
    assert [line["step"] for line in numbers[0]] == list(range(1, steps + 1)), numbers[0]
    for expected, found in zip(*numbers, strict=True):
        assert expected == found, f"{victim}: {found} is not {expected}"
    arrays = [arrays_of(folder / "checkpoints" / str(steps)) for folder in (sound, victim)]
    assert arrays[0].keys() == arrays[1].keys()
    for name in arrays[0]:
        assert arrays[0][name] == arrays[1][name], f"{victim}: {name} differs in the last checkpoint"


def arrays_of(checkpoint: pathlib.Path) -> dict[str, bytes]:
    """Every array of a checkpoint by name, as bytes."""
    import numpy as np
    import orbax.checkpoint as ocp

    with ocp.Checkpointer(ocp.StandardCheckpointHandler()) as reader:
        items = {item: reader.restore(checkpoint.absolute() / item) for item in ("model", "optimizer")}
    return {
        f"{item}/{name}": np.asarray(value).tobytes() for item, found in items.items() for name, value in found.items()
    }


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--cache", action="store_true", help="share compiled programs between the processes")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        chaos(pathlib.Path(folder), **vars(arguments))


if __name__ == "__main__":
    main()
