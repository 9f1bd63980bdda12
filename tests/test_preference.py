"""Preference optimisation: pairs of answers from records to rows, the loss against its formula, on many devices."""

import dataclasses
import functools
import gzip
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from flax import nnx

import data
import sharding
import train
from configs import attention, base, validate
from configs.errors import ConfigError
from configs.papers import x_ecomla
from data import preferences
from data.errors import DataError
from data.procedural import preferences as generated
from training import converting, objectives, run_folder, setup
from training.loading import load_run
from training.objectives import _teacher, dpo

ROOT = pathlib.Path(__file__).parents[1]
BEGIN, END, PAD = 256, 257, 258
LENGTH = 20


@pytest.fixture(autouse=True, scope="module")
def quick_compilation():
    """Tiny programs: compiling them well costs far more than running them."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


def records(count: int = 12) -> list[dict]:
    return [{"prompt": f"p{i} ", "chosen": "good" * (1 + i % 2), "rejected": "bad" * (1 + i % 3)} for i in range(count)]


def stored(folder: pathlib.Path, given: list, name: str = "pairs.jsonl") -> pathlib.Path:
    path = folder / name
    path.write_text("".join(json.dumps(record) + "\n" for record in given))
    return path


def config_for(path: pathlib.Path, **fields):
    config = base.data()
    config.update(sources=(str(path),), form="preferences", length=LENGTH, batch_size=4, heldout_share=0.2)
    config.update(fields)
    return config


def rows(*given: tuple[str, str, str], length: int = LENGTH, max_prompt: int = 0) -> data.Batch:
    pairs = [preferences.Pair(*each) for each in given]
    return preferences.PairRows(pairs, length, data.ByteTokenizer(), None, max_prompt).gather(np.arange(len(pairs)))


# Rows.


def test_a_pair_is_two_rows_and_only_answers_count():
    batch = rows(("ab", "xyz", "q"), ("", "", "vw"))
    assert {name: value.shape for name, value in batch.items()} == {
        name: (2, 2, LENGTH) for name in ("inputs", "targets", "segment", "position", "completion")
    } | {"weight": (2,)}
    expected = {
        (0, 0): ([BEGIN, *b"abxyz"], [*b"abxyz", END], [0, 0, 1, 1, 1, 1]),
        (0, 1): ([BEGIN, *b"abq"], [*b"abq", END], [0, 0, 1, 1]),
        (1, 0): ([BEGIN], [END], [1]),
        (1, 1): ([BEGIN, *b"vw"], [*b"vw", END], [1, 1, 1]),
    }
    for place, (inputs, targets, completion) in expected.items():
        rest = LENGTH - len(inputs)
        assert batch["inputs"][place].tolist() == inputs + [PAD] * rest
        assert batch["targets"][place].tolist() == targets + [PAD] * rest
        assert batch["completion"][place].tolist() == completion + [0] * rest
        assert batch["segment"][place].tolist() == [1] * len(inputs) + [0] * rest
        assert batch["position"][place].tolist() == [*range(len(inputs)), *[0] * rest]


def test_what_is_too_long_loses_the_front_of_its_prompt_and_then_the_end_of_its_answers():
    fits = rows(("abcdef", "xyz", "q"), length=10)  # 6 + 3 + 1 places.
    assert fits["targets"][0, 0].tolist() == [*b"abcdefxyz", END]
    cut = rows(("abcdef", "wxyz", "q"), length=10, max_prompt=3)
    assert cut["inputs"][0, 1, :5].tolist() == [BEGIN, *b"defq"] and cut["completion"][0, 1].sum() == 2
    assert cut["targets"][0, 0].tolist() == [*b"defwxyz", END, PAD, PAD]
    longer = rows(("abcdef", "0123456789", "q"), length=10)  # Half of the row for the prompt.
    assert longer["targets"][0].tolist() == [[*b"bcdef01234"], [*b"bcdefq", END, PAD, PAD, PAD]]
    assert longer["completion"][0].sum(-1).tolist() == [5, 2]


def test_order_resume_and_processes(tmp_path):
    """Every epoch has every pair once; a saved position goes on bit for bit, with another number of processes too."""
    pipeline = data.build(config_for(stored(tmp_path, records())), seed=3)
    straight, size = pipeline.train(), pipeline.rows.rows_per_epoch
    batches = [next(straight) for _ in range(-(-3 * size // 4))]
    prompts = [bytes(row[1:4].astype(np.uint8)) for batch in batches for row in batch["inputs"][:, 0]]
    held = {document.text.split(" ")[0] for document in pipeline.heldout_documents()}
    for epoch in range(3):
        own = prompts[epoch * size : (epoch + 1) * size]
        assert len(set(own)) == size and not {prompt.decode().split(" ")[0] for prompt in own} & held
    assert prompts[:size] != prompts[size : 2 * size] and size + len(held) == 12
    again = data.build(config_for(stored(tmp_path, records())), seed=3).train()
    next(again)
    state = json.loads(json.dumps(again.get_state()))
    shares = []
    for p in range(2):
        share = data.build(config_for(tmp_path / "pairs.jsonl"), seed=3, process_index=p, process_count=2).train()
        share.set_state(state)
        shares.append(next(share))
    for name, value in batches[1].items():
        np.testing.assert_array_equal(np.concatenate([share[name] for share in shares]), value)
    other = data.build(config_for(tmp_path / "pairs.jsonl", max_prompt=3), seed=3).train()
    with pytest.raises(DataError, match="max_prompt was 0 and is 3"):
        other.set_state(state)


def test_what_is_held_out(tmp_path):
    pipeline = data.build(config_for(stored(tmp_path, records()), heldout_share=0.5), seed=0)
    pairs = preferences.pairs(pipeline.corpus.heldout)
    batches = list(pipeline.heldout_pairs(4))
    assert sum(batch["weight"].sum() for batch in batches) == len(pairs) > 4
    assert [batch["weight"].shape for batch in batches] == [(4,)] * -(-len(pairs) // 4)
    first = pipeline.tokenizer.decode(batches[0]["targets"][0, 1][batches[0]["completion"][0, 1] > 0].tolist())
    assert first == pairs[0].rejected
    assert pipeline.heldout_documents()[0].text == pairs[0].prompt + pairs[0].chosen
    (batch,) = pipeline.heldout_batches(len(pairs), LENGTH)
    assert (
        pipeline.tokenizer.decode(batch["targets"][0][batch["weight"][0] > 0].tolist())
        == pairs[0].prompt + pairs[0].chosen
    )


def turns(*texts: str) -> list[dict[str, str]]:
    roles = ["user", "assistant"] * len(texts)
    return [{"content": text, "role": role} for text, role in zip(texts, roles, strict=False)]


CONVERSATION = {"prompt": "Hi", "chosen": turns("Hi", "{role}!"), "rejected": turns("Hi", "no"), "score_chosen": 9.0}


@pytest.mark.parametrize("kind", ["jsonl", "jsonl.gz", "parquet"])
def test_conversations_are_written_out(tmp_path, kind):
    """UltraFeedback's layout: the prompt is what the answers have in common; braces in a text are text."""
    given = [
        CONVERSATION,
        CONVERSATION | {"chosen": turns("Hi", "b", "c", "d"), "rejected": turns("Hi", "b", "c", "e")},
    ]
    path = stored(tmp_path, given)
    if kind == "jsonl.gz":
        path = tmp_path / "pairs.jsonl.gz"
        path.write_bytes(gzip.compress((tmp_path / "pairs.jsonl").read_bytes()))
    elif kind == "parquet":
        path = tmp_path / "pairs.parquet"
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(given), path)
    config = config_for(path, heldout_share=0.0, message_format="[{role}] {content};")
    found = sorted(preferences.pairs(data.build(config, seed=0).corpus.train[0]))
    assert found == [
        ("[user] Hi;[assistant] ", "{role}!;", "no;"),
        ("[user] Hi;[assistant] b;[user] c;[assistant] ", "d;", "e;"),
    ]


