"""Tasks of lm-evaluation-harness through eval.py: found by name, fed from local files, scored as worked out by hand."""

import functools
import json
import math
import shutil
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from evaluation_standins import Bytes, MeanModel, mean_model_log_probs

import data
import eval as program
import evaluation
import models
from configs.errors import UserError
from evaluation import EvaluationError
from evaluation.contract import EvalContext
from evaluation.harness import tasks as foreign
from evaluation.harness.program import prepare

HERE = Path(__file__).parent / "harness"
DATA, TASKS = str(HERE / "data"), str(HERE / "tasks")
sys.path.insert(0, str(HERE))
import peer  # noqa: E402

SMALL = (
    "model.width=16,model.depth=1,model.max_length=64,model.mlp.width=16,model.attention.heads=2,"
    "model.attention.kv_heads=1,model.attention.head_dim=8,data.length=32,data.max_files=40,data.heldout_share=0.5"
)


@pytest.fixture(autouse=True, scope="module")
def quick_compilation():
    """Small networks: compiling them is what takes the time."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """The context of an evaluation of the peer's model."""
    folder = peer.write(tmp_path_factory.mktemp("llama"), "bos")
    loaded = models.load_pretrained(folder)
    return EvalContext(loaded.model, data.load_tokenizer(folder), batch_size=4, bootstrap_iterations=50)


@pytest.fixture(scope="module")
def log_probability(llama):
    """log p of a continuation after a context, in float64 from the model's logits, one request at a time."""
    logits = jax.jit(lambda ids: llama.model(ids).logits)

    @functools.cache
    def score(context, continuation):
        bos, encode = llama.tokenizer.bos_id, llama.tokenizer.encode
        before = [bos, *encode(context)]
        stream = [bos, *encode(context + continuation)]
        ids = np.zeros((1, peer.LENGTH), np.int32)
        ids[0, : len(stream) - 1] = stream[:-1]
        found = np.asarray(logits(ids), np.float64)[0]
        found -= np.log(np.exp(found).sum(-1, keepdims=True))
        return sum(found[place - 1, stream[place]] for place in range(len(before), len(stream)))

    return score


@pytest.fixture(scope="module")
def tiny(llama):
    """What the harness finds on the local folder."""
    return prepare(["tiny_quiz", "tiny_pages"], include=TASKS, batch_size=4).run(llama)


def rows(name):
    return [json.loads(line) for line in (HERE / "tasks" / f"{name}.jsonl").read_text().splitlines()]


def prompts(name, **options):
    """(arguments of its requests by document, its task) of a task of the harness on the local data."""
    (task,) = prepare([name], data_root=DATA, **options).tasks
    task.set_config("num_fewshot", options.get("num_fewshot", 0))
    task.set_fewshot_seed(1234)
    task.build_all_requests()
    found = {}
    for instance in task.instances:
        found.setdefault(instance.doc_id, []).append(instance.args)
    return list(found.values()), task


# Scores


def test_multiple_choice_is_scored_as_worked_out_by_hand(tiny, log_probability):
    right, normalised = [], []
    for row in rows("quiz"):
        scores = [log_probability(row["question"], f" {option}") for option in row["options"]]
        right.append(np.argmax(scores) == row["answer"])
        lengths = [len(option) for option in row["options"]]
        normalised.append(np.argmax(np.array(scores) / lengths) == row["answer"])
    entry = tiny["results"]["tiny_quiz"]
    assert (entry["acc,none"], entry["acc_norm,none"]) == (np.mean(right), np.mean(normalised))
    assert entry["acc_stderr,none"] == pytest.approx(np.std(right, ddof=1) / math.sqrt(3))
    first = tiny["samples"]["tiny_quiz"][0]
    assert first["arguments"]["gen_args_1"] == {"arg_0": "The sky is", "arg_1": " a loaf of bread"}
    assert first["resps"][1][0][0] == pytest.approx(log_probability("The sky is", " a loaf of bread"), abs=1e-4)
    assert tiny["units"]["tiny_quiz"]["numerator"] == list(map(float, right))


