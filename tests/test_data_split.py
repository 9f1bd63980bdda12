"""What is trained on and what is held out: nothing in both, everything in one."""

import hashlib
import json

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import data
from data import corpus


def load(*specs, **options):
    return corpus.load([str(spec) for spec in specs], **options)


def sides(loaded):
    return [text for part in loaded.train for text in part], list(loaded.heldout)


def write(folder, files):
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name).write_text(text)
    return folder


def by_name(name: str, share: float) -> bool:
    """The rule, written apart: the first eight bytes of BLAKE2b as a fraction."""
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "big") / 2**64 < share


def test_files_are_chosen_by_their_names(tmp_path):
    files = {f"{i}.txt": f"text {i}" for i in range(200)}
    train, heldout = sides(load(write(tmp_path, files), heldout_share=0.2))
    assert sorted(heldout) == sorted(text for name, text in files.items() if by_name(name, 0.2))
    assert sorted(train + heldout) == sorted(files.values())
    assert 20 <= len(heldout) <= 60  # 200 draws with probability 0.2.


def test_split_does_not_move_when_files_are_added(tmp_path):
    files = {f"{i}.txt": f"text {i}" for i in range(100)}
    before = sides(load(write(tmp_path, files), heldout_share=0.1))[1]
    after = sides(load(write(tmp_path, {f"new{i}.txt": f"new {i}" for i in range(100)}), heldout_share=0.1))[1]
    assert set(before) <= set(after)


def test_split_does_not_move_when_a_source_is_added(tmp_path):
    """Not even when the new source has the same texts under names that would be split otherwise."""
    write(tmp_path / "a", {f"{i}.txt": f"text {i}" for i in range(50)})
    write(tmp_path / "b", {f"other{i}.txt": f"text {i}" for i in range(100)})
    before = sides(load(tmp_path / "a", heldout_share=0.2))[1]
    after = load(tmp_path / "a", tmp_path / "b", heldout_share=0.2).heldout
    assert [text for text, source in zip(after, after.sources, strict=True) if source == str(tmp_path / "a")] == before


def test_records_are_chosen_by_their_content(tmp_path):
    texts = [f"record {i}" for i in range(300)]
    for name, order in (("a", texts), ("b", texts[::-1])):
        write(tmp_path / name, {"x.jsonl": "".join(json.dumps({"text": text}) + "\n" for text in order)})
    one, two = (sides(load(tmp_path / name, heldout_share=0.1)) for name in ("a", "b"))
    assert set(one[1]) == set(two[1]) and 10 <= len(one[1]) <= 60
    assert sorted(one[0] + one[1]) == sorted(texts)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    contents=st.lists(st.lists(st.integers(0, 6), min_size=1, max_size=8), min_size=1, max_size=3),
    kinds=st.lists(st.booleans(), min_size=3, max_size=3),
    share=st.sampled_from([0.05, 0.3, 0.5, 0.9]),
)
def test_equal_texts_are_never_on_both_sides(tmp_path_factory, contents, kinds, share):
    """Whatever is duplicated in one source, over sources, over text files and records."""
    root = tmp_path_factory.mktemp("split")
    for i, (numbers, records) in enumerate(zip(contents, kinds, strict=False)):
        texts = [f"text {n}\n" * (n + 2) for n in numbers]
        if records:
            write(root / str(i), {"a.jsonl": "".join(json.dumps({"text": text}) + "\n" for text in texts)})
        else:
            write(root / str(i), {f"{j}.txt": text for j, text in enumerate(texts)})
    every = [f"text {n}\n" * (n + 2) for numbers in contents for n in numbers]
    try:
        train, heldout = sides(load(*(root / str(i) for i in range(len(contents))), heldout_share=share))
    except data.DataError as error:
        assert "every document in it is held out" in str(error)
        assert len(contents) > 1  # Only a source whose texts another source holds out may be left with nothing.
        return
    # A text that was cut appears as a head in one and a tail in the other; no whole text is in both.
    assert not set(train) & set(heldout) & set(every)
    assert sum(map(len, train + heldout)) == sum(map(len, every))
    assert heldout and train


@pytest.mark.parametrize("share", [0.001, 0.999])
def test_each_side_of_each_source_gets_something(tmp_path, share):
    for source in "ab":
        write(tmp_path / source, {f"{source}{i}.txt": f"text {source} {i}" for i in range(3)})
    loaded = load(tmp_path / "a", tmp_path / "b", heldout_share=share)
    assert all(len(part) for part in loaded.train)
    assert {source for source in loaded.heldout.sources} == {str(tmp_path / "a"), str(tmp_path / "b")}


def test_no_share_holds_nothing_out(tmp_path):
    loaded = load(write(tmp_path, {"a.txt": "a", "b.txt": "b"}), heldout_share=0.0)
    assert sides(loaded) == (["a", "b"], [])


def test_single_file_gives_its_tail_from_a_line_end(tmp_path):
    text = "".join(f"line number {i}\n" for i in range(1000))
    train, heldout = sides(load(write(tmp_path, {"a.txt": text}) / "a.txt", heldout_share=0.1))
    assert train[0] + heldout[0] == text and train[0].endswith("\n")
    assert len(heldout[0]) / len(text) == pytest.approx(0.1, abs=0.002)


@pytest.mark.parametrize("text", ["☃" * 500, "a\n" + "🙂" * 300, "ab", "\n\n"])
def test_single_file_without_lines_is_cut_between_characters(tmp_path, text):
    train, heldout = sides(load(write(tmp_path, {"a.txt": text}), heldout_share=0.1))
    assert train[0] + heldout[0] == text and train[0] and heldout[0]
    assert len(text) < 10 or len(heldout[0]) / len(text) == pytest.approx(0.1, abs=0.01)


def test_single_character_is_trained_on(tmp_path):
    assert sides(load(write(tmp_path, {"a.txt": "☃"}))) == (["☃"], [])


def test_explicit_heldout_wins_over_equal_training_text(tmp_path):
    write(tmp_path / "train", {f"{i}.txt": f"text {i}" for i in range(10)})
    write(tmp_path / "test", {"x.txt": "text 3", "y.txt": "other"})
    loaded = load(tmp_path / "train", heldout_sources=[str(tmp_path / "test")])
    assert sides(loaded) == ([f"text {i}" for i in range(10) if i != 3], ["text 3", "other"])
    assert loaded.dropped == 1 and "1 training documents left out" in loaded.describe()
    assert len(loaded.files) == 12
    with pytest.raises(data.DataError, match="nothing is left to train on"):
        load(tmp_path / "train", heldout_sources=[str(tmp_path / "train")])


def test_bytes_add_up_and_are_described(tmp_path):
    loaded = load(write(tmp_path, {f"{i}.txt": "☃" * (i + 1) for i in range(20)}), heldout_share=0.3)
    assert loaded.bytes == loaded.train_bytes + loaded.heldout_bytes == 3 * sum(range(1, 21))
    assert loaded.hash in loaded.describe() and f"{loaded.heldout_bytes:,} bytes" in loaded.describe()
