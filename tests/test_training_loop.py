"""The loop as a whole: what a run leaves behind, what it refuses, and how it says so."""

import json
import math
import pathlib

import jax
import numpy as np
import pytest

import train
from benchmarks import resume_chaos
from configs import command_line, fields
from configs.errors import ConfigError, UserError
from kernels.tokens import packed
from training import (
    checkpoints,
    journal,
    load_run,
    loading,
    manifest,
    metrics,
    profiling,
    progress,
    run_folder,
    summary,
)
from training.checkpoints import CheckpointError
from training.run_folder import RunFolder, RunFolderError

ROOT = pathlib.Path(__file__).parents[1]
STEPS = 6


def tiny(folder, **changed):
    """The configuration of these tests with dotted fields set (`__` for the dots)."""
    config = resume_chaos.tiny(folder, STEPS, str(folder.parent / "cache"))
    return fields.apply(config, {name.replace("__", "."): value for name, value in changed.items()})


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return tmp_path_factory.mktemp("loop")


@pytest.fixture(scope="module")
def finished(home):
    """(config, result) of a run with an average, tasks, texts, TensorBoard and a trace."""
    config = tiny(
        home / "run", log__every=2, log__tensorboard=True, log__profile_steps=(2, 3), eval__every=4, eval__limit=2.0,
        eval__tasks=("heldout",), eval__sample_prompts=("def ", "x"), eval__sample_tokens=5,
    )  # fmt: skip
    return config, train.run(config)


def test_a_run_folder_alone_tells_the_run(finished):
    config, result = finished
    folder = result.run_dir
    assert {"config.json", "metrics.jsonl", "eval.jsonl", "samples.jsonl", "report.html", "tokenizer", "checkpoints",
            "tensorboard", "profile"} <= {path.name for path in folder.iterdir()}  # fmt: skip
    assert fields.flat(run_folder.read_config(folder)) == fields.flat(config)
    rows = run_folder.lines(folder / "metrics.jsonl")
    assert [row["step"] for row in rows] == [1, 2, 4, 4, 6, 6]  # Of 4 and 6 there is an evaluation too.
    trained = [row for row in rows if "loss" in row]
    assert all({"time", "learning_rate", "gradient_norm"} <= row.keys() for row in trained)
    assert all("tokens_per_second" in row for row in trained[1:]) and "mfu" not in trained[-1]
    times = [row["time"] for row in rows]
    assert times == sorted(times)
    assert [row["step"] for row in run_folder.lines(folder / "eval.jsonl")] == [4, 6]
    assert [(row["step"], row["prompt"]) for row in run_folder.lines(folder / "samples.jsonl")] == [
        (4, "def "), (4, "x"), (6, "def "), (6, "x")
    ]  # fmt: skip
    assert result.metrics["eval/heldout/bits_per_byte"] == rows[-1]["eval/heldout/bits_per_byte"]
    assert list((folder / "tensorboard").iterdir()) and list((folder / "profile").rglob("*.xplane.pb"))
    assert checkpoints.steps(folder / "checkpoints") == [3, 6]


def test_a_finished_run_is_not_run_again(finished, capsys):
    config, result = finished
    before = manifest.problem(result.run_dir / "checkpoints" / "6"), (result.run_dir / "metrics.jsonl").read_bytes()
    again = train.run(config)
    assert "is finished at step 6: nothing to do" in capsys.readouterr().out
    assert again.metrics == result.metrics
    assert before == (None, (result.run_dir / "metrics.jsonl").read_bytes())


def test_load_run_gives_the_averaged_model_of_the_step_asked_for(finished):
    config, result = finished
    loaded = load_run(result.run_dir)
    assert (loaded.step, loaded.config.name) == (6, config.name)
    ids = np.array([[loaded.tokenizer.bos_id, *loaded.tokenizer.encode("def f(")]], np.int32)
    logits = loaded.model(ids, packed(np.ones_like(ids))).logits
    arrays = {step: resume_chaos.arrays_of(result.run_dir / "checkpoints" / str(step)) for step in (3, 6)}
    table = loaded.model.embedding.table[...]
    assert np.asarray(table).tobytes() == arrays[6]["model/ema/embedding.table"]
    assert np.asarray(table).tobytes() != arrays[6]["model/params/embedding.table"]
    earlier = load_run(result.run_dir, 3)
    assert earlier.step == 3
    assert np.asarray(earlier.model.embedding.table[...]).tobytes() == arrays[3]["model/ema/embedding.table"]
    assert np.all(np.isfinite(logits[..., : loaded.tokenizer.vocab_size]))
    with pytest.raises(CheckpointError, match="no checkpoint of step 5: did you mean"):
        load_run(result.run_dir, 5)
    with pytest.raises(RunFolderError, match="is not a run folder"):
        load_run(result.run_dir.parent)