@pytest.mark.parametrize(
    ("record", "says"),
    [
        ({"prompt": "a", "chosen": "b"}, "no field 'rejected' (its fields: prompt, chosen; see config.data.form"),
        ({"chosen": "b", "rejected": "c"}, "no field 'prompt' before the texts"),
        ({"prompt": "a", "chosen": "b", "rejected": 3}, "field 'rejected' holds int, not text"),
        ({"prompt": "a", "chosen": turns("b", "c"), "rejected": "d"}, "field 'chosen' holds list, not text"),
        ({"chosen": turns("a", "b"), "rejected": turns("c", "d")}, "answer different conversations"),
        ({"chosen": turns("a"), "rejected": turns("a", "b")}, "field 'chosen' does not end with a message of the assi"),
        (
            {"chosen": turns("a", "b"), "rejected": [{"role": "user"}]},
            "'rejected' has no texts 'role' and 'content' in",
        ),
        ([1], "a JSON list, not an object with the field 'chosen'"),
    ],
)
def test_bad_records_are_named(tmp_path, record, says):
    path = stored(tmp_path, [*records(3), record])
    with pytest.raises(DataError) as error:
        data.build(config_for(path), seed=0)
    assert str(error.value).startswith(f"{path}:4: ") and says in str(error.value) and "\n" not in str(error.value)
    pipeline = data.build(config_for(path, max_bad_share=0.3), seed=0)
    assert "1 records skipped" in pipeline.describe()


