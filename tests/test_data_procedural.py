"""Generated tasks: where the labels are, what fits, what must never happen."""

import json
import re

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import data
from data import tokenizers
from data.procedural import mqar, needle, words

BYTES = data.ByteTokenizer()


@pytest.fixture(scope="module")
def bpe():
    return tokenizers.train_bpe([needle.manual_prose()[:50_000]], 600)


# Associative recall.


@st.composite
def mqar_tasks(draw):
    pairs, passes = draw(st.integers(1, 8)), draw(st.integers(1, 3))
    length = 2 * pairs * (passes + 1) + 2 * draw(st.integers(0, 20))
    vocabulary = max(length + 1, 2 * pairs + 2) + draw(st.integers(0, 40))
    power, fill = draw(st.sampled_from([0.01, 0.3, 1.0, 2.0])), draw(st.booleans())
    return mqar.MQAR(vocabulary, length, pairs, power, passes, fill)


@settings(max_examples=200, deadline=None)
@given(task=mqar_tasks(), seed=st.integers(0, 2**32))
def test_mqar_examples_are_well_formed(task, seed):
    inputs, labels = mqar.generate(task, 5, seed)
    n, k, context, half = task.input_seq_len, task.num_kv_pairs, task.context, task.vocab_size // 2
    assert inputs.shape == labels.shape == (5, n) and inputs.dtype == labels.dtype == np.int32
    assert inputs.min() >= 0 and inputs.max() < task.vocab_size
    for row, answers in zip(inputs.tolist(), labels.tolist(), strict=True):
        pairs = dict(zip(row[0 : 2 * k : 2], row[1 : 2 * k : 2], strict=True))
        assert len(pairs) == k and all(1 <= key < half for key in pairs), "K different keys from the lower half"
        values = set(pairs.values())
        assert len(values) == k and all(half <= value < task.vocab_size for value in values)
        assert row[:context] == row[: 2 * k] * task.num_passes, "the context is repeated as it stands"
        asked = [place for place, answer in enumerate(answers) if answer != mqar.IGNORED]
        assert all(place >= context and (place - context) % 2 == 0 for place in asked)
        assert {row[place] for place in asked} == set(pairs) and len(asked) == k, "each key is asked for once"
        assert all(answers[place] == pairs[row[place]] for place in asked), "the value is the target AT the query key"
        rest = [token for place, token in enumerate(row) if place >= context and place not in asked]
        assert task.random_non_queries or not any(rest)


def test_mqar_fills_with_random_ids_only_where_nothing_was():
    plain = mqar.generate(mqar.MQAR(64, 40, 4, random_non_queries=False), 50, 1)
    filled = mqar.generate(mqar.MQAR(64, 40, 4, random_non_queries=True), 50, 1)
    assert (plain[1] == filled[1]).all() and (filled[0][plain[0] != 0] == plain[0][plain[0] != 0]).all()
    noise = filled[0][plain[0] == 0]
    assert noise.min() < 4 and noise.max() > 59 and len(np.unique(noise)) > 50


def test_mqar_is_decided_by_its_seed():
    task = mqar.MQAR(256, 64, 4)
    one, two, other = (mqar.generate(task, 8, seed)[0] for seed in ((3, 1), (3, 1), (3, 2)))
    assert (one == two).all() and (one != other).any()
    assert mqar.generate(task, 0, 0)[0].shape == (0, 64)


