"""The pipeline as training and evaluation use it: order, resume, processes, mixtures, one pass over the held out."""

import json
import logging
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import orbax.checkpoint as ocp
import pytest
from grain.checkpoint import CheckpointRestore, CheckpointSave
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import data
from configs import base

COLUMNS = ("inputs", "targets", "segment", "position", "weight")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """30 documents of unlike lengths, 2,600 bytes in all."""
    folder = tmp_path_factory.mktemp("text")
    for i in range(30):
        (folder / f"{i:02}.txt").write_text(f"<{i}> " + f"word{i} ☃ " * (i % 7 + 1) * (1 + 9 * (i == 12)))
    return folder


def config_for(folder, **fields):
    config = base.data()
    config.update({"sources": (str(folder),), "length": 24, "batch_size": 4, "heldout_share": 0.2, **fields})
    return config


def take(iterator, count):
    return [next(iterator) for _ in range(count)]


def assert_equal(one, two):
    assert len(one) == len(two)
    for a, b in zip(one, two, strict=True):
        assert a.keys() == b.keys()
        for name in a:
            np.testing.assert_array_equal(a[name], b[name], strict=True)


def test_a_batch_is_what_everyone_expects(folder):
    pipeline = data.build(config_for(folder), seed=0)
    batch = next(pipeline.train())
    assert {name: (value.shape, value.dtype.name) for name, value in batch.items()} == {
        name: ((4, 24), "float32" if name == "weight" else "int32") for name in COLUMNS
    }
    text = pipeline.tokenizer.decode(batch["inputs"][0].tolist())
    assert any(text.strip("\ufffd")[:10] in part for texts in pipeline.corpus.train for part in texts)


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("tokenizer", ["byte", "bpe:300"])
def test_an_epoch_is_the_training_text(folder, tmp_path, packing, tokenizer):
    """Put together by document, the pieces of one epoch are exactly the texts that are not held out."""
    fields = {"tokenizer": tokenizer, "packing": packing, "tokenizer_cache": str(tmp_path), "length": 1000}
    pipeline = data.build(config_for(folder, batch_size=1, **fields), seed=3)
    iterator, texts = pipeline.train(), []
    for batch in take(iterator, pipeline.rows.rows_per_epoch):
        for number in range(1, batch["segment"].max() + 1):
            ids = batch["targets"][0][batch["segment"][0] == number].tolist()
            texts.append((batch["inputs"][0][batch["segment"][0] == number][0], ids))
    heads = [ids for first, ids in texts if first == pipeline.tokenizer.bos_id]
    whole = sorted(pipeline.tokenizer.decode(ids) for ids in heads if ids[-1] == pipeline.tokenizer.eos_id)
    expected = sorted(text for part in pipeline.corpus.train for text in part)
    cut = len(heads) - len(whole)  # A row's end may lie within a document.
    assert len(heads) == len(expected) and cut <= 3 and set(whole) <= set(expected)


def test_order_is_decided_by_the_seed_alone(folder):
    one, two, other = (take(data.build(config_for(folder), seed=seed).train(), 40) for seed in (0, 0, 1))
    assert_equal(one, two)
    assert any((a["inputs"] != b["inputs"]).any() for a, b in zip(one, other, strict=True))


