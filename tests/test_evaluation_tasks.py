"""The registry, the retrieval tasks with scripted answers, the samples, and the associative-recall probe."""

import dataclasses

import numpy as np
import pytest
from evaluation_standins import Bytes, MeanModel, Pipeline, texts
from flax import nnx

import evaluation
from configs import command_line, fields
from data.procedural import mqar as procedural
from evaluation import EvaluationError, tasks
from evaluation.completion import clean, complete, cut, generation_options, string_match_all
from evaluation.contract import EvalContext, count


class Scripted:
    """A generator that answers by a function of the prompt's text, and notes what it was asked."""

    def __init__(self, answer) -> None:
        self.answer, self.calls = answer, []

    def __call__(self, model, prompts, *, max_new_tokens, stop_ids=(), **options):
        self.calls.append((prompts, max_new_tokens, options))
        return [Bytes().encode(self.answer(Bytes().decode(prompt)))[:max_new_tokens] for prompt in prompts]


def context(answer=lambda prompt: "", **changes) -> EvalContext:
    return EvalContext(MeanModel(259), Bytes(), length=2048, generate=Scripted(answer), **changes)


def run(name, answer, params=None, **changes):
    return tasks.get(name).run(context(answer, params=params or {}, **changes))


def between(text: str, before: str, after: str) -> str:
    return text.partition(before)[2].partition(after)[0]


def test_names_groups_and_wildcards_find_each_task_once():
    niah = [name for name in tasks.names() if name.startswith("niah_")]
    assert len(niah) == 8
    assert sorted(task.name for task in tasks.match(["niah"])) == niah
    assert [task.name for task in tasks.match(["niah_single_*"])] == ["niah_single_1", "niah_single_2", "niah_single_3"]
    assert [task.name for task in tasks.match(["mqar", "niah_single_1", "niah_single_?", "mqar"])] == [
        "mqar",
        "niah_single_1",
        "niah_single_2",
        "niah_single_3",
    ]


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("heldot", "did you mean heldout"),
        ("niah_singel_1", "niah_single_1"),
        ("zz*", "no task matches"),
        ("", "unknown task"),
    ],
)
def test_unknown_names_name_near_ones(pattern, message):
    with pytest.raises(EvaluationError, match=message):
        tasks.match([pattern])


def test_mistakes_are_told_before_any_work():
    def fails(match, **options):
        with pytest.raises(EvaluationError, match=match):
            evaluation.evaluate(MeanModel(259), Bytes(), Pipeline(texts(2)), **options)

    fails("did you mean max_tokens", params={"heldout": {"max_token": 3}})
    fails("not among the tasks", params={"needle": {}})
    fails("must be a number", params={"heldout": {"max_tokens": "many"}})
    fails("must be a whole number", params={"heldout": {"max_tokens": "1.5"}})
    fails("not among the tasks", picked={"needle": [0]})
    fails("unknown task", tasks=["heldout", "nothing"])


def test_included_tasks_run_and_may_not_hide_others(tmp_path, monkeypatch):
    monkeypatch.setattr(tasks, "_included", {})
    code = """
from evaluation import Metric, Task, TaskResult
TASKS = (Task("{name}", lambda context: TaskResult("{name}", {{"x": Metric(1.5)}}), "probe", "a test"),)
"""
    (tmp_path / "more.py").write_text(code.format(name="mine"))
    assert tasks.include(tmp_path) == ("mine",)
    assert evaluation.evaluate(MeanModel(259), Bytes(), None, ["mine"]).scalars() == {"eval/mine/x": 1.5}
    (tmp_path / "more.py").write_text(code.format(name="heldout"))
    with pytest.raises(EvaluationError, match="exists already"):
        tasks.include(tmp_path)
    with pytest.raises(EvaluationError, match="no task file"):
        tasks.include(tmp_path / "nowhere")


@pytest.mark.parametrize(("limit", "expected"), [(0, 10), (3, 3), (50, 10), (0.25, 2), (0.01, 1), (1, 1)])
def test_limits(limit, expected):
    assert count(limit, 10) == expected


def test_passkey_is_found_by_who_reads_and_missed_by_who_does_not():
    def reader(prompt):
        return " " + between(prompt, "The pass key is ", ".") + "."

    found = run("passkey", reader, {"samples": "1", "depths": "0:50:100", "lengths": "512:1024"})
    assert found.metrics["match"].value == 1.0
    assert found.effective == 6
    grid = found.grids["match"]
    assert (list(grid.rows), list(grid.columns)) == (["0 %", "50 %", "100 %"], ["512", "1024"])
    assert np.array(grid.values).tolist() == [[1, 1], [1, 1], [1, 1]]
    missed = run("passkey", lambda prompt: " 00000", {"samples": "1"})
    assert missed.metrics["match"].value == 0.0


