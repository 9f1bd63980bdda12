"""Tokenizers: exact round trips, byte counts, specials, the cache, and files that are damaged."""

import json
import logging
import multiprocessing

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Library
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors

import data
from data import tokenizers

CORPUS = [f"the cat {i} sat on the mat, naïvely; and the dog ☃ did not\n" * 3 for i in range(50)]
TEXT = st.text(max_size=60)


@pytest.fixture(scope="module")
def bpe():
    return tokenizers.train_bpe(CORPUS, 320)


@pytest.fixture(scope="module")
def words():
    """A vocabulary that is not byte-level, as other people's files are."""
    library = Library(models.WordLevel({"[UNK]": 0, "the": 1, "cat": 2, "</s>": 3}, unk_token="[UNK]"))
    library.normalizer = normalizers.Lowercase()
    library.pre_tokenizer = pre_tokenizers.Whitespace()
    library.add_special_tokens(["</s>"])
    library.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 3)])
    library.enable_truncation(2)
    return library.to_str()


@settings(max_examples=200, deadline=None)
@given(TEXT)
def test_byte_round_trip(text):
    tokenizer = data.ByteTokenizer()
    ids = tokenizer.encode(text)
    assert ids == list(text.encode()) and tokenizer.decode(ids) == text
    assert tokenizer.byte_length([tokenizer.bos_id, *ids, tokenizer.eos_id, tokenizer.pad_id]) == len(text.encode())


@settings(max_examples=200, deadline=None)
@given(text=TEXT, cut=st.integers(0, 60), special=st.sampled_from(["", "<|bos|>", "<|eos|>", "<|pad|>"]))
def test_bpe_round_trip_and_byte_length(bpe, text, cut, special):
    """Any text comes back, a special written in it is text, and byte counts add up wherever ids are cut."""
    text = text + special + text
    ids = bpe.encode(text)
    assert bpe.decode(ids) == text and not {bpe.bos_id, bpe.eos_id, bpe.pad_id} & set(ids)
    assert bpe.byte_length(ids[:cut]) + bpe.byte_length(ids[cut:]) == len(text.encode())
    assert bpe.byte_length([bpe.bos_id, *ids, bpe.eos_id]) == len(text.encode())
    assert bpe.decode([bpe.bos_id, *ids, bpe.eos_id, bpe.vocab_size + 5]) == text


def test_bpe_merges_and_is_the_same_every_time(bpe):
    assert bpe.vocab_size == 320 and len(bpe.encode(CORPUS[0])) < 0.6 * len(CORPUS[0].encode())
    assert tokenizers.train_bpe(iter(CORPUS), 320).fingerprint == bpe.fingerprint
    assert tokenizers.train_bpe(CORPUS[:5], 320).fingerprint != bpe.fingerprint


@pytest.mark.parametrize("kind", ["byte", "bpe", "words"])
def test_encode_all_is_encode(bpe, words, kind):
    tokenizer = {"byte": data.ByteTokenizer(), "bpe": bpe, "words": None}[kind] or tokenizers.JsonTokenizer(words)
    texts = ["", "the cat", "☃", "", *CORPUS, "x" * (1 << 20), "the end"]
    ids, lengths = tokenizer.encode_all(texts)
    assert ids.dtype.kind == "u" and lengths.tolist() == [len(tokenizer.encode(text)) for text in texts]
    assert ids.tolist() == [i for text in texts for i in tokenizer.encode(text)]


@pytest.mark.parametrize("kind", ["byte", "bpe", "words"])
def test_save_and_load(tmp_path, bpe, words, kind):
    tokenizer = {"byte": data.ByteTokenizer(), "bpe": bpe, "words": None}[kind] or tokenizers.JsonTokenizer(words)
    tokenizer.save(tmp_path / "t")
    loaded = data.load_tokenizer(tmp_path / "t")
    assert type(loaded) is type(tokenizer) and loaded.fingerprint == tokenizer.fingerprint
    for name in ("vocab_size", "bos_id", "eos_id", "pad_id"):
        assert getattr(loaded, name) == getattr(tokenizer, name)
    assert loaded.encode("the cat") == tokenizer.encode("the cat") and loaded.describe() == tokenizer.describe()


def test_fingerprints_differ(bpe, words):
    others = [data.ByteTokenizer(), bpe, tokenizers.JsonTokenizer(words)]
    assert len({tokenizer.fingerprint for tokenizer in others}) == 3


def test_other_peoples_file(tmp_path, words):
    """Truncation and added end tokens in the file are not ours; the end token also begins documents, and says so."""
    (tmp_path / "tokenizer.json").write_text(words)
    tokenizer = data.load_tokenizer(tmp_path / "tokenizer.json")
    assert tokenizer.encode("The cat the dog") == [1, 2, 1, 0]
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (3, 3, 3)
    assert "begin 3 '</s>', end 3 '</s>'" in tokenizer.describe()
    assert tokenizer.byte_length([3, 1, 2, 3]) == len(b"the cat")
    assert data.load_tokenizer(tmp_path).fingerprint == tokenizer.fingerprint


