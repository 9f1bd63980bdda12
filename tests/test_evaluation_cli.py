"""The command line of eval.py: its flags, its files, its one-line mistakes."""

import json
import pathlib
import subprocess
import sys

import pytest

import eval as program
from configs.errors import UserError

SMALL = (
    "model.width=32,model.depth=1,model.max_length=64,model.mlp.width=32,"
    "data.length=32,data.max_files=40,data.heldout_share=0.5"
)


def options(*argv):
    return program.read_options(list(argv))


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """Two tasks on an untrained model, by one command."""
    folder = tmp_path_factory.mktemp("out")
    argv = ["--model=gqa", f"--model_args={SMALL}", "--tasks=heldout,sample", "--limit=2", f"-o={folder}", "-s"]
    argv += ["--params=heldout.max_tokens=40,sample.max_new_tokens=4", "--bootstrap_iters=200", "-b=4"]
    assert program.main(argv) == 0
    return folder


def test_one_command_leaves_results_and_samples(done):
    (path,) = done.rglob("results_*.json")
    assert path.parent.name == "gqa_untrained"
    content = json.loads(path.read_text())
    assert set(content["results"]) == {"heldout", "sample"}
    assert 4 < content["results"]["heldout"]["bits_per_byte,none"] < 12  # Untrained: about 8 bits.
    assert content["n-samples"]["heldout"]["effective"] == 2 and content["n-samples"]["heldout"]["original"] > 2
    assert content["config"]["limit"] == 2 and content["config"]["bootstrap_iters"] == 200
    assert len(content["run"]["weights"]) == 64 and content["run"]["attention"] == "mha"
    assert content["configs"]["heldout"]["parameters"] == {"max_tokens": 40, "context": 1}
    (rows,) = done.rglob("samples_heldout_*.jsonl")
    assert [json.loads(line)["doc_id"] for line in rows.read_text().splitlines()] == [0, 1]


def test_a_second_run_gives_the_same_numbers(done, tmp_path, capsys):
    argv = ["--model=gqa", f"--model_args={SMALL}", "--limit=2", f"-o={tmp_path}", "--bootstrap_iters=200"]
    assert program.main([*argv, "--params=heldout.max_tokens=40"]) == 0
    before, after = (json.loads(next(folder.rglob("results_*.json")).read_text()) for folder in (done, tmp_path))
    assert after["results"]["heldout"] == before["results"]["heldout"]
    assert not list(tmp_path.rglob("samples_*"))  # Only with --log_samples.
    assert "bits_per_byte" in capsys.readouterr().out


def test_tasks_are_listed(capsys):
    assert program.main(["ls", "tasks"]) == 0
    said = capsys.readouterr().out
    for name in ("heldout", "mqar", "needle", "passkey", "sample", "niah_single_1"):
        assert f"\n{name}" in f"\n{said}"
    assert program.main(["ls", "groups"]) == 0
    assert "niah_multikey_3" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "nothing to evaluate"),
        (["--model=gqa", "--task=heldout"], "did you mean --tasks"),
        (["--model=gqa", "--limits=3"], "did you mean --limit"),
        (["--model=gpa"], "did you mean gqa"),
        (["--model=gqa", "--tasks=heldot"], "did you mean heldout"),
        (["--model=gqa", "--limit=many"], "--limit"),
        (["--model=gqa", "--batch_size=0"], "rows or auto"),
        (["--model=gqa", "--seed=x"], "--seed"),
        (["--model=gqa", "--num_fewshot=5"], "worked examples"),
        (["--model=gqa", "--apply_chat_template"], "no chat template"),
        (["--model=gqa", "--params=max_tokens=3"], "task's name before a dot"),
        (["--model=gqa", "--gen_kwargs=temperature"], "name=value"),
        (["--model=gqa", "--model_args=model.widht=3"], "did you mean config.model.width"),
        (["--model=gqa", "--samples=[1]"], "--samples must be JSON"),
        (["--model=gqa", '--samples={"heldout": ["a"]}'], "whole numbers"),
        (["--model=gqa", "--run=runs/x"], "exclude each other"),
        (["--run=nowhere/at/all"], "nowhere/at/all"),
        (["--model=configs/nothing.py"], "no config file"),
        (["--model=gqa", "--config=nowhere.yaml"], "there is no such file"),
        (["--model=gqa", "--config=configs/lm.py"], "give it as --model"),
        (["--model=gqa", "--step=3"], "--step needs"),
        (["--model=gqa", "--bootstrap_iters=-1"], "0 or more"),
        (["heldout"], "unexpected argument 'heldout'"),
        (["ls", "task"], "invalid choice"),
        (["report", "nowhere"], "nowhere is no run folder"),
        (["--model=gqa", "--num_processes=2"], "several processes need all of --coordinator"),
        (["--model=gqa", "--model_args=data.sources=nowhere", "--tasks=heldout"], "nowhere"),
        (["--model=gqa", "--length=100000", f"--model_args={SMALL}"], "longer than config.model.max_length"),
    ],
)
def test_mistakes_are_user_errors_of_one_line(argv, message):
    with pytest.raises(UserError) as error:
        program.main(argv)
    assert message in str(error.value) and "\n" not in str(error.value)
    assert not pathlib.Path("nowhere").exists()