def test_depth_of_the_needle_lands_in_its_row():
    """A reader that sees only the last half of its context finds the deep needles and no others."""

    def short_sighted(prompt):
        return between(prompt[len(prompt) // 2 :], "The pass key is ", ".")

    found = run("passkey", short_sighted, {"samples": 2, "depths": "0:100", "lengths": "2048"})
    assert [row[0] for row in found.grids["match"].values] == [0.0, 1.0]
    assert found.metrics["match"].value == 0.5
    assert found.metrics["match"].stderr == pytest.approx(np.std([0, 0, 1, 1], ddof=1) / 2)


def test_ruler_needles_count_every_answer():
    def two_of_four(prompt):
        key = between(prompt, "mentioned in the provided text", "\0")  # The answer prefix repeats the query.
        del key
        values = [part.partition(".")[0] for part in prompt.split(" is: ")[1:]]
        return ", ".join(values[:2])

    found = run("niah_multivalue", two_of_four, {"samples": 4, "lengths": "2048"})
    assert found.metrics["2048"].value == 0.5
    assert found.metrics["average"].value == 0.5
    assert found.original == 4
    prompt = found.samples[0]["arguments"]["gen_args_0"]["arg_0"]
    assert prompt.endswith("mentioned in the provided text are")
    limited = run("niah_single_1", two_of_four, {"samples": 8, "lengths": "1024:2048"}, limit=3)
    assert (limited.effective, limited.original) == (6, 16)
    assert limited.metrics["1024"].value == 1.0


def test_lengths_beyond_the_model_are_refused():
    with pytest.raises(EvaluationError, match="this model takes 2048"):
        run("niah_single_1", str, {"lengths": "4096", "samples": 1})
    with pytest.raises(EvaluationError, match="too short"):
        run("niah_single_1", str, {"lengths": "300", "samples": 1})
    with pytest.raises(EvaluationError, match=r"task needle: .*too short"):
        run("needle", str, {"lengths": "100"})


def test_needle_gain_is_the_log_probability_the_needle_adds():
    from evaluation_standins import mean_model_log_probs

    found = run("needle", lambda prompt: "", {"depths": "0:60", "lengths": "600"})
    row = found.samples[0]
    tokenizer, model = Bytes(), MeanModel(259)
    needle, answer = tasks.get("needle").defaults["needle"], " " + tasks.get("needle").defaults["answer"]

    def bits(prompt):
        stream = [tokenizer.bos_id, *tokenizer.encode(prompt + answer)]
        log_probs = mean_model_log_probs(model, stream[:-1])[-len(answer) :]
        return log_probs[np.arange(len(answer)), stream[-len(answer) :]].sum() / np.log(2) / len(answer)

    prompt = row["doc"]["input"]
    assert prompt.count(needle) == 1
    expected = bits(prompt + "\nAnswer:") - bits(prompt.replace(needle, "") + "\nAnswer:")
    assert row["gain"] == pytest.approx(expected, abs=1e-5)
    assert found.metrics["gain"].value == pytest.approx(np.mean([row["gain"] for row in found.samples]))
    assert found.metrics["match"].value == 0.0


def test_string_match_is_rulers():
    assert string_match_all("It is ABC-def, and 12", ["abc-DEF", "34"]) == 0.5
    assert string_match_all("", ["x"]) == 0.0
    assert clean("\x00a\tb\x07 ") == "a\nb"


def test_completions_are_cut_and_keep_their_order():
    given = context(lambda prompt: f"<{prompt}>\nrest", batch_size=2)
    texts = complete(given, ["ccc", "a", "bb"], max_new_tokens=50, until=("\n",))
    assert texts == ["<ccc>", "<a>", "<bb>"]
    assert all(len(prompts) == 2 for prompts, _, _ in given.generate.calls)  # The last batch is filled up.
    assert cut("a b c", ("c", "b")) == "a " and cut("abc", ("", "x")) == "abc"


def test_prompts_too_long_lose_their_beginning_but_not_bos():
    given = dataclasses.replace(context(lambda prompt: prompt), length=20, system="S:")
    complete(given, ["0123456789" * 3], max_new_tokens=5)
    ((prompt,), new, _) = given.generate.calls[0]
    assert len(prompt) + new == 20 and prompt[0] == Bytes.bos_id
    assert Bytes().decode(prompt[1:]) == ("S:" + "0123456789" * 3)[-14:]
    with pytest.raises(EvaluationError, match="leave no room"):
        complete(given, ["a"], max_new_tokens=19)


def test_generation_options_have_two_names():
    assert generation_options({"max_gen_toks": 3, "temperature": 0.5}) == {"max_new_tokens": 3, "temperature": 0.5}
    with pytest.raises(EvaluationError, match="unknown generation option 'beams'"):
        generation_options({"beams": 3})
    given = context(lambda prompt: "", generation={"temperature": 0.9, "do_sample": False})
    complete(given, ["a"], max_new_tokens=3, temperature=0.7)
    assert given.generate.calls[0][2]["temperature"] == 0.0


def test_sample_is_greedy_then_drawn():
    found = run("sample", lambda prompt: prompt[::-1], {"prompts": "ab:c", "draws": 2})
    assert [(row["prompt"], row["text"], row["filter"]) for row in found.samples] == [
        ("ab", "ba", "greedy"),
        ("c", "c", "greedy"),
        ("ab", "ba", "sampled"),
        ("ab", "ba", "sampled"),
        ("c", "c", "sampled"),
        ("c", "c", "sampled"),
    ]


def probe(params, attention="gqa", **changes):
    config = command_line.load(f"configs/quickstart.py:attention={attention}")
    return tasks.get("mqar").run(EvalContext(None, None, config=config, params=params, **changes))


SMALL = {"vocab_size": 64, "slices": "16x2:16x4", "width": 32, "steps": 2, "batch_size": 16, "test_examples": 40}


def test_mqar_at_random_weights_is_at_chance_and_reports_its_slices():
    found = probe(SMALL)
    assert set(found.metrics) == {"accuracy", "accuracy_n16_k2", "accuracy_n16_k4"}
    assert found.metrics["accuracy"].value < 0.2
    assert np.shape(found.grids["accuracy"].values) == (2, 1)
    values = [row["accuracy"] for row in found.samples]
    assert found.metrics["accuracy"].value == pytest.approx(np.mean(values))
    assert (len(values), found.effective) == (80, 80)
    assert probe(SMALL).metrics == found.metrics  # The seed decides everything.


def test_mqar_accuracy_counts_queries_only(monkeypatch):
    """A model that knows every answer scores 1, whatever it says elsewhere; one that is wrong at one query loses it."""
    from evaluation.tasks import mqar

    task = procedural.MQAR(vocab_size=64, input_seq_len=32, num_kv_pairs=4)
    _, labels = procedural.generate(task, 20, (0, 1))
    params = {"test_examples": 20, "batch_size": 8}
    answers = np.where(labels == procedural.IGNORED, 7, labels)
    wrong = answers.copy()
    first = [int(np.flatnonzero(row != procedural.IGNORED)[0]) for row in labels]
    wrong[np.arange(20), first] = 0

    def play(truth):
        batches = iter([truth[0:8], truth[8:16], truth[[16, 17, 18, 19, 19, 19, 19, 19]]])
        monkeypatch.setattr(mqar, "_argmax", lambda graph, state, inputs: next(batches))
        return mqar._test(None, None, task, params, (0, 1))

    np.testing.assert_array_equal(play(answers), np.ones(20))
    np.testing.assert_array_equal(play(wrong), np.full(20, 0.75))


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"slices": "64"}, "pairs such as 64x4"),
        ({"slices": "16x8"}, "task mqar: MQAR"),
        ({"heads": 3}, "must divide"),
        ({"overrides": "attention.windo=3"}, "did you mean"),
    ],
)
def test_mqar_mistakes(params, message):
    from configs.errors import UserError

    with pytest.raises(UserError, match=message):
        probe({**SMALL, **params})


def test_mqar_shrinks_the_model_but_keeps_its_attention():
    from evaluation.tasks import mqar

    config = command_line.load("configs/quickstart.py:attention=mla")
    params = tasks.get("mqar").parameters({"width": 32, "heads": 2, "overrides": ("attention.kv_lora_rank=8",)})
    model = mqar.model_config(config, params, 64)
    assert (model.width, model.depth, model.max_length, model.attention.layer) == (32, 2, 64, "mla")
    assert (model.attention.heads, model.attention.kv_lora_rank) == (2, 8)
    assert fields.flat(config)["model.width"] == 128  # The run's own config is as it was.


def test_a_model_that_can_learn_does():
    """The probe's training works: what is copied over a short gap is learned, far above chance, by attention."""
    found = probe({**SMALL, "slices": "8x1", "vocab_size": 16, "depth": 2, "steps": 200, "batch_size": 32})
    assert found.metrics["accuracy"].value > 0.6  # Chance is 1 in 8.


def test_results_of_the_probe_need_a_config():
    with pytest.raises(EvaluationError, match="give a run or a config"):
        tasks.get("mqar").run(EvalContext(nnx.Module(), None))