# Resume.


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    stops=st.lists(st.integers(0, 30), min_size=1, max_size=4),
    processes=st.lists(st.sampled_from([1, 2, 4]), min_size=4, max_size=4),
    packing=st.booleans(),
    weighted=st.booleans(),
)
def test_resume_anywhere_with_any_number_of_processes(folder, stops, processes, packing, weighted):
    """The rows of all processes together are those of a run of one process that never stopped, bit for bit."""
    fields = {"packing": packing, "heldout_share": 0.1}
    if weighted:
        fields |= {"sources": (f"{folder}/0*.txt", f"{folder}/1*.txt"), "weights": (1.0, 2.5)}
    config = config_for(folder, **fields)
    straight = data.build(config, seed=7).train()
    state = None
    for stop, count in zip(stops, processes, strict=False):
        iterators = [data.build(config, seed=7, process_index=p, process_count=count).train() for p in range(count)]
        if state is not None:
            for iterator in iterators:
                iterator.set_state(json.loads(state))
        for _ in range(stop):
            shares = [next(iterator) for iterator in iterators]
            assert all(len(share["inputs"]) == 4 // count for share in shares)
            assert_equal([{name: np.concatenate([s[name] for s in shares]) for name in COLUMNS}], [next(straight)])
        states = {json.dumps(iterator.get_state(), sort_keys=True) for iterator in iterators}
        assert len(states) == 1, "every process saves the same position"
        (state,) = states
    straight.close()


def test_the_position_counts_what_was_handed_out_not_what_was_made_ahead(folder):
    iterator = data.build(config_for(folder), seed=0).train()
    assert iterator.get_state()["next_row"] == 0
    iterator.start_prefetch()
    assert iterator.get_state()["next_row"] == 0
    take(iterator, 3)
    assert iterator.get_state()["next_row"] == 12


def test_set_state_goes_back_and_forth_on_one_iterator(folder):
    iterator = data.build(config_for(folder), seed=0).train()
    states, batches = [], []
    for _ in range(12):
        states.append(iterator.get_state())
        batches.append(next(iterator))
    for i in (5, 0, 11, 3):
        iterator.set_state(states[i])
        assert_equal([next(iterator)], [batches[i]])


def test_closed_until_a_position_is_set(folder):
    iterator = data.build(config_for(folder), seed=0).train()
    state, first = iterator.get_state(), next(iterator)
    iterator.close()
    iterator.close()
    with pytest.raises(ValueError, match="closed"):
        next(iterator)
    iterator.set_state(state)
    assert_equal([next(iterator)], [first])


def test_rows_go_on_with_another_batch_size(folder):
    straight = take(data.build(config_for(folder), seed=0).train(), 6)
    small = data.build(config_for(folder, batch_size=2), seed=0).train()
    first = take(small, 3)
    large = data.build(config_for(folder, batch_size=6), seed=0).train()
    large.set_state(small.get_state())
    rows = [row for batch in first + take(large, 3) for row in batch["inputs"]]
    np.testing.assert_array_equal(rows, [row for batch in straight for row in batch["inputs"]])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"length": 25}, "length was 24 and is 25"),
        ({"packing": False}, "packing was True and is False"),
        ({"max_files": 20}, "training text was"),
        ({"tokenizer": "bpe:300"}, "tokenizer was"),
        ({"weights": (1.0,)}, "weights was"),
    ],
)
def test_a_position_of_other_data_is_refused(folder, tmp_path, change, words):
    state = data.build(config_for(folder), seed=0).train().get_state()
    other = data.build(config_for(folder, tokenizer_cache=str(tmp_path), **change), seed=0).train()
    with pytest.raises(data.DataError, match=words) as error:
        other.set_state(state)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("state", [{}, {"next_row": "3", "order": {}}, {"next_row": -1, "order": {}}, {"next_row": 3}])
def test_a_damaged_position_is_refused(folder, state):
    with pytest.raises(data.DataError, match="damaged"):
        data.build(config_for(folder), seed=0).train().set_state(state)


def test_orbax_saves_and_restores_it(folder, tmp_path):
    """Both ways: grain's own handler, and the state as JSON beside the weights."""
    iterator = data.build(config_for(folder), seed=0).train()
    take(iterator, 5)
    with ocp.CheckpointManager(tmp_path / "run") as manager:
        state = ocp.args.JsonSave(iterator.get_state())
        manager.save(5, args=ocp.args.Composite(data=CheckpointSave(iterator), position=state))
        expected = take(iterator, 3)
        restored = data.build(config_for(folder), seed=0).train()
        manager.wait_until_finished()
        manager.restore(5, args=ocp.args.Composite(data=CheckpointRestore(restored)))
        assert_equal(take(restored, 3), expected)
        state = manager.restore(5, args=ocp.args.Composite(position=ocp.args.JsonRestore())).position
    again = data.build(config_for(folder), seed=0).train()
    again.set_state(state)
    assert_equal(take(again, 3), expected)


SCRIPT = """
import json, sys
import data
from configs import base
config = base.data()
config.update(json.loads(sys.argv[1]))
iterator = data.build(config, seed=0).train()
iterator.set_state(json.loads(sys.argv[2]))
if __name__ == "__main__":
    print(json.dumps([next(iterator)["inputs"].tolist() for _ in range(3)]))
    iterator.close()
"""