def test_other_input_that_is_none(tmp_path):
    with pytest.raises(DataError, match=r"notes.md: preferences are records, of .jsonl or .parquet files"):
        (tmp_path / "notes.md").write_text("x")
        data.build(config_for(tmp_path / "notes.md"), seed=0)
    with pytest.raises(DataError, match="preferences take that of the run they start from"):
        data.build(config_for(stored(tmp_path, records()), tokenizer="bpe:300"), seed=0)
    with pytest.raises(DataError, match="a single pair cannot be both trained on and held out"):
        data.build(config_for(stored(tmp_path, records(1))), seed=0).train()


def test_generated_pairs(tmp_path):
    texts = ["".join(f"line number {i} of {name}\n" for i in range(30)) for name in ("first", "second")]
    found, again = (generated.generate(texts, 20, seed=1) for _ in range(2))
    assert found == again != generated.generate(texts, 20, seed=2)
    for record in found:
        assert any(record["prompt"] + record["chosen"] in text for text in texts)
        wrong = [a != b for a, b in zip(record["chosen"], record["rejected"], strict=True)]
        letters = sum(letter.isalnum() for letter in record["chosen"])
        assert sum(wrong) == round(0.3 * letters) and record["prompt"].count("\n") == 4
    for record in generated.generate(texts, 20, seed=1, kind="elsewhere"):
        (own,) = (text for text in texts if record["prompt"] + record["chosen"] in text)
        assert record["rejected"] in own and record["rejected"] != record["chosen"]
    generated.write(found, tmp_path / "a" / "pairs.jsonl")
    assert len(data.build(config_for(tmp_path / "a"), seed=0).corpus.train[0]) > 10
    with pytest.raises(DataError, match="fewer than 90: give more texts"):
        generated.generate(texts, 90, seed=0)


# The loss.


def config(**fields):
    made = base.get_config()
    made.model.width, made.model.depth, made.model.max_length, made.model.mlp.width = 16, 1, LENGTH, 24
    made.model.attention = attention.get("gqa")
    made.model.attention.update(heads=4, kv_heads=2, head_dim=4)
    made.objective.name, made.objective.beta, made.train.init_from, made.data.form = "dpo", 0.3, "x", "preferences"
    made.data.length, made.data.batch_size = LENGTH, 4
    for name, value in fields.items():
        group, _, field = name.rpartition("__")
        made[group][field] = value
    return made


@functools.cache
def structure():
    return setup.network(config(), data.ByteTokenizer())


@functools.cache
def network(seed: int):
    """A network of random arrays."""
    draw = np.random.default_rng(seed)
    params, rest = structure().abstract()
    fill = lambda leaf: jnp.asarray(0.3 * draw.standard_normal(leaf.shape), leaf.dtype)  # noqa: E731
    return structure().merge({name: fill(leaf) for name, leaf in params.items()}, rest)


def batch() -> data.Batch:
    made = rows(("ab", "xyz", "q"), ("c", "d", "efg"), ("hello", "you", "me!"), ("", "k", "lm"))
    made["weight"][3] = 0
    return made


def log_probabilities(model, given: data.Batch) -> np.ndarray:
    """[B, 2], answer by answer and token by token in float64."""
    logits = np.asarray(forward(model, given["inputs"].reshape(-1, LENGTH)), np.float64)
    logits = logits[..., : data.ByteTokenizer.vocab_size].reshape(*given["inputs"].shape, -1)
    found = np.zeros(given["inputs"].shape[:2])
    for place in np.ndindex(found.shape):
        for t in np.flatnonzero(given["completion"][place]):
            one = logits[(*place, t)]
            found[place] += one[given["targets"][(*place, t)]] - one.max() - np.log(np.exp(one - one.max()).sum())
    return found


def forward(model, ids: np.ndarray):
    definition, state = nnx.split(model)
    return _forward(definition, state, jnp.asarray(ids))


@functools.partial(jax.jit, static_argnums=0)
def _forward(definition, state, ids):
    return nnx.merge(definition, state)(ids).logits


