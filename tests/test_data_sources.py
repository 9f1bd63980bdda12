"""Finding and reading files: every kind, and every way in which a file can be broken."""

import gzip
import json
import os

import ml_collections
import pyarrow as pa
import pytest
from pyarrow import parquet

import data
from configs import base
from data import corpus, sources

TEXTS = [f"record {i}: " + "words and more words " * (i + 1) for i in range(12)]


def load(*specs, **options):
    return corpus.load([str(spec) for spec in specs], **{"heldout_share": 0.0, **options})


def texts_of(loaded):
    return [text for part in loaded.train for text in part]


def write_jsonl(path, texts=TEXTS, field="text"):
    body = "".join(json.dumps({field: text, "id": i}) + "\n" for i, text in enumerate(texts)).encode()
    path.write_bytes(gzip.compress(body) if path.name.endswith(".gz") else body)
    return path


def write_parquet(path, texts=TEXTS, field="text", **options):
    parquet.write_table(pa.table({field: texts, "id": list(range(len(texts)))}), path, **options)
    return path


def one_line(error) -> str:
    message = str(error.value)
    assert "\n" not in message and message
    return message


# Reading what is sound.


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.parquet"])
def test_records_come_back_in_order(tmp_path, name):
    (write_parquet if name.endswith("parquet") else write_jsonl)(tmp_path / name)
    loaded = load(tmp_path)
    assert texts_of(loaded) == TEXTS
    assert list(loaded.train[0].names) == [f"{name}:{i}" for i in range(1, 13)]


def test_text_comes_back_byte_for_byte(tmp_path):
    raw = "\ufeffa byte order mark,\r\nWindows line ends,\rold ones, \x00, and snow: ☃ 🙂\n".encode()
    (tmp_path / "a.txt").write_bytes(raw)
    assert [text.encode() for text in texts_of(load(tmp_path))] == [raw]


def test_folder_is_walked_in_the_order_of_relative_names(tmp_path):
    for name in ("b.md", "a/z.py", "a.txt", "a/b/c.TXT", ".git/secret.txt", "a/.hidden/x.txt", "__pycache__/x.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    (tmp_path / "picture.png").write_bytes(b"\x89PNG")
    loaded = load(tmp_path)
    assert [file.name for file in loaded.files] == ["a.txt", "a/b/c.TXT", "a/z.py", "b.md"]
    assert loaded.sources[0].ignored == {".png": 1} and "1 files of other kinds ignored" in loaded.describe()


@pytest.mark.parametrize(("pattern", "names"), [("*.txt", ["a.txt"]), ("**/*.txt", ["a.txt", "d/b.txt"])])
def test_glob(tmp_path, pattern, names):
    (tmp_path / "d").mkdir()
    for name in ("a.txt", "d/b.txt", "c.md"):
        (tmp_path / name).write_text(name)
    assert [file.name for file in load(tmp_path / pattern).files] == names


def test_max_files_keeps_the_first_of_the_sorted(tmp_path):
    for name in "edcba":
        (tmp_path / f"{name}.txt").write_text(name)
    assert texts_of(load(tmp_path, max_files=2)) == ["a", "b"]


def test_text_field(tmp_path):
    assert texts_of(load(write_jsonl(tmp_path / "a.jsonl", field="body"), text_field="body")) == TEXTS
    assert texts_of(load(write_parquet(tmp_path / "a.parquet", field="body"), text_field="body")) == TEXTS


def test_stdlib_is_the_interpreters_own_without_tests_and_packages():
    found = sources.find("stdlib")
    names = [file.name for file in found.files]
    assert {"abc.py", "json/decoder.py", "dataclasses.py"} <= set(names)
    assert names == sorted(names) and len(names) > 300
    for name in names:
        assert not {"site-packages", "dist-packages", "test", "tests"} & set(name.split("/"))
        assert name.endswith(".py") and not name.startswith("_sysconfigdata")


def test_hash_is_of_names_and_contents_only(tmp_path):
    for folder in ("one", "two"):
        (tmp_path / folder / "d").mkdir(parents=True)
        (tmp_path / folder / "d" / "a.txt").write_text("same")
        (tmp_path / folder / "b.txt").write_text("more")
    one, two = load(tmp_path / "one"), load(tmp_path / "two")
    assert one.hash == two.hash and len(one.hash) == 64
    (tmp_path / "two" / "b.txt").write_text("mor3")
    assert load(tmp_path / "two").hash != one.hash
    (tmp_path / "two" / "b.txt").write_text("more")
    (tmp_path / "two" / "b.txt").rename(tmp_path / "two" / "c.txt")
    assert load(tmp_path / "two").hash != one.hash


# What cannot be used at all.


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("no-such-source", "no such file or folder"),
        ("stdlb", "did you mean 'stdlib'"),
        ("no*where", "matches no files"),
        ("folder", "no .txt .md .py"),
        ("book.pdf", "unknown kind of file"),
    ],
)
def test_useless_source_is_named(tmp_path, monkeypatch, spec, words):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "a.png").write_bytes(b"x")
    (tmp_path / "book.pdf").write_bytes(b"x")
    with pytest.raises(data.DataError) as error:
        load(spec)
    message = one_line(error)
    assert words in message and spec in message