def test_a_mistake_leaves_with_status_2_and_no_traceback():
    command = [sys.executable, "eval.py", "--model=gqa", "--tasks=heldot"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.strip().splitlines() == ["error: unknown task 'heldot': did you mean heldout?"]


def test_flags_from_a_file_lie_beneath_the_command_line(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text(
        "tasks: [heldout, mqar]\nlimit: 5\nmodel: mla\nsamples: {heldout: [1, 2]}\ngen_kwargs: {temperature: 0.5}\n"
    )
    found = options(f"--config={file}", "--limit=7")
    assert (found.tasks, found.limit, found.model) == ("heldout,mqar", 7.0, "mla")
    settings = program._settings(found)
    assert settings["picked"] == {"heldout": [1, 2]} and settings["generation"] == {"temperature": 0.5}
    file.write_text("taks: heldout\n")
    with pytest.raises(UserError, match="did you mean tasks"):
        options(f"--config={file}")
    file.write_text("a: [")
    with pytest.raises(UserError, match="cannot be read"):
        options(f"--config={file}")


def test_short_forms_and_values():
    found = options(
        "-m", "gqa", "-t", "mqar", "-a", "seed=1", "-b", "auto", "-L", "0.1", "-o", "x", "-s", "-f", "0", "-E", "{}"
    )
    assert (found.model, found.tasks, found.model_args, found.limit, found.output_path) == (
        "gqa",
        "mqar",
        "seed=1",
        0.1,
        "x",
    )
    settings = program._settings(options("--model=gqa", "--batch_size=auto", "--length=1024", "--seed=3,1234,1234"))
    assert (settings["batch_size"], settings["seed"]) == (16, 3)
    pairs = program._settings(options("--model=gqa", "--gen_kwargs=temperature=0.8,max_gen_toks=64,do_sample=true"))
    assert pairs["generation"] == {"temperature": 0.8, "max_gen_toks": 64, "do_sample": True}
    params = program._settings(options("--model=gqa", "--params=mqar.steps=3,mqar.width=8", "--params=needle.points=2"))
    assert params["params"] == {"mqar": {"steps": "3", "width": "8"}, "needle": {"points": "2"}}


def test_runs_are_reported_from_the_command_line(tmp_path, capsys):
    from evaluation_standins import write_run

    folders = [str(write_run(tmp_path / name, name)) for name in ("gqa", "mla")]
    assert program.main(["report", *folders]) == 0
    page = tmp_path / "report.html"
    assert f"report: {page}" in capsys.readouterr().out and pathlib.Path(page).read_text().startswith("<!doctype html>")


def test_a_changed_corpus_is_told(tmp_path, capsys):
    from evaluation_standins import write_run

    class Found:
        run = {"corpus": {"hash": "f" * 64}}

    folder = write_run(tmp_path / "gqa", "gqa")
    program._check_corpus(folder, Found)
    assert "the corpus has changed" in capsys.readouterr().err
    Found.run["corpus"]["hash"] = "0" * 64
    program._check_corpus(folder, Found)
    assert capsys.readouterr().err == ""