@pytest.mark.parametrize("workers", [0, 2])
def test_resume_in_another_process_with_and_without_workers(folder, tmp_path, workers):
    """Another interpreter, another hash seed, worker processes or none: the same rows."""
    iterator = data.build(config_for(folder), seed=0).train()
    take(iterator, 4)
    state = json.dumps(iterator.get_state())
    (tmp_path / "script.py").write_text(SCRIPT)
    fields = {"sources": [str(folder)], "length": 24, "batch_size": 4, "heldout_share": 0.2, "workers": workers}
    root = str(Path(__file__).parents[1])
    done = subprocess.run(
        [sys.executable, str(tmp_path / "script.py"), json.dumps(fields), state],
        env={**os.environ, "PYTHONHASHSEED": "123", "PYTHONPATH": root},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == [batch["inputs"].tolist() for batch in take(iterator, 3)]


# Mixtures.


def test_weights_mix_sources_and_each_has_epochs_of_its_own(tmp_path):
    for name in "ab":
        (tmp_path / name).mkdir()
        for i in range(8):
            (tmp_path / name / f"{i}.txt").write_text(name * 22 + f"{i}")
    config = config_for(tmp_path, sources=(str(tmp_path / "a"), str(tmp_path / "b")), weights=(1.0, 3.0))
    config.heldout_share = 0.0
    rows = [row for batch in take(data.build(config, seed=0).train(), 16) for row in batch["inputs"]]
    letters = [chr(row[1]) for row in rows]
    assert letters.count("a") == 16 and letters.count("b") == 48
    numbers = [chr(row[-1]) for row, letter in zip(rows, letters, strict=True) if letter == "b"]
    for epoch in range(6):  # 8 documents of exactly one row each.
        assert sorted(numbers[8 * epoch : 8 * epoch + 8]) == [str(i) for i in range(8)]
    assert numbers[:8] != numbers[8:16]


def test_without_weights_every_byte_counts_alike(folder):
    parts = config_for(folder, sources=(f"{folder}/0*.txt", f"{folder}/[12]*.txt"))
    pipeline = data.build(parts, seed=0)
    pairs = pipeline.corpus.train_bytes + sum(map(len, pipeline.corpus.train))
    assert pipeline.rows.rows_per_epoch == -(-pairs // 24)


# The held out.


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("tokenizer", ["byte", "bpe:300"])
@pytest.mark.parametrize(("batch_size", "length"), [(4, 24), (2, 1000), (6, 1)])
def test_every_heldout_byte_is_a_target_once(folder, tmp_path, count, tokenizer, batch_size, length):
    config = config_for(folder, tokenizer=tokenizer, tokenizer_cache=str(tmp_path))
    pipelines = [data.build(config, seed=0, process_index=p, process_count=count) for p in range(count)]
    passes = [list(pipeline.heldout_batches(batch_size, length)) for pipeline in pipelines]
    assert len({len(batches) for batches in passes}) == 1, "all processes take the same number of batches"
    rows = [
        {name: value[i] for name, value in batches[step].items()}
        for step in range(len(passes[0]))
        for batches in passes
        for i in range(batch_size // count)
    ]
    tokenizer, documents = pipelines[0].tokenizer, pipelines[0].heldout_documents()
    assert sum(tokenizer.byte_length(row["targets"][row["weight"] > 0]) for row in rows) == sum(
        len(document.text.encode()) for document in documents
    )
    for i, document in enumerate(documents):
        mine = [row["targets"][row["document"] == i].tolist() for row in rows]
        ids = [token for part in mine for token in part]
        assert ids[-1] == tokenizer.eos_id and tokenizer.decode(ids) == document.text
        starts = [row["inputs"][0] for row in rows if row["document"][0] == i]
        assert starts[0] == tokenizer.bos_id and len(starts) == -(-len(ids) // length)
    for row in rows:
        padding = row["weight"] == 0
        assert (row["segment"] == ~padding).all() and (row["document"][padding] == -1).all()
        assert row["inputs"].shape == (length,) and (row["targets"][padding] == tokenizer.pad_id).all()


def test_heldout_documents_say_where_they_are_from(folder):
    pipeline = data.build(config_for(folder), seed=0)
    documents = pipeline.heldout_documents()
    assert documents and pipeline.corpus.heldout_bytes == sum(len(document.text.encode()) for document in documents)
    for document in documents:
        assert (folder / document.name).read_text() == document.text and document.source == str(folder)


def test_heldout_limit(folder):
    pipeline = data.build(config_for(folder), seed=0)
    numbers = np.concatenate([batch["document"] for batch in pipeline.heldout_batches(4, 24, limit=2)])
    assert set(np.unique(numbers)) == {-1, 0, 1}


def test_nothing_held_out_is_an_error_at_once(folder):
    pipeline = data.build(config_for(folder, heldout_share=0.0), seed=0)
    assert pipeline.heldout_documents() == ()
    with pytest.raises(data.DataError, match="nothing is held out"):
        pipeline.heldout_batches(4, 24)
    with pytest.raises(data.DataError, match="shared equally"):
        data.build(config_for(folder), seed=0, process_count=2).heldout_batches(3, 24)


def test_the_standard_library_is_there_without_any_files(caplog):
    config = base.data()
    config.max_files = 40
    with caplog.at_level(logging.INFO, "tessera.data"):
        pipeline = data.build(config, seed=0)
    assert pipeline.corpus.bytes > 100_000 and pipeline.corpus.heldout_bytes > 0
    assert pipeline.corpus.hash in caplog.text and pipeline.tokenizer.describe() in pipeline.describe()
    batch = next(pipeline.train())
    assert batch["inputs"].shape == (16, 256) and batch["weight"].mean() > 0.9
