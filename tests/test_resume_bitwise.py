"""A run that was stopped, killed or damaged ends with bitwise the numbers of one that was not."""

import os
import pathlib
import signal
import subprocess
import sys

import pytest

import train
from benchmarks import resume_chaos
from training import checkpoints, manifest, processes, run_folder

ROOT = pathlib.Path(__file__).parents[1]
STEPS = 9


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run that nothing happened to."""
    folder = tmp_path_factory.mktemp("resume")
    train.run(resume_chaos.tiny(folder / "whole", STEPS, str(folder / "cache")))
    return folder


def stop_at(monkeypatch, step):
    """As if a signal had come during step `step`."""
    monkeypatch.setattr(processes.Interruption, "requested", lambda self, now: now == step)


def test_stopped_at_several_steps(whole, monkeypatch):
    config = resume_chaos.tiny(whole / "stopped", STEPS, str(whole / "cache"))
    for step in (1, 3, 4, 8):  # Before the first save, with one that is due, right after one, before the last step.
        stop_at(monkeypatch, step)
        result = train.run(config)
        assert result.stopped == signal.SIGTERM and checkpoints.steps(whole / "stopped" / "checkpoints")[-1] == step
        assert [row["step"] for row in run_folder.lines(whole / "stopped" / "metrics.jsonl")] == [*range(1, step + 1)]
    stop_at(monkeypatch, None)
    assert train.run(config).stopped == 0
    resume_chaos.compare(whole / "whole", whole / "stopped", STEPS)


def test_damaged_newest_checkpoint_is_told_and_the_run_ends_the_same(whole, monkeypatch, capsys):
    config = resume_chaos.tiny(whole / "damaged-run", STEPS, str(whole / "cache"))
    stop_at(monkeypatch, 7)
    train.run(config)
    newest = whole / "damaged-run" / "checkpoints" / "7"
    victim = max(
        (path for path in (newest / "model").rglob("*") if path.is_file()), key=lambda path: path.stat().st_size
    )
    content = bytearray(victim.read_bytes())
    content[-3] ^= 4
    victim.write_bytes(content)
    assert manifest.problem(newest) is not None
    stop_at(monkeypatch, None)
    capsys.readouterr()
    train.run(config)
    said = capsys.readouterr().out
    assert "checkpoint 7 is damaged" in said and victim.name in said and "checkpoint 6 instead" in said
    resume_chaos.compare(whole / "whole", whole / "damaged-run", STEPS)


def test_another_batch_of_steps_continues_the_same_numbers(whole):
    """With a schedule that does not look at the end, a run made longer later is the longer run."""
    from configs import fields

    def config(name, steps):
        return fields.apply(
            resume_chaos.tiny(whole / name, steps, str(whole / "cache")),
            {"optimizer.schedule": "constant", "log.every": 2 if steps < STEPS else 1},
        )

    train.run(config("longer", 4))
    train.run(config("longer", STEPS))
    train.run(config("straight", STEPS))
    numbers = [run_folder.lines(whole / name / "metrics.jsonl")[-1]["loss"] for name in ("longer", "straight")]
    assert numbers[0] == numbers[1]


def test_sigterm_saves_and_leaves_with_status_0(tmp_path, whole):
    """Through the command line, with a signal from outside."""
    arguments = [
        sys.executable, "train.py", "--config=configs/lm.py:smoke", f"--config.run_dir={tmp_path / 'run'}",
        "--config.train.steps=100000", "--config.checkpoint.every=0", "--config.log.every=1", "--config.model.width=8",
        "--config.model.depth=1", "--config.data.sources=configs", "--config.log.tensorboard=false",
        "--config.model.mlp.width=8",
    ]  # fmt: skip
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    child = subprocess.Popen(
        arguments, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        for line in child.stdout:
            if line.startswith("step 3/"):
                break
        with pytest.raises(run_folder.RunFolderError, match=f"is in use by process {child.pid}"):
            with run_folder.RunFolder(resume_chaos.tiny(tmp_path / "run", STEPS)):
                pass
        child.send_signal(signal.SIGTERM)
        out, err = child.communicate(timeout=200)
    finally:
        child.kill()
    assert child.returncode == 0, err
    assert "stopped by SIGTERM after step" in out and "Traceback" not in err
    step = checkpoints.steps(tmp_path / "run" / "checkpoints")[-1]
    assert f"after step {step}," in out and manifest.problem(tmp_path / "run" / "checkpoints" / str(step)) is None
    assert run_folder.lines(tmp_path / "run" / "metrics.jsonl")[-1]["step"] == step


def test_killed_at_random_moments():
    """Two SIGKILLs, one of them during a save; benchmarks/resume_chaos.py does the same as often as one likes."""
    done = subprocess.run(
        [sys.executable, "benchmarks/resume_chaos.py", "--kills=2", "--steps=24", "--cache"],
        cwd=ROOT, env={**os.environ, "JAX_PLATFORMS": "cpu"}, capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "every number is the same" in done.stdout
    assert "while saving" in done.stdout