def test_rolling_perplexities_are_those_worked_out_by_hand(tiny, log_probability):
    pages = [row["page"] for row in rows("pages")]
    total = sum(log_probability("", page) for page in pages)
    words, size = sum(len(page.split(" ")) for page in pages), sum(len(page.encode()) for page in pages)
    entry = tiny["results"]["tiny_pages"]
    assert entry["word_perplexity,none"] == pytest.approx(math.exp(-total / words), rel=1e-4)
    assert entry["byte_perplexity,none"] == pytest.approx(math.exp(-total / size), rel=1e-4)
    assert entry["bits_per_byte,none"] == pytest.approx(-total / size / math.log(2), rel=1e-4)
    units = tiny["units"]["tiny_pages"]
    assert sum(units["numerator"]) / sum(units["denominator"]) == pytest.approx(entry["bits_per_byte,none"])


def test_a_model_that_knows_nothing_is_at_chance(llama, tmp_path):
    generator = np.random.default_rng(0)
    words = ["".join(generator.choice(list("abcdefgh"), 5)) for _ in range(800)]
    quiz = [{"question": "Which?", "options": words[4 * i : 4 * i + 4], "answer": i % 4} for i in range(200)]
    (tmp_path / "quiz.jsonl").write_text("".join(json.dumps(row) + "\n" for row in quiz))
    shutil.copy(HERE / "tasks" / "tiny_quiz.yaml", tmp_path)
    entry = prepare(["tiny_quiz"], include=str(tmp_path), batch_size=64).run(llama)["results"]["tiny_quiz"]
    assert abs(entry["acc,none"] - 0.25) < 4 * math.sqrt(0.25 * 0.75 / 200)


# The harness's own tasks on local files


@pytest.mark.parametrize(
    ("name", "context", "continuations"),
    [
        ("arc_easy", "Question: Which is hot?\nAnswer:", [" ice", " fire", " snow", " rain"]),
        ("arc_challenge", "Question: Which is a metal?\nAnswer:", [" iron", " wood", " glass", " wool"]),
        ("hellaswag", "Making tea: A man boils water slowly. The man",
         [" pours it in a cup.", " eats the cup.", " flies away.", " sleeps well."]),
        ("piqa", "Question: Dry a wet cup\nAnswer:", [" use a towel", " use more water"]),
        ("openbookqa", "The sun gives", [" light", " soup", " books", " shoes"]),
        ("mmlu_anatomy", "The following are multiple choice questions (with answers) about anatomy.\n\nWhich organ "
         "pumps blood?\nA. heart\nB. sun\nC. stone\nD. leg\nAnswer:", [" A", " B", " C", " D"]),
    ],
)  # fmt: skip
def test_prompts_of_the_harness_s_tasks_come_from_local_files(name, context, continuations):
    (first, *_), _ = prompts(name)
    assert [before for before, _ in first] == [context] * len(continuations)
    assert [after for _, after in first] == continuations


def test_winogrande_and_wikitext_from_local_files():
    (first, *_), _ = prompts("winogrande")
    after = " was too big."
    assert first == [(f"The cup did not fit in the bag because the {option}", after) for option in ("cup", "bag")]
    (first, _), task = prompts("wikitext")
    assert first[0][0].endswith("Tea is a drink, made of leaves. It is 2.5 thousand years old .\n")
    page = task.eval_docs[0]["page"]
    found = task.process_results(task.eval_docs[0], [-7.0])
    assert found["word_perplexity"] == (-7.0, len(page.replace("\n", " \n ").split()) + 2)  # Empty ends count there.
    assert found["byte_perplexity"] == (-7.0, len(page))


def test_worked_examples_come_before_the_question():
    (first, *_), _ = prompts("mmlu_astronomy", num_fewshot=2)
    context = first[0][0]
    assert context.index("Example 0?") < context.index("Example 1?") < context.index("Which is a star?")
    assert "A. a\nB. b\nC. c\nD. d\nAnswer: A\n\nExample 1?" in context


def test_names_are_found_without_reading_every_file():
    catalogue = foreign.Catalogue(TASKS)
    assert set(catalogue.own) == {"tiny", "tiny_quiz", "tiny_pages", "tiny_answer"}
    assert catalogue.expand(["tiny_*"]) == [name for name in catalogue.own if name.startswith("tiny_")]
    assert {"mmlu", "hellaswag", "gsm8k", "multiple_choice"} <= set(foreign._defined())
    index = catalogue.manager(["mmlu_stem", "tiny"]).task_index
    members = foreign._members(index, ["mmlu_stem"])
    assert {"mmlu_stem_tasks", "mmlu_anatomy", "mmlu_college_physics"} <= members and len(members) == 2 + 19
    assert "hellaswag" not in index


# Mistakes