def formula(policy: np.ndarray, reference: np.ndarray, weight: np.ndarray, beta: float, smoothing: float) -> dict:
    """The mean over pairs of -log sigmoid(beta ((lp_c - lr_c) - (lp_r - lr_r))), and what is told of it."""
    rewards = beta * (policy - reference)
    margin = (policy[:, 0] - reference[:, 0] - (policy[:, 1] - reference[:, 1])) * beta
    loss = (1 - smoothing) * np.log1p(np.exp(-margin)) + smoothing * np.log1p(np.exp(margin))
    mean = lambda values: float(np.sum(weight * values) / weight.sum())  # noqa: E731
    return {
        "preference": mean(loss), "rewards/accuracy": mean(margin > 0), "rewards/margin": mean(margin),
        "rewards/chosen": mean(rewards[:, 0]), "rewards/rejected": mean(rewards[:, 1]),
        "logps/chosen": mean(policy[:, 0]), "logps/rejected": mean(policy[:, 1]),
    }  # fmt: skip


def loss_of(reference, **changes):
    options = config(**changes).objective
    objective = dpo.DPO(options, _teacher.Teacher(*nnx.split(reference), "reference"))

    def value(params, rest, given, frozen):
        return objective(structure().merge(params, rest), given, jax.random.key(0), frozen)

    run = jax.jit(jax.value_and_grad(value, argnums=(0, 3), has_aux=True, allow_int=True))
    return lambda model, given: run(*structure().split(model), given, objective.frozen)


def test_the_loss_is_the_published_formula():
    policy, reference, given = network(1), network(2), batch()
    (loss, metrics), (gradient, frozen) = loss_of(reference, objective__label_smoothing=0.1)(policy, given)
    ours, theirs = log_probabilities(policy, given), log_probabilities(reference, given)
    expected = formula(ours, theirs, given["weight"], 0.3, 0.1)
    for name, value in expected.items():
        np.testing.assert_allclose(metrics[name], value, rtol=2e-5, err_msg=name)
    np.testing.assert_allclose(loss, expected["preference"], rtol=2e-5)
    another = formula(ours, log_probabilities(network(3), given), given["weight"], 0.3, 0.1)  # The teacher, say.
    assert abs(another["preference"] - expected["preference"]) > 1e-3
    assert all(float(jnp.abs(leaf).max()) == 0 for leaf in jax.tree.leaves(frozen) if leaf.dtype == jnp.float32)
    assert max(float(jnp.abs(leaf).max()) for leaf in gradient.values()) > 1e-4


def test_at_its_reference_the_loss_is_log_two_and_falls_along_the_gradient():
    policy, given = network(2), batch()
    run = loss_of(policy)
    (loss, metrics), (gradient, _) = run(policy, given)
    np.testing.assert_allclose(loss, np.log(2), rtol=1e-6)
    assert metrics["rewards/margin"] == 0
    params, rest = structure().split(policy)
    moved = structure().merge({name: value - 0.01 * gradient[name] for name, value in params.items()}, rest)
    (after, metrics), _ = run(moved, given)
    assert after < loss and metrics["rewards/margin"] > 0
    expected = formula(*(log_probabilities(each, given) for each in (moved, policy)), given["weight"], 0.3, 0.0)
    np.testing.assert_allclose(after, expected["preference"], rtol=2e-5)


def begun(training: setup.Training):
    """The state before the first step, without compiling its generators."""
    place = lambda array, like: jax.device_put(array, like.sharding)  # noqa: E731
    params, rest = (
        jax.tree.map(np.array, each) for each in structure().split(network(1))
    )  # A step gives its own away.
    arrays, abstract = dict(params=params, rest=rest, rng=jax.random.key(0)), training.abstract
    placed = {name: jax.tree.map(place, each, getattr(abstract, name)) for name, each in arrays.items()}
    zeros = dataclasses.replace(abstract, **{name: None for name in arrays})
    zeros = jax.tree.map(lambda like: place(np.zeros(like.shape, like.dtype), like), zeros)
    return dataclasses.replace(zeros, **placed)


def steps(preset: str, accumulate: int = 1) -> tuple[list[float], dict[str, np.ndarray]]:
    """Two steps of the ordinary training on a mesh: the losses, and the weights after them."""
    made = config(sharding__preset=preset, optimizer__accumulate=accumulate, optimizer__warmup_steps=0)
    if preset == "fsdp_tp":
        made.sharding.model = 2
    layout = sharding.build(made.sharding, jax.devices()[:4])
    training = setup.build(made, structure(), layout, data.ByteTokenizer())
    state, losses = begun(training), []
    for seed in range(2):
        order = np.random.default_rng(seed).permutation(4)
        state, report = training.step(state, layout.put({name: value[order] for name, value in batch().items()}))
        losses.append(float(report.metrics["loss"]))
    return losses, {name: np.asarray(value) for name, value in state.params.items()}