def test_a_run_can_start_from_another_runs_weights(finished, home):
    _, result = finished
    config = tiny(home / "second", train__init_from=str(result.run_dir), optimizer__learning_rate=0.0, train__steps=2)
    train.run(config)
    arrays = resume_chaos.arrays_of(home / "second" / "checkpoints" / "2")
    first = resume_chaos.arrays_of(result.run_dir / "checkpoints" / "6")
    assert arrays["model/params/embedding.table"] == first["model/ema/embedding.table"]
    with pytest.raises(CheckpointError, match="not a checkpoint of this model: .*embedding.table"):
        train.run(tiny(home / "third", train__init_from=str(result.run_dir), model__width=16))
    with pytest.raises(RunFolderError, match="nowhere is not a run folder"):
        train.run(tiny(home / "third", train__init_from=str(home / "nowhere")))


def test_a_changed_config_is_refused_by_field_and_free_fields_are_not(finished):
    config, result = finished
    changed = fields.apply(config, {"model.width": 16, "seed": 3, "train.steps": 9, "log.every": 1})
    with pytest.raises(ConfigError) as error:
        train.run(changed)
    assert "config.model.width = 8 (now 16)" in str(error.value) and "config.seed = 0 (now 3)" in str(error.value)
    assert "steps" not in str(error.value) and "log" not in str(error.value)
    with RunFolder(fields.apply(config, {"train.steps": 9, "eval.limit": 1.0, "checkpoint.keep": 7})) as folder:
        assert folder.finished() is None  # It is not as long as it now should be.


def test_two_writers_are_kept_apart(home):
    config = tiny(home / "locked")
    with RunFolder(config):
        with pytest.raises(RunFolderError, match="is in use by process"):
            with RunFolder(config):
                pass
    with RunFolder(config):
        pass


def test_a_step_that_is_not_finite_stops_the_run_with_the_state_before_it(home):
    config = tiny(home / "broken", optimizer__name="sgd", optimizer__learning_rate=1e30, optimizer__clip_norm=0.0,
                  optimizer__warmup_steps=0, optimizer__momentum=0.0, checkpoint__every=0)  # fmt: skip
    messages = []
    for _ in range(2):  # The second time it is resumed, and comes to the same end.
        with pytest.raises(journal.NotFinite) as error:
            train.run(config)
        messages.append(str(error.value))
    bad = error.value.step
    assert messages[0] == messages[1] and bad > 1
    assert f"step {bad} is not finite in: " in messages[0] and f"checkpoint {bad - 1}" in messages[0]
    last = run_folder.lines(home / "broken" / "metrics.jsonl")[-1]
    assert last["step"] == bad and "embedding.table" in last["not_finite"] and "embedding.table" in messages[0]
    folder = home / "broken" / "checkpoints" / str(bad - 1)
    assert checkpoints.steps(home / "broken" / "checkpoints") == [bad - 1] and manifest.problem(folder) is None
    data = json.loads((folder / "data" / "metadata").read_text())
    assert data["position"]["next_row"] == (bad - 1) * config.data.batch_size  # The bad batch comes next.
    assert not (home / "broken" / "finished.json").exists()


def test_lines_after_the_step_and_half_lines_are_taken_back(tmp_path):
    file = tmp_path / "metrics.jsonl"
    file.write_text('{"step": 1}\n{"step": 2}\n{"step": 2, "eval": 1}\n{"step": 3}\n{"st')
    run_folder.rewind(file, 2)
    assert file.read_text() == '{"step": 1}\n{"step": 2}\n{"step": 2, "eval": 1}\n'
    run_folder.rewind(file, 0)
    assert file.read_text() == ""
    run_folder.rewind(tmp_path / "absent", 3)
    assert not (tmp_path / "absent").exists()


def test_json_lines_hold_what_every_reader_knows(tmp_path):
    writer = metrics.JsonLines(tmp_path / "metrics.jsonl")
    writer.write(3, {"loss": math.nan, "other": math.inf, "fine": 1.5})
    writer.close()
    assert json.loads((tmp_path / "metrics.jsonl").read_text()) == {"step": 3, "loss": None, "other": None, "fine": 1.5}