def test_mqar_gaps_follow_the_power_law():
    """With one pair the slot is one draw from p(g) = a (g + 1)^(a - 1), normalised: chi-square at p = 0.001."""
    task = mqar.MQAR(256, 22, 1, power_a=0.3)
    slots = np.argmax(mqar.generate(task, 20_000, 0)[1] != mqar.IGNORED, axis=1)
    weights = np.array([0.3 * (g + 1) ** (0.3 - 1) for g in range(10)])
    expected = 20_000 * weights / weights.sum()
    found = np.bincount((slots - 2) // 2, minlength=10)
    assert ((found - expected) ** 2 / expected).sum() < 27.9  # 9 degrees of freedom.


@pytest.mark.parametrize("vocabulary", [40, 4000])
def test_mqar_keys_are_drawn_evenly(vocabulary):
    """Both ways of drawing without replacement (few of many, many of few): every key in every place alike."""
    task = mqar.MQAR(vocabulary, 32, 8)
    keys = mqar.generate(task, 8000, 0)[0][:, 0:16:2]
    for place in (0, 7):
        bins = np.bincount((keys[:, place] - 1) * 19 // (vocabulary // 2 - 1), minlength=19)
        assert ((bins - 8000 / 19) ** 2 / (8000 / 19)).sum() < 45  # 18 degrees of freedom, p = 0.0005.


def test_mqar_batch_has_the_columns_of_training():
    task = mqar.MQAR(256, 64, 4)
    batch = mqar.batch(task, 3, 0)
    inputs, labels = mqar.generate(task, 3, 0)
    assert (batch["inputs"] == inputs).all() and (batch["weight"] == (labels != -100)).all()
    assert (batch["targets"][labels != -100] == labels[labels != -100]).all() and batch["targets"].min() >= 0
    assert (batch["segment"] == 1).all() and (batch["position"] == np.arange(64)).all()
    assert {value.dtype.name for value in batch.values()} == {"int32", "float32"}


@pytest.mark.parametrize(
    ("fields", "words_"),
    [
        ({"input_seq_len": 63}, "even"),
        ({"vocab_size": 64}, "below vocab_size"),
        ({"num_kv_pairs": 17}, "need 68 places"),
        ({"num_kv_pairs": 8, "num_passes": 4}, "need 80 places"),
        ({"vocab_size": 65, "num_kv_pairs": 32}, "distinct keys"),
        ({"num_kv_pairs": 0}, "positive"),
        ({"power_a": 0.0}, "positive"),
    ],
)
def test_mqar_settings_that_contradict(fields, words_):
    with pytest.raises(data.DataError, match=words_):
        mqar.MQAR(**{"vocab_size": 8192, **fields})
    mqar.MQAR(num_kv_pairs=16)  # 2 K P + 2 K = N exactly.


# Needles.


def test_word_lists_are_clean():
    for listed in (words.ADJECTIVES, words.NOUNS):
        assert len(set(listed)) == len(listed) > 150 and all(re.fullmatch("[a-z]{2,}", word) for word in listed)


NEEDLE = re.compile(r"One of the special magic (\w+) for (\S+) is: (\S+)\.(?=\s|$)")
SHAPES = {
    "words": r"[a-z]+-[a-z]+",
    "numbers": r"\d{7}",
    "uuids": r"[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f]{3}-[89ab][0-9a-f-]+",
}


@pytest.mark.parametrize("name", needle.TASKS)
@pytest.mark.parametrize("length", [1500, 5000])
def test_ruler_sample_can_be_answered_and_fits(bpe, name, length):
    task = needle.TASKS[name]
    for tokenizer in (BYTES, bpe):
        samples = needle.generate(name, tokenizer, length=length, count=6, seed=1)
        assert json.loads(json.dumps(samples)) == samples and [sample["index"] for sample in samples] == list(range(6))
        for sample in samples:
            found: dict[str, list[str]] = {}
            for kind, key, value in NEEDLE.findall(sample["input"]):
                found.setdefault(key, []).append(value)
                assert kind == task.value and re.fullmatch(SHAPES[task.key], key)
                assert re.fullmatch(SHAPES[task.value], value)
            question = sample["input"].rsplit("\n", 1)[1]
            asked = [key for key in found if re.search(rf"(?<![\w-]){re.escape(key)}(?![\w-])", question)]
            assert len(asked) == task.queries
            assert sorted(sample["outputs"]) == sorted(value for key in asked for value in found[key])
            assert len(sample["outputs"]) == task.queries * task.values
            if task.haystack != "needle":
                assert len(found) == task.keys
            size = 1 + len(tokenizer.encode(sample["input"] + sample["answer_prefix"])) + 128
            assert sample["length"] == size <= length
            before = tokenizer.decode(tokenizer.encode(sample["input"])[: sample["token_position_answer"] - 1])
            at = sample["input"].find(sample["outputs"][0])
            assert abs(len(before) - at) <= 8  # The answer begins there; a BPE token may straddle its first letter.


def test_ruler_distractors_never_answer_the_question(monkeypatch):
    """With 4 possible keys, nearly every haystack would hold a second value for the key that is asked for."""
    monkeypatch.setattr(needle, "ADJECTIVES", ("red", "blue"))
    monkeypatch.setattr(needle, "NOUNS", ("cat", "dog"))
    for sample in needle.generate("niah_multikey_2", BYTES, length=2500, count=20):
        key = re.search(r"magic number for (\S+) mentioned", sample["input"])[1]
        values = [value for _, found, value in NEEDLE.findall(sample["input"]) if found == key]
        assert values == sample["outputs"]


def test_ruler_wording_in_the_singular_and_in_the_plural():
    one = needle.generate("niah_single_1", BYTES, length=900, count=1)[0]
    key = re.search(r"magic number for (\S+) mentioned", one["input"])[1]
    assert one["input"].startswith(
        "A special magic number is hidden within the following text. Make sure to memorize it. "
        "I will quiz you about the number afterwards.\nThe grass is green."
    )
    assert one["input"].endswith(f"\nWhat is the special magic number for {key} mentioned in the provided text?")
    assert one["answer_prefix"] == f" The special magic number for {key} mentioned in the provided text is"
    four = needle.generate("niah_multiquery", BYTES, length=2500, count=1)[0]
    assert four["input"].startswith("Some special magic numbers are hidden within the following text.")
    keys = re.search(r"for (\S+), (\S+), (\S+), and (\S+) mentioned in the provided text\?$", four["input"])
    assert keys and four["answer_prefix"].startswith(f" The special magic numbers for {keys[1]}, ")
    assert four["answer_prefix"].endswith(" mentioned in the provided text are")


@pytest.mark.parametrize(("name", "length", "step"), [("niah_single_1", 3000, 5), ("niah_single_1", 9000, 25)])
def test_ruler_haystack_is_the_largest_that_fits(name, length, step):
    sample = needle.generate(name, BYTES, length=length, count=1)[0]
    units = sample["input"].count(needle.NOISE)
    assert units % step == 0
    assert sample["length"] <= length < sample["length"] + step * (len(needle.NOISE) + 1)


def test_ruler_below_one_step_grows_by_single_units():
    samples = needle.generate("niah_single_1", BYTES, length=700, count=20)
    assert {sample["input"].count(needle.NOISE) for sample in samples} <= {1, 2}
    assert max(sample["length"] for sample in samples) > 700 - 100
    with pytest.raises(data.DataError, match=r"niah_single_1: length 300 is too short, the smallest sample takes \d+"):
        needle.generate("niah_single_1", BYTES, length=300, count=1)


def test_ruler_depths_cover_the_haystack():
    for name in ("niah_single_1", "niah_single_2"):
        samples = needle.generate(name, BYTES, length=8000, count=120)
        depths = [sample["token_position_answer"] / (sample["length"] - 128) for sample in samples]
        assert np.histogram(depths, bins=4, range=(0, 1))[0].min() >= 12


def test_ruler_samples_depend_on_seed_and_index_alone():
    def inputs(count, seed):
        return [s["input"] for s in needle.generate("niah_multikey_1", BYTES, length=3000, count=count, seed=seed)]

    assert inputs(3, 1) == inputs(8, 1)[:3] and len(set(inputs(8, 1) + inputs(8, 2))) == 16


def test_ruler_essay_is_the_text_given():
    essay = "".join(f"Sentence number {i} is here. " for i in range(40))
    sample = needle.generate("niah_single_2", BYTES, length=2500, count=1, essay=essay)[0]
    context = sample["input"].split("\n")[1]
    kept = NEEDLE.sub("", context).split()
    assert kept == (essay.split() * 5)[: len(kept)] and len(kept) > 100
    assert not NEEDLE.sub("", context).lstrip().startswith("number"), "needles stand between sentences"


def test_ruler_names_and_settings_that_are_wrong():
    with pytest.raises(data.DataError, match="did you mean niah_single_1"):
        needle.generate("niah_singel_1", BYTES, length=2000, count=1)
    for wrong in (
        needle.Needle("hay", "words", "numbers"),
        needle.Needle("noise", "letters", "numbers"),
        needle.Needle("noise", "words", "numbers", keys=2, queries=3),
        needle.Needle("noise", "words", "numbers", keys=41),
    ):
        with pytest.raises(data.DataError):
            needle.generate(wrong, BYTES, length=9000, count=1)
    with pytest.raises(data.DataError, match="text is empty"):
        needle.generate("niah_single_2", BYTES, length=2000, count=1, essay=" \n")


@settings(max_examples=40, deadline=None)
@given(
    length=st.integers(500, 3000), seed=st.integers(0, 99), keys=st.integers(1, 6), values=st.integers(1, 3),
    haystack=st.sampled_from(["noise", "essay", "needle"]), key=st.sampled_from(sorted(SHAPES)),
    value=st.sampled_from(sorted(SHAPES)), new=st.integers(1, 64),
)  # fmt: skip
def test_any_needle_task_fits_or_says_what_would(length, seed, keys, values, haystack, key, value, new):
    task = needle.Needle(haystack, key, value, keys=keys, values=values, queries=1 + seed % keys)
    try:
        samples = needle.generate(task, BYTES, length=length, count=3, seed=seed, new_tokens=new)
    except data.DataError as error:
        needed = int(re.search(r"takes (?:at least )?(\d+)", str(error))[1])
        assert needed > length
        return
    for sample in samples:
        assert sample["length"] <= length and all(output in sample["input"] for output in sample["outputs"])


# Pass keys and the classic grid.


def test_passkey_at_every_depth(bpe):
    depths = [0, 25, 50, 75, 100]
    for tokenizer in (BYTES, bpe):
        samples = needle.passkey(tokenizer, length=1500, depths=depths)
        for sample, depth in zip(samples, depths, strict=True):
            (key,) = sample["outputs"]
            assert re.fullmatch(r"[1-9]\d{4}", key) and sample["input"].count(key) == 2
            lines = sample["input"].split("\n")[1:-1]
            place = next(i for i, line in enumerate(lines) if key in line)
            assert place == round(depth / 100 * (len(lines) - 1)) and sample["depth"] == depth
            size = 1 + len(tokenizer.encode(sample["input"] + sample["answer_prefix"])) + 8
            assert size == sample["length"] <= 1500 < size + len(tokenizer.encode(needle.NOISE + "\n")) + 1
    with pytest.raises(data.DataError, match="too short"):
        needle.passkey(BYTES, length=200, depths=[50])


def test_classic_grid_depth_and_length(bpe):
    lengths, depths = [1000, 2500], [0, 10, 50, 90, 100]
    for tokenizer in (BYTES, bpe):
        samples = needle.grid(tokenizer, lengths=lengths, depths=depths)
        assert [(s["context_length"], s["depth"]) for s in samples] == [(n, d) for n in lengths for d in depths]
        for sample in samples:
            length, depth = sample["context_length"], sample["depth"]
            size = 1 + len(tokenizer.encode(sample["input"] + sample["answer_prefix"])) + 200
            assert size == sample["length"] <= length < size + 12
            head, tail = sample["input"].split(needle.CLASSIC_NEEDLE)
            assert not head or depth == 100 or head.rstrip()[-1] in ".!?", "back at the end of a sentence"
            haystack = sample["input"].removesuffix(f"\n\nQuestion: {needle.CLASSIC_QUESTION}")
            reached = len(head) / (len(haystack) - len(needle.CLASSIC_NEEDLE))
            assert reached <= depth / 100 + 0.02
            if depth == 100:
                assert tail == f"\n\nQuestion: {needle.CLASSIC_QUESTION}"
            # The text between two sentence ends is all that moving back may cost.
            assert reached > depth / 100 - 500 / len(haystack)
            assert sample["outputs"][0] in needle.CLASSIC_NEEDLE


@pytest.mark.parametrize("depth", [0, 10, 33, 50, 75, 90, 99, 100])
def test_classic_grid_puts_the_needle_where_it_says(depth):
    """Short sentences: the needle is at most one of them (24 bytes) before its depth, and never after it."""
    essay = " ".join(f"This is sentence {i:05}." for i in range(1000))
    (sample,) = needle.grid(BYTES, lengths=[6000], depths=[depth], essay=essay)
    at = sample["input"].find(needle.CLASSIC_NEEDLE)
    room = len(sample["input"].split("\n\nQuestion:")[0]) - len(needle.CLASSIC_NEEDLE) - 1
    assert depth / 100 * room - 26 <= at <= depth / 100 * room + 2


@settings(max_examples=60, deadline=None)
@given(
    essay=st.text(st.characters(codec="utf-8"), min_size=1, max_size=200),
    length=st.integers(450, 900),
    depth=st.floats(0, 100),
)
def test_classic_grid_takes_any_text(bpe, essay, length, depth):
    assume(essay.strip())
    for tokenizer in (BYTES, bpe):
        (sample,) = needle.grid(tokenizer, lengths=[length], depths=[depth], essay=essay, buffer=100)
        assert sample["length"] <= length and needle.CLASSIC_NEEDLE in sample["input"]


def test_classic_grid_that_cannot_be():
    with pytest.raises(data.DataError, match="too short"):
        needle.grid(BYTES, lengths=[300], depths=[50])
    with pytest.raises(data.DataError, match="between 0 and 100"):
        needle.grid(BYTES, lengths=[2000], depths=[101])