def yaml(folder, text, **rows_):
    for name, content in rows_.items():
        (folder / f"{name}.jsonl").write_text(content)
    (folder / "mine.yaml").write_text(text)
    return {"include": str(folder)}


MINE = (HERE / "tasks" / "tiny_quiz.yaml").read_text().replace("tiny_quiz", "mine")
CODE = MINE.replace("json", "owner/set").replace("dataset_kwargs:", "dataset_kwargs:\n  trust_remote_code: true")
ROW = '{"question": "a", "options": ["b", "c"], "answer": 0}\n'


@pytest.mark.parametrize(
    ("text", "content", "message"),
    [
        (MINE, "", "holds no document"),
        (MINE, ROW + "{", "quiz.jsonl, line 2: not JSON"),
        (MINE, ROW + "[1]\n", "line 2: a JSON list"),
        (MINE.replace("quiz.jsonl", "nowhere.jsonl"), ROW, "no file nowhere.jsonl or"),
        (MINE.replace("{{question}}", "{{question"), ROW, "cannot be made"),
        (MINE.replace("doc_to_text", "doc_to_txt"), ROW, "doc_to_txt"),
        (MINE + "  - [", ROW, "mine.yaml cannot be read as a task"),
        (CODE, ROW, "trust_remote_code"),
        (MINE.replace("json", "owner/set", 1), ROW, "'owner/set' cannot be had"),
        (MINE + "unsafe_code: true\n", ROW, "runs code that models write"),
    ],
)  # fmt: skip
def test_mistakes_in_a_folder_of_tasks_are_told_in_one_line(tmp_path, text, content, message):
    with pytest.raises(EvaluationError, match=message) as error:
        prepare(["mine"], **yaml(tmp_path, text, quiz=content))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("helaswag", {}, "did you mean hellaswag"),
        ("arc_easy", {"data_root": "no/folder"}, "no such folder"),
        ("arc_easy", {"include": "no/folder"}, "no such folder"),
        ("boolq", {"data_root": DATA}, r"task boolq: there is no .*super_glue/boolq/validation\{.jsonl,.parquet\} or"),
        ("piqa", {"data_root": DATA, "num_fewshot": 2}, "train.* \\(2 worked examples\\)"),
        ("piqa", {}, "DIR/baber/piqa/validation"),
        ("piqa", {"data_root": DATA, "picked": {"piqa": [2]}}, "it has 2: 0 to 1"),
        ("piqa", {"data_root": DATA, "picked": {"arc_easy": [0]}}, "not among the tasks"),
    ],
)
def test_tasks_that_cannot_run_are_told_in_one_line(name, options, message):
    with pytest.raises(EvaluationError, match=message) as error:
        prepare([name], **options)
    assert "\n" not in str(error.value)


def test_without_the_harness_it_is_named(monkeypatch):
    monkeypatch.setattr(foreign, "installed", lambda: False)
    with pytest.raises(UserError, match=r"unknown task 'arc_easy'.*pip install 'tessera\[harness\]'"):
        program.main(["--model=gqa", "--tasks=arc_easy"])
    with pytest.raises(EvaluationError, match="pip install"):
        foreign.Catalogue()


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--tasks=tiny_quizz", f"--include_path={TASKS}"], "did you mean tiny_quiz"),
        (["--tasks=heldout", f"--data_root={DATA}"], "--data_root"),
        (["--tasks=piqa", f"--data_root={DATA}", "--seed=1,x"], "--seed must be one to four"),
        (["--tasks=piqa", f"--data_root={DATA}", "--params=harness.bos=true"], "harness.add_bos"),
        (["--tasks=tiny", f"--include_path={TASKS}", "--apply_chat_template"], "no chat template"),
    ],
)  # fmt: skip
def test_mistakes_on_the_command_line(argv, message):
    with pytest.raises(UserError, match=message):
        program.main(["--model=gqa", *argv])


# The command line