def test_wandb_is_only_missed_when_it_is_asked_for(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "wandb", None)
    config = tiny(tmp_path / "run")
    metrics.writers(tmp_path, config, 0)[0].close()
    with pytest.raises(ConfigError, match="config.log.wandb needs the package wandb"):
        metrics.writers(tmp_path, fields.apply(config, {"log.wandb": True}), 0)


def test_print_shows_the_cost_and_allocates_nothing(home):
    before = len(jax.live_arrays())
    text = summary.text(command_line.load("configs/lm.py:attention=mla,size=base"))
    assert len(jax.live_arrays()) <= before
    for part in ("model.attention.layer = 'mla'", "parameters", "FLOPs/token", "cache bytes/token", "mesh data=1"):
        assert part in text
    assert not (home / "runs").exists()


def test_a_sweep_runs_what_is_not_finished_and_compares(home, capsys):
    sweep = home / "rates.py"
    sweep.write_text(
        "from configs.sweeps.combinators import param, chain\n"
        "SWEEP = chain(param('optimizer.learning_rate', 0.001, 0.002), param('objective.name', 'next_tokn'))\n"
    )
    config = tiny(home / "sweep", train__steps=2)
    from training import sweeps

    for again in (False, True):
        with pytest.raises(UserError, match="1 of 3 runs failed; first .*next_tokn.*next_token"):
            sweeps.run(str(sweep), config, train.run)
        out = capsys.readouterr().out
        assert out.count("nothing to do") == (2 if again else 0)
        assert (home / "sweep" / "report.html").is_file()
    runs = [path for path in (home / "sweep").iterdir() if (path / "finished.json").is_file()]
    rates = sorted(run_folder.read_config(path).optimizer.learning_rate for path in runs)
    assert rates == [0.001, 0.002]


@pytest.mark.parametrize(
    "argv, said",
    [
        ([], "nothing to train: give --config"),
        (["--config=configs/lm.py", "--config.optimizer.nme=sgd"], "did you mean config.optimizer.name"),
        (["--config=configs/lm.py:smoke", "--config.objective.name=next_tokn", "--print"], "did you mean next_token"),
        (["--config=configs/lm.py:smoke", "--config.sharding.data=3", "--print"], "preset 'single' is one device"),
        (["--config=configs/lm.py:smoke", "--config.data.sources=/nowhere"], "/nowhere"),
        (["--config=configs/lm.py:smoke", "--config.model.vocab_size=5", "--print"], "less than the tokenizer's"),
        (["--config=configs/lm.py:smoke", "--num_processes=2"], "several processes need all of --coordinator"),
        (["--sweep=configs/sweeps/none.py"], "configs/sweeps/none.py"),
    ],
)
def test_a_users_mistake_is_one_line_and_status_2(argv, said, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(ROOT)
    run_dir = [f"--config.run_dir={tmp_path / 'run'}"] if any("configs/lm.py" in word for word in argv) else []
    monkeypatch.setattr("sys.argv", ["train.py", *argv, *run_dir])
    with pytest.raises(SystemExit) as exit_:
        command_line.run(train.main)
    err = capsys.readouterr().err
    assert exit_.value.code == 2 and err.startswith("error: ") and len(err.splitlines()) == 1 and said in err


def test_utilisation_is_model_flops_over_the_peak_and_unknown_devices_have_none():
    class Device:
        device_kind = "TPU v5 lite"

    assert profiling.utilisation(1e9, 1e4, [Device(), Device()]) == pytest.approx(1e13 / 394e12)
    assert profiling.peak(jax.devices("cpu")[0]) is None
    assert profiling.utilisation(1e9, 1e4, [Device(), jax.devices("cpu")[0]]) is None


def test_clock_stands_still_during_pauses(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(progress.time, "perf_counter", lambda: now[0])
    clock = progress.Clock(elapsed=5.0)
    assert clock.rate(0) is None
    now[0] += 2
    with clock.pause():
        now[0] += 50
        assert clock.seconds() == 7
    now[0] += 2
    assert clock.seconds() == 9 and clock.rate(400) == pytest.approx(100)
    assert progress.duration(59.6) == "1:00" and progress.duration(3661) == "1:01:01"


def test_weights_without_a_sound_checkpoint_are_refused(finished, tmp_path):
    import shutil

    _, result = finished
    shutil.copytree(result.run_dir, tmp_path / "run")
    for step in (3, 6):
        file = tmp_path / "run" / "checkpoints" / str(step) / "meta" / "metadata"
        file.write_bytes(file.read_bytes()[:-5])
    with pytest.raises(CheckpointError, match="no sound checkpoint .*checkpoint 6: meta/metadata has"):
        loading.sound_step(tmp_path / "run")
