"""Files, tables, groups, caches and comparisons of results."""

import datetime
import json

import numpy as np
import pytest
from evaluation_standins import Bytes, MeanModel, Pipeline, texts
from rich.console import Console

import evaluation
from evaluation import EvaluationError, Grid, Metric, Results, Task, TaskResult, Units, results, statistics

RESULT_KEYS = {  # The layout of lm-evaluation-harness.
    "results", "groups", "group_subtasks", "configs", "versions", "n-shot", "higher_is_better", "n-samples", "config",
    "git_hash", "date", "model_name", "task_hashes", "total_evaluation_time_seconds",
}  # fmt: skip


def made(found: list[TaskResult], **tasks: Task) -> Results:
    known = {
        name: tasks.get(name, Task(name, lambda c: None, "probe", "")) for name in (result.name for result in found)
    }
    date = datetime.datetime(2026, 1, 2, 3, 4, 5, 678)
    return Results(
        "a/model: x", known, {result.name: result for result in found}, {"limit": 3}, {"jax": "1"}, 1.5, date
    )


def test_the_layout_is_that_of_lm_eval():
    content = evaluation.evaluate(MeanModel(259), Bytes(), Pipeline(texts(5)), length=32, limit=3).json()
    assert set(content) >= RESULT_KEYS
    entry = content["results"]["heldout"]
    assert entry["alias"] == "heldout" and entry["bits_per_byte,none"] > 0 and entry["bits_per_byte_stderr,none"] > 0
    assert content["n-samples"]["heldout"] == {"original": 5, "effective": 3}
    assert content["higher_is_better"]["heldout"] == {
        "bits_per_byte": False, "byte_perplexity": False, "token_perplexity": False, "token_accuracy": True,
    }  # fmt: skip
    assert content["configs"]["heldout"]["output_type"] == "loglikelihood_rolling"
    assert content["run"]["corpus"]["hash"] == "0" * 64 and content["run"]["jax"] and content["run"]["device_kind"]
    json.dumps(content, allow_nan=False)


def test_files_are_whole_and_named_by_time(tmp_path):
    grid = Grid("t", ["0 %", "50 %"], ["64", "128"], [[0.5, 1.0], [0.25, float("nan")]], "depth", "length")
    rows = [{"doc_id": 0, "text": "é", "value": np.float32(1.5)}, {"doc_id": 1, "text": "b", "value": float("inf")}]
    found = made([TaskResult("t", {"m": Metric(0.5, 0.1)}, rows, 2, 2, grids={"m": grid})])
    path = found.write(tmp_path / "new" / "folder")
    stamp = "2026-01-02T03-04-05.000678"
    assert path.name == f"results_{stamp}.json"
    assert sorted(file.name for file in path.parent.iterdir()) == [
        f"results_{stamp}.json", f"samples_t_{stamp}.jsonl", f"t_m_{stamp}.csv", f"t_m_{stamp}.png",
    ]  # fmt: skip
    lines = [json.loads(line) for line in (path.parent / f"samples_t_{stamp}.jsonl").read_text().splitlines()]
    assert lines == [{"doc_id": 0, "text": "é", "value": 1.5}, {"doc_id": 1, "text": "b", "value": None}]
    csv = (path.parent / f"t_m_{stamp}.csv").read_text()
    assert csv == "depth\\length,64,128\n0 %,0.5,1\n50 %,0.25,nan\n"
    assert (path.parent / f"t_m_{stamp}.png").read_bytes().startswith(b"\x89PNG")
    bare = made([TaskResult("t", {}, rows)]).write(tmp_path / "b", log_samples=False)
    assert [file.name for file in bare.parent.iterdir()] == [bare.name]