def test_one_command_runs_tasks_of_both_kinds(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    argv = ["--model=gqa", f"--model_args={SMALL}", "--tasks=perplexity,tiny", f"--include_path={TASKS}"]
    argv += [f"--params=perplexity.files={HERE}/tasks/quiz.jsonl,{HERE}/peer.py,perplexity.text_field=question"]
    argv += ["--limit=2", f"-o={tmp_path}", "-s", "--bootstrap_iters=20", "-b=4", "--gen_kwargs=max_gen_toks=5"]
    argv += [f"-c={tmp_path}/cache"]
    assert program.main(argv) == 0
    said = capsys.readouterr()
    assert "tiny_quiz" in said.out and "perplexity" in said.out and not said.err
    (file,) = tmp_path.rglob("results_*.json")
    found = json.loads(file.read_text())
    assert list(found["results"]) == ["perplexity", "tiny_quiz", "tiny_answer"]
    assert found["n-samples"]["tiny_quiz"] == {"original": 3, "effective": 2}
    assert found["n-samples"]["perplexity"] == {"original": 4, "effective": 2}
    assert found["group_subtasks"] == {"tiny": ["tiny_quiz", "tiny_answer"]} and "acc,none" in found["groups"]["tiny"]
    assert found["higher_is_better"]["tiny_quiz"] == {"acc": True, "acc_norm": True}
    assert found["config"]["harness"]["lm_eval"] and found["run"]["attention"] == "mha"
    assert found["versions"]["tiny_quiz"] == 1.0 and found["n-shot"]["tiny_quiz"] == 0
    assert found["configs"]["tiny_answer"]["generation_kwargs"]["max_gen_toks"] == 5
    assert len(found["task_hashes"]["tiny_answer"]) == 64
    (samples,) = tmp_path.rglob("samples_tiny_answer_*.jsonl")
    lines = [json.loads(line) for line in samples.read_text().splitlines()]
    assert [line["doc_id"] for line in lines] == [0, 1] and "exact_match" in lines[0]
    assert program.main(argv) == 0  # From what was kept.
    again = json.loads(max(tmp_path.rglob("results_*.json")).read_text())
    assert again["results"] == found["results"]


# Perplexity of files, by our own task


@pytest.mark.parametrize("mode", ["rolling", "first", "sliding"])
def test_perplexity_of_files_is_that_worked_out_by_hand(tmp_path, mode):
    texts = ["one two  three four five six\n", "seven eight"]
    (tmp_path / "a.txt").write_text(texts[0])
    (tmp_path / "b.jsonl").write_text(json.dumps({"text": texts[1]}) + "\n")
    model, length = MeanModel(259, seed=3), 8
    params = {"files": (f"{tmp_path}/a.txt", f"{tmp_path}/b.jsonl"), "mode": mode, "length": length, "stride": 3}
    found = evaluation.evaluate(
        model, Bytes(), None, ["perplexity"], length=length, params={"perplexity": params}, batch_size=2
    )
    total, words, size = 0.0, 0, 0
    for text in texts:
        ids = list(text.encode())[: length if mode == "first" else None]
        stream = [256, *ids]
        for place in range(1, len(stream)):
            if mode == "sliding":  # The window that scores this token: after the first, of `length` inputs to its end.
                ends = [length, *range(length + 3, len(ids), 3), len(ids)]
                end = next(end for end in ends if end >= place)
            else:
                end = min(len(ids), -(-place // length) * length)
            inputs = stream[max(0, end - length) : place]
            total += mean_model_log_probs(model, inputs)[-1][stream[place]]
        words += len(bytes(ids).decode().split()) + (text.endswith("\n") if mode == "rolling" else 0)
        size += len(ids)
    metrics = {name: metric.value for name, metric in found.found["perplexity"].metrics.items()}
    assert metrics["word_perplexity"] == pytest.approx(math.exp(-total / words), rel=1e-4)
    assert metrics["byte_perplexity"] == pytest.approx(math.exp(-total / size), rel=1e-4)
    assert metrics["bits_per_byte"] == pytest.approx(-total / size / math.log(2), rel=1e-4)
    assert metrics["token_perplexity"] == pytest.approx(math.exp(-total / size), rel=1e-4)  # A byte is a token here.


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({}, "perplexity needs files"),
        ({"files": "nowhere.txt"}, "no such file"),
        ({"files": "x.txt", "mode": "fast"}, "mode must be one of"),
        ({"files": "x.txt", "mode": "first"}, "needs perplexity.length"),
        ({"files": "x.txt", "length": 99}, "between 1 and the model's 16"),
        ({"files": "x.txt", "mode": "sliding", "stride": 20}, "stride must be"),
    ],
)
def test_mistakes_of_perplexity_are_told(params, message):
    with pytest.raises(EvaluationError, match=message):
        evaluation.evaluate(MeanModel(259), Bytes(), None, ["perplexity"], length=16, params={"perplexity": params})