def test_specials_beside_the_file(tmp_path, words):
    (tmp_path / "tokenizer.json").write_text(words)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"bos_token": {"content": "[UNK]"}, "pad_token": None}))
    tokenizer = data.load_tokenizer(tmp_path)
    assert (tokenizer.bos_id, tokenizer.eos_id) == (0, 3)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<gone>"}))
    with pytest.raises(data.DataError, match="eos token '<gone>' is not in its vocabulary"):
        data.load_tokenizer(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(data.DataError, match="not JSON"):
        data.load_tokenizer(tmp_path)


def test_no_end_token(tmp_path):
    library = Library(models.WordLevel({"a": 0, "[UNK]": 1}, unk_token="[UNK]"))
    library.decoder = decoders.Fuse()
    (tmp_path / "tokenizer.json").write_text(library.to_str())
    with pytest.raises(data.DataError, match="no end-of-text token"):
        data.load_tokenizer(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": "a"}))
    assert data.load_tokenizer(tmp_path).eos_id == 0


@settings(max_examples=80, deadline=None)
@given(st.data())
def test_damaged_file_is_one_line_or_sound(bpe, draws):
    whole = bpe._text.encode()
    at = draws.draw(st.integers(0, len(whole) - 1))
    damaged = whole[:at] if draws.draw(st.booleans()) else whole[:at] + bytes([whole[at] ^ 4]) + whole[at + 1 :]
    try:
        tokenizers.JsonTokenizer(damaged.decode(errors="replace"), where="some/tokenizer.json").encode("the cat")
    except data.DataError as error:
        assert str(error).startswith("some/tokenizer.json") and "\n" not in str(error)
    else:
        assert len(damaged) == len(whole)  # A flipped letter may still be a tokenizer; half a file never is.


def test_saved_folder_knows_when_it_was_changed(tmp_path, bpe):
    bpe.save(tmp_path)
    text = (tmp_path / "tokenizer.json").read_text()
    (tmp_path / "tokenizer.json").write_text(text.replace('"the"', '"teh"') + " ")
    with pytest.raises(data.DataError, match="changed or damaged"):
        data.load_tokenizer(tmp_path)
    (tmp_path / "tessera_tokenizer.json").write_text('{"kind": "image"}')
    with pytest.raises(data.DataError, match="unknown kind of tokenizer 'image'"):
        data.load_tokenizer(tmp_path)


@pytest.mark.parametrize(
    ("spec", "words"), [("bpe:300", "trained on a corpus"), ("no/where", "existing file"), (".", "holds neither")]
)
def test_useless_spec(tmp_path, monkeypatch, spec, words):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(data.DataError, match=words):
        data.load_tokenizer(spec)


# The cache.


def cached(cache, texts=CORPUS, digest="d", size=300):
    return tokenizers.cached_bpe(texts, digest, size, cache)


def test_cache_trains_once(tmp_path):
    first = cached(tmp_path)

    def untouched():
        raise AssertionError("the cache must not read the corpus again")
        yield

    assert cached(tmp_path, untouched()).fingerprint == first.fingerprint
    assert len(list(tmp_path.iterdir())) == 1
    cached(tmp_path, digest="other")
    cached(tmp_path, size=301)
    assert len(list(tmp_path.iterdir())) == 3


def test_damaged_cache_is_reported_and_made_again(tmp_path, caplog):
    first = cached(tmp_path)
    (path,) = tmp_path.glob("*/tokenizer.json")
    path.write_text(path.read_text()[:100])
    with caplog.at_level(logging.WARNING, "tessera.data"):
        assert cached(tmp_path).fingerprint == first.fingerprint
    assert "damaged" in caplog.text and str(path) in caplog.text
    caplog.clear()
    assert cached(tmp_path).fingerprint == first.fingerprint and not caplog.text


def test_small_corpus_yields_fewer_ids_and_says_so(tmp_path, caplog):
    assert cached(tmp_path, ["ab ab"], size=5000).vocab_size < 300
    assert "of the 5000 ids" in caplog.text


def test_cache_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(data.DataError, match="config.data.tokenizer_cache"):
        cached(tmp_path / "file")


def _train(cache, start, results):
    start.wait()
    results.put(cached(cache).fingerprint)


def test_processes_may_race_for_the_cache(tmp_path):
    context = multiprocessing.get_context("spawn")
    start, results = context.Barrier(2), context.Queue()
    racers = [context.Process(target=_train, args=(str(tmp_path), start, results)) for _ in range(2)]
    for racer in racers:
        racer.start()
    found = {results.get(timeout=60) for _ in racers}
    for racer in racers:
        racer.join()
    assert len(found) == 1
    assert [path.name[:4] for path in tmp_path.iterdir()] == ["bpe-"]
