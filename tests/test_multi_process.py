"""Real processes on this machine, as on several hosts: train, save, go on with another number of them, evaluate.

One run folder is taken through three lives: two processes of two devices each, one process of one device, two processes
of one device each. The preset makes of these a mesh of data x model = 2 x 2, of 1 x 1 (nothing is sent), and of 1 x 2,
where the model axis crosses the processes and both read the same rows. Every step's loss must be that of one process
which was never stopped, to 1e-5 relative in float32; other data would differ in the second digit.
"""

import json
import os
import pathlib
import socket
import subprocess
import sys

import flags
import numpy as np
import pytest

ROOT = pathlib.Path(__file__).parents[1]
PER_LIFE = 3
TIMEOUT = 240
FIELDS = {
    "sharding.preset": "fsdp_tp", "log.every": 1, "log.tensorboard": False, "checkpoint.every": 0,
    "eval.tasks": "()", "eval.sample_prompts": "()", "data.sources": f"('{ROOT / 'configs'}',)",
    "data.length": 32, "data.batch_size": 4, "model.width": 16, "model.depth": 2, "model.mlp.width": 16,
    "model.attention.heads": 2, "model.attention.kv_heads": 1, "model.attention.head_dim": 4,
    # The schedule depends on the length of the run, which differs from life to life.
    "optimizer.schedule": "constant", "optimizer.warmup_steps": 0, "optimizer.learning_rate": 0.01,
}  # fmt: skip


def train(folder: pathlib.Path, steps: int, *, processes: int, devices: int) -> None:
    """Runs `train.py` until it ends."""
    fields = {**FIELDS, "run_dir": folder, "train.steps": steps, "train.compilation_cache": folder.parent / "cache"}
    command = ["train.py", "--config=configs/lm.py:attention=gqa,smoke"]
    command += [f"--config.{name}={value}" for name, value in fields.items()]
    run(command, folder.parent / f"{folder.name}-{steps}", processes=processes, devices=devices)


def run(command: list[str], logs: pathlib.Path, *, processes: int, devices: int) -> None:
    """Runs a program of ours in so many processes until they end; AssertionError with their output if one fails."""
    if processes > 1:
        command = [*command, f"--coordinator=127.0.0.1:{free_port()}", f"--num_processes={processes}"]
    environment = {
        **os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT),
        "XLA_FLAGS": flags.xla(devices),
    }  # fmt: skip
    started, outputs = [], [logs.with_name(f"{logs.name}-{i}.log") for i in range(processes)]
    try:
        for i, output in enumerate(outputs):
            own = [f"--process_id={i}"] if processes > 1 else []
            # To files: a process that waits for a full pipe would hold up the others.
            with open(output, "wb") as log:
                started.append(
                    subprocess.Popen(
                        [sys.executable, *command, *own],
                        cwd=ROOT,
                        env=environment,
                        stdout=log,
                        stderr=subprocess.STDOUT,
                    )  # fmt: skip
                )
        codes = [process.wait(TIMEOUT) for process in started]
    finally:
        for process in started:
            process.kill()
            process.wait()
    assert codes == [0] * processes, "\n\n".join(output.read_text()[-3000:] for output in outputs)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def losses(folder: pathlib.Path) -> dict[int, float]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {row["step"]: row["loss"] for row in rows if "loss" in row}


def saved(folder: pathlib.Path, step: int, item: str) -> dict:
    """A JSON item of a checkpoint."""
    return json.loads((folder / "checkpoints" / str(step) / item / "metadata").read_text())


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> pathlib.Path:
    """A run of one process and one device that is never interrupted."""
    folder = tmp_path_factory.mktemp("processes") / "alone"
    train(folder, 3 * PER_LIFE, processes=1, devices=1)
    return folder


def test_a_run_goes_on_with_another_number_of_processes(alone):
    folder = alone.parent / "moved"
    for life, (processes, devices) in enumerate([(2, 2), (1, 1), (2, 1)], start=1):
        train(folder, life * PER_LIFE, processes=processes, devices=devices)
        meta = saved(folder, life * PER_LIFE, "meta")
        assert (meta["processes"], meta["devices"]["count"]) == (processes, processes * devices)
        writers = list((folder / "checkpoints" / str(life * PER_LIFE) / "model").glob("ocdbt.process_*"))
        assert len(writers) == processes  # Every process wrote its own part.
        # The position counts rows of the whole run, whoever read them.
        position = saved(folder, life * PER_LIFE, "data")["position"]
        assert position["next_row"] == life * PER_LIFE * FIELDS["data.batch_size"]
    expected, found = losses(alone), losses(folder)
    assert list(found) == list(expected) == list(range(1, 3 * PER_LIFE + 1))
    np.testing.assert_allclose(list(found.values()), list(expected.values()), rtol=1e-5)
    assert np.ptp(list(expected.values())) > 0.1  # Steps and their data can be told apart.


def test_tasks_of_the_harness_asked_by_two_processes(alone):
    """Over a mesh that crosses them they find what one process finds."""
    found = {}
    for processes in (1, 2):
        output = alone.parent / f"asked-{processes}"
        command = ["eval.py", f"--run={alone}", "--tasks=tiny_quiz,tiny_pages,tiny_answer", f"--output={output}"]
        command += [f"--include_path={ROOT / 'tests/harness/tasks'}", "--log_samples", "--bootstrap_iters=0"]
        run(command, output, processes=processes, devices=1)
        (results,) = output.rglob("results_*.json")  # One of them wrote.
        lines = [line for file in sorted(output.rglob("samples_*")) for line in file.read_text().splitlines()]
        found[processes] = [json.loads(line)["filtered_resps"] for line in lines]
    texts, numbers = ([of(answers) for answers in found.values()] for of in (generated, log_probabilities))
    assert len(texts[0]) == 3 and len(numbers[0]) == 5 and all(map(len, texts[0]))
    assert texts[0] == texts[1]
    for one, two in zip(*numbers, strict=True):
        np.testing.assert_allclose(two, one, rtol=1e-5)


def generated(answers: list) -> list[str]:
    return [answer[0] for answer in answers if isinstance(answer[0], str)]


def log_probabilities(answers: list) -> list[np.ndarray]:
    return [np.array(answer, float) for answer in answers if not isinstance(answer[0], str)]