def test_empty_corpus(tmp_path):
    (tmp_path / "a.txt").write_text("")
    (tmp_path / "b.jsonl").write_text("\n\n")
    with pytest.raises(data.DataError, match="no text in them"):
        load(tmp_path)
    (tmp_path / "c.txt").write_text("x")
    loaded = load(tmp_path)
    assert texts_of(loaded) == ["x"] and loaded.empty == 1 and "1 empty documents" in loaded.describe()


# Broken records: an error that names the place, or a counted skip.


def _truncated_gzip(path):
    whole = write_jsonl(path / "a.jsonl.gz").read_bytes()
    (path / "a.jsonl.gz").write_bytes(whole[: len(whole) // 2])
    return "a.jsonl.gz:", "cut off or damaged"


def _flipped_gzip(path):
    whole = bytearray(write_jsonl(path / "a.jsonl.gz").read_bytes())
    whole[-6] ^= 0xFF  # In the checksum: every line reads well before it is noticed.
    (path / "a.jsonl.gz").write_bytes(whole)
    return "a.jsonl.gz:13", "cut off or damaged"


def _emptied_gzip(path):
    (path / "a.jsonl.gz").write_bytes(b"")
    return "a.jsonl.gz", "empty"


def _not_gzip(path):
    (path / "a.jsonl.gz").write_bytes(b'{"text": "plain"}\n')
    return "a.jsonl.gz:1", "damaged"


def _truncated_line(path):
    whole = write_jsonl(path / "a.jsonl").read_bytes()
    (path / "a.jsonl").write_bytes(whole[:-9])
    return "a.jsonl:12", "cut off"


def _lines(*lines):
    def make(path):
        (path / "a.jsonl").write_bytes(b'{"text": "good"}\n' + b"\n".join(line for line, _ in lines) + b"\n")
        return "a.jsonl:2", lines[0][1]

    return make


def _truncated_parquet(path):
    whole = write_parquet(path / "a.parquet").read_bytes()
    (path / "a.parquet").write_bytes(whole[: len(whole) // 2])
    return "a.parquet", "cut off or damaged"


def _emptied_parquet(path):
    (path / "a.parquet").write_bytes(b"")
    return "a.parquet", "cut off or damaged"


def _flipped_parquet(path):
    write_parquet(path / "a.parquet", write_page_checksum=True, compression="none", use_dictionary=False)
    whole = bytearray((path / "a.parquet").read_bytes())
    whole[whole.index(b"record 5")] ^= 0x01
    (path / "a.parquet").write_bytes(whole)
    return "a.parquet", "cut off or damaged"


def _column(values, words):
    def make(path):
        parquet.write_table(pa.table({"text": values}), path / "a.parquet")
        return "a.parquet:2", words

    return make


def _wrong_column(path):
    write_parquet(path / "a.parquet", field="body")
    return "a.parquet", "no column 'text' (columns: body, id"


def _latin(path):
    (path / "a.txt").write_bytes("naïve".encode("latin-1"))
    return "a.txt", "not UTF-8 (byte 0xef at offset 2)"


def _utf16(path):
    (path / "a.md").write_bytes("wide".encode("utf-16"))
    return "a.md", "not UTF-8"


def _half_character(path):
    (path / "a.py").write_bytes("# snow ☃".encode()[:-1])
    return "a.py", "not UTF-8"


def _broken_link(path):
    os.symlink(path / "gone.txt", path / "a.txt")
    return "a.txt", "cannot be read"


def _pipe(path):
    os.mkfifo(path / "a.txt")
    return "a.txt", "cannot be read"


BROKEN = {
    "truncated gzip": _truncated_gzip,
    "flipped gzip": _flipped_gzip,
    "emptied gzip": _emptied_gzip,
    "not gzip": _not_gzip,
    "truncated line": _truncated_line,
    "bytes in a line": _lines((b'{"text": "\xff"}', "not UTF-8")),
    "not JSON": _lines((b"text", "not JSON")),
    "deep JSON": _lines((b"[" * 100_000, "not JSON")),
    "list": _lines((b"[1]", "a JSON list")),
    "no field": _lines((b'{"body": "x"}', "no field 'text' (its fields: body")),
    "a number": _lines((b'{"text": 3}', "holds int, not text")),
    "null": _lines((b'{"text": null}', "holds NoneType, not text")),
    "half a surrogate": _lines((b'{"text": "ab\\ud800"}', "half a surrogate at 2")),
    "truncated parquet": _truncated_parquet,
    "emptied parquet": _emptied_parquet,
    "flipped parquet": _flipped_parquet,
    "null in parquet": _column(["a", None], "holds NoneType"),
    "bytes in parquet": _column(
        pa.StringArray.from_buffers(2, pa.py_buffer(b"\0\0\0\0\1\0\0\0\2\0\0\0"), pa.py_buffer(b"a\xff")), "not UTF-8"
    ),
    "wrong column": _wrong_column,
    "latin-1": _latin,
    "utf-16": _utf16,
    "half a character": _half_character,
    "broken link": _broken_link,
    "pipe": _pipe,
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_record_is_an_error_that_names_it(tmp_path, case):
    where, words = BROKEN[case](tmp_path)
    with pytest.raises(data.DataError) as error:
        load(tmp_path)
    message = one_line(error)
    assert str(tmp_path / where) in message and words in message and "max_bad_share" in message


@pytest.mark.parametrize("case", BROKEN)
def test_broken_record_is_skipped_and_counted_under_the_limit(tmp_path, caplog, case):
    where, words = BROKEN[case](tmp_path)
    for i in range(30):
        (tmp_path / f"good{i}.txt").write_text(f"good text {i}")
    loaded = load(tmp_path, max_bad_share=0.1)
    assert loaded.skipped.count == 1
    assert {f"good text {i}" for i in range(30)} <= set(texts_of(loaded))
    for report in (loaded.describe(), caplog.text):
        assert str(tmp_path / where) in report and words in report
    with pytest.raises(data.DataError, match=r"1 of \d+ records cannot be read, above config.data.max_bad_share=0.01"):
        load(tmp_path, max_bad_share=0.01)


def test_records_before_the_damage_are_kept(tmp_path):
    whole = write_jsonl(tmp_path / "a.jsonl").read_bytes()
    (tmp_path / "a.jsonl").write_bytes(whole[:-9])
    assert texts_of(load(tmp_path, max_bad_share=0.5)) == TEXTS[:-1]


def test_report_names_the_first_and_counts_the_rest(tmp_path):
    for i in range(9):
        (tmp_path / f"bad{i}.txt").write_bytes(b"\xff")
    (tmp_path / "good.txt").write_text("good")
    report = load(tmp_path, max_bad_share=0.95).skipped.report()
    assert "bad0.txt" in report and "bad4.txt" in report and "bad5.txt" not in report and "and 4 more" in report
    with pytest.raises(data.DataError) as error:
        load(tmp_path, max_bad_share=0.5)
    assert "9 of 10 records" in one_line(error)


# The fields of the config.


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("sources", (), "at least one source"),
        ("length", 0, "config.data.length"),
        ("batch_size", -1, "config.data.batch_size"),
        ("heldout_share", 1.0, "heldout_share"),
        ("max_bad_share", 1.5, "max_bad_share"),
        ("workers", -1, "workers"),
        ("weights", (1.0, 2.0), "2 weights for 1 sources"),
        ("weights", (0.0,), "positive"),
        ("tokenizer", "bpe:many", "bpe:4096"),
        ("tokenizer", "bpe:100", "at least 259"),
        ("tokenizer", "nowhere.json", "existing file"),
        ("heldout_sources", ("no-such-source",), "no such file"),
    ],
)
def test_useless_field_is_named(tmp_path, field, value, words):
    (tmp_path / "a.txt").write_text("some text\n" * 100)
    config = base.data()
    config.sources = (str(tmp_path),)
    config.tokenizer_cache = str(tmp_path / "cache")
    with config.ignore_type():
        config[field] = value
    with pytest.raises(data.DataError, match=words) as error:
        data.build(config, seed=0)
    one_line(error)


def test_batch_size_must_be_shared_equally():
    with pytest.raises(data.DataError, match="16 rows cannot be shared equally by 3 processes"):
        data.build(base.data(), seed=0, process_count=3)
    with pytest.raises(data.DataError, match="index must lie below"):
        data.build(base.data(), seed=0, process_index=2, process_count=2)


def test_config_may_be_frozen(tmp_path):
    (tmp_path / "a.txt").write_text("some text\n" * 100)
    config = base.data()
    config.sources = (str(tmp_path),)
    assert next(data.build(ml_collections.FrozenConfigDict(config), seed=0).train())["inputs"].shape == (16, 256)