def test_many_devices_and_micro_batches_give_the_same_steps(monkeypatch):
    def load(run_dir, layout, field):
        assert (run_dir, field) == ("x", "reference")  # Where none is named, the run that this one starts from.
        definition, arrays = nnx.split(network(2))
        return _teacher.Teacher(definition, jax.device_put(arrays, layout.param_shardings(arrays)), field)

    monkeypatch.setattr(_teacher.Teacher, "load", load)
    losses, weights = steps("single")
    spread, others = steps("fsdp_tp", accumulate=2)
    assert losses[0] != losses[1]
    np.testing.assert_allclose(spread, losses, rtol=2e-5)
    for name, value in weights.items():
        np.testing.assert_allclose(others[name], value, atol=3e-4, err_msg=name)


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"train__init_from": ""}, "config.objective.reference must be a run folder, or config.train.init_from"),
        ({"data__form": "text"}, "config.data.form must be preferences for the objective dpo, and for no other"),
        ({"objective__name": "next_token"}, "config.data.form must be preferences for the objective dpo"),
        ({"objective__beta": 0.0}, "config.objective.beta must be above 0"),
        ({"objective__label_smoothing": 0.5}, "config.objective.label_smoothing must be 0 or more and below 0.5"),
        ({"data__max_prompt": LENGTH}, "config.data.max_prompt must be below config.data.length"),
        ({"data__message_format": "{content}"}, "config.data.message_format must hold {role} and {content} once each"),
    ],
)
def test_configs_that_cannot_be(fields, says):
    validate.check(config())
    with pytest.raises(ConfigError, match=says.replace("{", r"\{")):
        validate.check(config(**fields))
    with pytest.raises(ConfigError, match="set config.objective.reference to a run folder"):
        objectives.get("dpo")(base.objective(), None)


def test_upcycling_and_tuning_through_the_loop(tmp_path, capsys):
    """A base run, upcycled on the command line's path to a hybrid stack, and tuned on pairs; the stage between is
    an objective like any other (`test_distillation.py`)."""

    def stage(arguments: str, name: str, **fields):
        made = x_ecomla.get_config(f"{arguments},smoke")
        made.run_dir, made.data.sources = str(tmp_path / name), (str(ROOT / "configs"),)
        made.model.width, made.model.mlp.width, made.model.max_length = 32, 32, 32
        made.data.length, made.data.batch_size, made.train.steps, made.checkpoint.every = 32, 4, 5, 0
        made.eval.tasks, made.eval.sample_prompts, made.log.tensorboard, made.log.every = (), (), False, 1
        for field, value in fields.items():
            group, _, last = field.rpartition("__")
            made[group][last] = value
        done = train.run(made).run_dir
        return str(done), [row for row in run_folder.lines(done / "metrics.jsonl") if "loss" in row]

    before, _ = stage("stage=base", "base")
    upcycled = tmp_path / "upcycled"
    command = ["--to=x-ecomla", before, f"--output={upcycled}", "--kv_rank=8", "--layers=1", "--report_rows=0"]
    assert converting.main(command) == 0
    assert f"converted: {upcycled}" in capsys.readouterr().out
    kept = json.loads((upcycled / "conversion.json").read_text())
    assert kept["options"]["ranks"] == {"1": [q_rank := kept["options"]["ranks"]["1"][0], 8]}
    hybrid = load_run(upcycled).config.model
    assert hybrid.attention.layer == "mha" and hybrid.per_layer[0][1]["attention"]["q_lora_rank"] == q_rank
    from_here = dict(model__attention=hybrid.attention, model__per_layer=hybrid.per_layer)
    pairs = stored(tmp_path, records(30))
    _, lines = stage(
        "stage=dpo", "tuned", **from_here, train__init_from=str(upcycled), data__sources=(str(pairs),),
        optimizer__learning_rate=1e-3,
    )  # fmt: skip
    np.testing.assert_allclose(lines[0]["loss"], np.log(2), rtol=1e-5)
    assert lines[-1]["rewards/margin"] > 0
    distilled = x_ecomla.get_config("stage=distill,kv_rank=16")
    with pytest.raises(ConfigError, match="config.objective.teacher must be a run folder for the objective distill"):
        validate.check(distilled)
    distilled.objective.teacher = before
    validate.check(distilled)
    assert (distilled.objective.reduction, distilled.model.attention.q_lora_rank) == ("row", 128)