def test_an_interrupted_write_leaves_the_old_file(tmp_path, monkeypatch):
    target = tmp_path / "results.json"
    target.write_text("old")

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(results.os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        results.write_atomic(target, "new")
    assert target.read_text() == "old" and [file.name for file in tmp_path.iterdir()] == ["results.json"]


def test_groups_are_weighted_by_size_with_a_pooled_error():
    parts = [
        TaskResult("a", {"match": Metric(0.2, 0.05), "own": Metric(1.0)}, effective=10),
        TaskResult("b", {"match": Metric(0.6, 0.02)}, effective=30),
        TaskResult("c", {"match": Metric(0.9, 0.02)}, effective=30),
    ]
    group = {name: Task(name, lambda c: None, "probe", "", group="g") for name in "ab"}
    content = made(parts, **group, c=Task("c", lambda c: None, "probe", "", group="alone")).json()
    assert set(content["groups"]) == {"g"}
    assert content["group_subtasks"] == {"g": ["a", "b"]}
    assert content["groups"]["g"]["match,none"] == pytest.approx(0.5)
    assert content["groups"]["g"]["match_stderr,none"] == pytest.approx(statistics.pooled([0.05, 0.02], [10, 30]))
    assert "own,none" not in content["groups"]["g"]


def test_clustered_errors_are_reported_for_tasks_that_name_a_cluster():
    values, files = [0.0, 0.0, 1.0, 1.0, 1.0, 0.0], ["x", "x", "y", "y", "z", "w"]
    rows = [
        {"doc_id": i, "match": value, "file": file} for i, (value, file) in enumerate(zip(values, files, strict=True))
    ]
    task = Task("t", lambda c: None, "probe", "", cluster_key="file")
    entry = made([TaskResult("t", {"match": Metric(0.5, 0.2)}, rows, 6, 6)], t=task).json()["results"]["t"]
    assert entry["match_stderr_clustered,none"] == pytest.approx(statistics.clustered(np.array(values), files))


def test_missing_errors_read_as_lm_eval_writes_them():
    assert made([TaskResult("t", {"m": Metric(2.0)})]).json()["results"]["t"]["m_stderr,none"] == "N/A"


def test_the_table_fits_a_terminal_and_shows_every_number():
    console = Console(width=80, record=True, file=open("/dev/null", "w"))
    console.print(evaluation.evaluate(MeanModel(259), Bytes(), Pipeline(texts(9)), length=64, name="m").table())
    text = console.export_text()
    assert max(map(len, text.splitlines())) <= 80 and "…" not in text
    for word in ("bits_per_byte", "token_perplexity", "↓", "↑", "±", "Version", "n-shot"):
        assert word in text


def test_runs_are_compared_on_the_same_documents_only():
    def content(ids, numerator, denominator=(1.0, 1.0, 1.0), metric="m"):
        return {"units": {"t": vars(Units(metric, ids, numerator, list(denominator)))}}

    base = content(["a", "b", "c"], [1.0, 2.0, 3.0])
    (found,) = results.compare([base, content(["a", "b", "c"], [1.5, 2.5, 3.8])], "t")
    assert found.value == pytest.approx(0.6) and found.n == 3
    assert found.stderr == pytest.approx(np.std([0.5, 0.5, 0.8], ddof=1) / np.sqrt(3))
    for other in (
        content(["a", "b", "d"], [1.0, 2.0, 3.0]),
        content(["a", "b", "c"], [1.0, 2.0, 3.0], (2.0, 1.0, 1.0)),
        content(["a", "b", "c"], [1.0, 2.0, 3.0], metric="other"),
        {},
    ):
        assert results.compare([base, other], "t") == [None]


def test_paired_differences_of_two_models_are_those_of_their_bits():
    pipeline = Pipeline(texts(30, seed=5))
    one, two = (evaluation.evaluate(MeanModel(259, seed=s), Bytes(), pipeline, length=64) for s in (0, 1))
    (gap,) = results.compare([one.json(), two.json()], "heldout")
    values = [found.found["heldout"].metrics["bits_per_byte"].value for found in (one, two)]
    assert gap.value == pytest.approx(values[1] - values[0])


def test_the_cache_answers_only_the_same_question(tmp_path):
    model, pipeline = MeanModel(259), Pipeline(texts(6))

    def ask(**options):
        return evaluation.evaluate(model, Bytes(), pipeline, length=32, cache=str(tmp_path), **options)

    first = ask()
    assert len(list(tmp_path.iterdir())) == 1
    again = ask()
    assert again.json()["results"] == first.json()["results"] and again.json()["units"] == first.json()["units"]
    assert len(list(tmp_path.iterdir())) == 1
    assert ask(limit=2).json()["results"] != first.json()["results"]
    ask(params={"heldout": {"max_tokens": 5}})
    assert len(list(tmp_path.iterdir())) == 3
    model.head[...] = model.head[...] * 0.5
    assert ask().json()["results"] != first.json()["results"]
    for file in tmp_path.iterdir():
        file.write_text(file.read_text()[:40])
    with pytest.raises(EvaluationError, match="delete it to have the task run again"):
        ask()
