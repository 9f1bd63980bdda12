"""Needles in a haystack as text, for any tokenizer: RULER's eight retrieval tasks, pass keys, and the classic grid.

RULER: Hsieh et al., arXiv:2404.06654. The classic test: Kamradt's needle in a haystack. Pass keys: Mohtashami and
Jaggi, arXiv:2305.16300. A sample is a JSON-able dict {index, input, outputs, length, answer_prefix,
token_position_answer}, the grids add the depth and the context length. The model reads input + answer_prefix after
its begin token and goes on; `length` counts all of that and the tokens it may write.
"""

import dataclasses
import functools
import random
import re
import uuid
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol

from configs.errors import unknown
from data.errors import DataError
from data.procedural.words import ADJECTIVES, NOUNS


class Encoder(Protocol):
    """The part of a tokenizer that is needed here."""

    def encode(self, text: str) -> list[int]:
        """Ids of a text."""

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ids."""


@dataclasses.dataclass(frozen=True)
class Needle:
    """One RULER retrieval task. Kinds of keys and values: words, numbers (7 digits), uuids."""

    haystack: str  # noise | essay | needle (other needles as distractors)
    key: str
    value: str
    keys: int = 1
    values: int = 1
    queries: int = 1


TASKS = {
    "niah_single_1": Needle("noise", "words", "numbers"),
    "niah_single_2": Needle("essay", "words", "numbers"),
    "niah_single_3": Needle("essay", "words", "uuids"),
    "niah_multikey_1": Needle("essay", "words", "numbers", keys=4),
    "niah_multikey_2": Needle("needle", "words", "numbers"),
    "niah_multikey_3": Needle("needle", "uuids", "uuids"),
    "niah_multivalue": Needle("essay", "words", "numbers", values=4),
    "niah_multiquery": Needle("essay", "words", "numbers", keys=4, queries=4),
}
NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
SENTENCE = "One of the special magic {type} for {key} is: {value}."
TEMPLATE = (
    "Some special magic {type} are hidden within the following text. Make sure to memorize it. "
    "I will quiz you about the {type} afterwards.\n{context}\n"
    "What are all the special magic {type} for {query} mentioned in the provided text?"
)
PREFIX = " The special magic {type} for {query} mentioned in the provided text are"
DEPTHS = tuple(round(100 * i / 39) for i in range(40))  # Where essays may take a needle, in percent.
BEGIN = 1  # The begin token that goes before every prompt.

CLASSIC_NEEDLE = "The best thing to do in San Francisco is eat a sandwich and sit in Dolores Park on a sunny day."
CLASSIC_QUESTION = "What is the best thing to do in San Francisco?"
CLASSIC_ANSWER = "eat a sandwich and sit in Dolores Park on a sunny day"

PASSKEY_TEMPLATE = (
    "There is an important info hidden inside a lot of irrelevant text. Find it and memorize them. "
    "I will quiz you about the important information there.\n{context}\nWhat is the pass key?"
)
PASSKEY_SENTENCE = "The pass key is {key}. Remember it. {key} is the pass key."
PASSKEY_PREFIX = " The pass key is"

_SENTENCE_END = re.compile(r"(?<=[.!?])\s+")


def generate(
    task: str | Needle,
    tokenizer: Encoder,
    *,
    length: int,
    count: int,
    seed: int = 42,
    new_tokens: int = 128,
    essay: str | None = None,
) -> list[dict[str, Any]]:
    """`count` samples of at most `length` tokens, the begin token and `new_tokens` for the answer included.

    `task` is a name of TASKS or a Needle of its own. `essay` is the text of essay haystacks; None takes the prose of
    the interpreter's own manual. Sample i depends on the task, the length, the seed and i alone.

    The haystack is the largest that fits, in steps of 500 words, or of 25 units (5 below a length of 4096); where
    not even one step fits, in steps of one. Raises DataError when no haystack fits, naming the length that would.
    """
    settings = _settings(task)
    words = _essay_words(essay) if settings.haystack == "essay" else ()
    smallest = 1 if settings.haystack == "essay" else settings.keys * settings.values
    step = 500 if settings.haystack == "essay" else 25 if length >= 4096 else 5

    def sample(index: int, units: int) -> dict[str, Any]:
        return _assemble(settings, units, random.Random(f"{seed}/{length}/{index}"), words)

    def tokens(index: int, units: int) -> int:
        text = sample(index, units)
        return BEGIN + len(tokenizer.encode(text["input"] + text["answer_prefix"])) + new_tokens

    if count and (needed := tokens(0, smallest)) > length:
        name = task if isinstance(task, str) else "this needle task"
        raise DataError(f"{name}: length {length} is too short, the smallest sample takes {needed}; raise the length")
    units = _largest(lambda n: tokens(0, n) <= length, smallest, step) if count else smallest
    return [_finish(index, sample, tokens, units, smallest, step, length, tokenizer) for index in range(count)]


def _settings(task: str | Needle) -> Needle:
    if isinstance(task, str):
        if task not in TASKS:
            raise DataError(unknown("needle task", task, TASKS))
        return TASKS[task]
    kinds = ("words", "numbers", "uuids")
    if task.haystack not in ("noise", "essay", "needle"):
        raise DataError(unknown("haystack", task.haystack, ("noise", "essay", "needle")))
    for kind in (task.key, task.value):
        if kind not in kinds:
            raise DataError(unknown("kind of key or value", kind, kinds))
    if not 1 <= task.queries <= task.keys or task.values < 1 or task.keys * task.values > len(DEPTHS):
        raise DataError(f"needle task: needs 1 <= queries <= keys and at most {len(DEPTHS)} needles, got {task}")
    return task


def _largest(fits: Callable[[int], bool], smallest: int, step: int) -> int:
    """The largest number of units that fits: a multiple of `step`, or below one step any number from `smallest` up."""
    if step < smallest or not fits(step):
        low, high, grain = smallest, max(step, smallest + 1), 1
    else:
        low, high, grain = 1, 2, step
    while fits(high * grain):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle * grain) else (low, middle)
    return low * grain


def _finish(
    index: int,
    sample: Callable[[int, int], dict[str, Any]],
    tokens: Callable[[int, int], int],
    units: int,
    smallest: int,
    step: int,
    length: int,
    tokenizer: Encoder,
) -> dict[str, Any]:
    # Keys differ in length from sample to sample, so what fitted the first may be too long for another.
    while (size := tokens(index, units)) > length:
        if units <= smallest:
            raise DataError(f"length {length} is too short: sample {index} takes at least {size}; raise the length")
        units = max(smallest, units - (step if units > step else 1))
    text = sample(index, units)
    at = text["input"].find(text["outputs"][0])
    return {
        "index": index,
        **text,
        "length": size,
        "token_position_answer": BEGIN + len(tokenizer.encode(text["input"][:at])),
    }


def _assemble(task: Needle, units: int, draw: random.Random, words: Sequence[str]) -> dict[str, Any]:
    """One sample with `units` units of haystack; everything random comes from `draw`."""
    keys = _distinct(task.key, task.keys, draw)
    values = _distinct(task.value, task.keys * task.values, draw)
    found = {key: values[i * task.values : (i + 1) * task.values] for i, key in enumerate(keys)}
    needles = [SENTENCE.format(type=task.value, key=key, value=v) for key, mine in found.items() for v in mine]
    draw.shuffle(needles)
    asked = draw.sample(keys, task.queries)

    if task.haystack == "essay":
        text = " ".join(words[i % len(words)] for i in range(units))
        context = _insert_by_depth(_SENTENCE_END.split(text), needles, draw)
    else:
        if task.haystack == "noise":
            lines = [NOISE] * units
        else:
            lines = [_distractor(task, set(keys), draw) for _ in range(units)]
        for place, needle in zip(sorted(draw.sample(range(units), len(needles)), reverse=True), needles, strict=True):
            lines.insert(place, needle)
        context = "\n".join(lines)

    query = asked[0] if len(asked) == 1 else ", ".join(asked[:-1]) + ", and " + asked[-1]
    template, prefix, kind = TEMPLATE, PREFIX, task.value
    if task.queries * task.values == 1:  # One answer: the wording is in the singular.
        template, prefix = (
            wording.replace("Some", "A").replace("are all", "is").replace("are", "is") for wording in (template, prefix)
        )
        kind = kind.removesuffix("s")
    return {
        "input": template.format(type=kind, context=context, query=query),
        "outputs": [value for key in asked for value in found[key]],
        "answer_prefix": prefix.format(type=kind, query=query),
    }


def _insert_by_depth(sentences: list[str], needles: list[str], draw: random.Random) -> str:
    places = sorted(int(len(sentences) * depth / 100) for depth in draw.sample(DEPTHS, len(needles)))
    pieces, last = [], 0
    for place, needle in zip(places, needles, strict=True):
        pieces += [*sentences[last:place], needle]
        last = place
    return " ".join([*pieces, *sentences[last:]])


def _one(kind: str, draw: random.Random) -> str:
    if kind == "words":
        return f"{draw.choice(ADJECTIVES)}-{draw.choice(NOUNS)}"
    if kind == "numbers":
        return str(draw.randint(10**6, 10**7 - 1))
    return str(uuid.UUID(int=draw.getrandbits(128), version=4))


def _distinct(kind: str, count: int, draw: random.Random) -> list[str]:
    drawn: dict[str, None] = {}
    while len(drawn) < count:
        drawn[_one(kind, draw)] = None
    return list(drawn)


def _distractor(task: Needle, keys: set[str], draw: random.Random) -> str:
    while (key := _one(task.key, draw)) in keys:  # A second value for the asked key would make the answer wrong.
        pass
    return SENTENCE.format(type=task.value, key=key, value=_one(task.value, draw))


@functools.lru_cache(maxsize=4)
def _essay_words(text: str | None) -> tuple[str, ...]:
    words = tuple((manual_prose() if text is None else text).split())
    if not words:
        raise DataError("essay haystack: the text is empty; give one with words in it")
    return words


@functools.cache
def manual_prose() -> str:
    """Prose that every machine has: the sentences of the language manual that Python carries for help()."""
    from pydoc_data import topics

    paragraphs = (part for _, page in sorted(topics.topics.items()) for part in page.split("\n\n"))
    # Indented parts are code and grammar; lines of stars, dashes and equals signs are headings.
    prose = (" ".join(part.split()) for part in paragraphs if not part.startswith((" ", "*", "-", "+", "|", "=")))
    return "\n".join(part for part in prose if len(part) > 80 and part.endswith("."))


def passkey(
    tokenizer: Encoder, *, length: int, depths: Iterable[float], seed: int = 42, new_tokens: int = 8
) -> list[dict[str, Any]]:
    """One sample per depth (percent): a pass key of five digits in repeated noise, to be named exactly.

    The noise is as long as `length` allows. Raises DataError when not even one noise sentence fits.
    """

    def text(key: str, depth: float, units: int) -> str:
        lines = [NOISE] * units
        lines.insert(round(units * depth / 100), PASSKEY_SENTENCE.format(key=key))
        return PASSKEY_TEMPLATE.format(context="\n".join(lines))

    def sample(index: int, depth: float) -> dict[str, Any]:
        key = str(random.Random(f"{seed}/{length}/{index}").randint(10**4, 10**5 - 1))

        def tokens(units: int) -> int:
            return BEGIN + len(tokenizer.encode(text(key, depth, units) + PASSKEY_PREFIX)) + new_tokens

        if (needed := tokens(1)) > length:
            raise DataError(f"passkey: length {length} is too short, the smallest sample takes {needed}; raise it")
        units = _largest(lambda n: tokens(n) <= length, 1, 1)
        prompt = text(key, depth, units)
        return {
            "index": index,
            "input": prompt,
            "outputs": [key],
            "length": tokens(units),
            "answer_prefix": PASSKEY_PREFIX,
            "token_position_answer": BEGIN + len(tokenizer.encode(prompt[: prompt.find(key)])),
            "depth": float(depth),
            "context_length": length,
        }

    return [sample(index, _percent(depth)) for index, depth in enumerate(depths)]


def grid(
    tokenizer: Encoder,
    *,
    lengths: Iterable[int],
    depths: Iterable[float],
    needle: str = CLASSIC_NEEDLE,
    question: str = CLASSIC_QUESTION,
    answer: str = CLASSIC_ANSWER,
    essay: str | None = None,
    buffer: int = 200,
) -> list[dict[str, Any]]:
    """The classic test: one sample per length and depth (percent), lengths outermost.

    Of each length, `buffer` tokens stay free for the answer. The needle goes in after depth x context tokens, moved
    back to the end of the sentence before. `essay` is the text of the haystack, repeated as needed; None takes the
    prose of the interpreter's own manual. Raises DataError when a length leaves no room for context.
    """
    words = _essay_words(essay)
    depths = [_percent(depth) for depth in depths]
    suffix, prefix = f"\n\nQuestion: {question}", "\nAnswer:"
    samples: list[dict[str, Any]] = []
    for length in lengths:
        fixed = BEGIN + len(tokenizer.encode(f" {needle} ")) + len(tokenizer.encode(suffix + prefix)) + buffer
        room = length - fixed
        if room < 1:
            raise DataError(f"needle grid: length {length} is too short, it needs more than {fixed}; raise the length")
        ids = _haystack(tokenizer, words, room)
        for depth in depths:
            prompt = _bury(tokenizer, ids, needle, depth, suffix, prefix, length - buffer)
            samples.append(
                {
                    "index": len(samples),
                    "input": prompt,
                    "outputs": [answer],
                    "length": BEGIN + len(tokenizer.encode(prompt + prefix)) + buffer,
                    "answer_prefix": prefix,
                    "token_position_answer": BEGIN + len(tokenizer.encode(prompt[: prompt.find(needle)])),
                    "depth": depth,
                    "context_length": length,
                }
            )
    return samples


def _haystack(tokenizer: Encoder, words: Sequence[str], room: int) -> list[int]:
    """Exactly `room` ids of running text."""
    count = room
    while len(ids := tokenizer.encode(" ".join(words[i % len(words)] for i in range(count)))) < room:
        count *= 2
    return ids[:room]


def _bury(tokenizer: Encoder, ids: list[int], needle: str, depth: float, suffix: str, prefix: str, limit: int) -> str:
    # Where the pieces meet a tokenizer may need more tokens than the pieces alone did: take from the end until it fits.
    kept = len(ids)
    while True:
        text = tokenizer.decode(ids[:kept])
        before = tokenizer.decode(ids[: int(kept * depth / 100)])
        ends = [match.end() for match in re.finditer(r"[.!?](?=\s|$)", before)]
        place = len(text) if depth >= 100 else ends[-1] if ends else 0
        head, tail = text[:place], text[place:].lstrip()
        prompt = " ".join(part for part in (head, needle, tail) if part) + suffix
        excess = BEGIN + len(tokenizer.encode(prompt + prefix)) - limit
        if excess <= 0 or kept == 0:
            return prompt
        kept = max(0, kept - excess)


def _percent(depth: float) -> float:
    if not 0 <= depth <= 100:
        raise DataError(f"needle depth {depth}: must lie between 0 and 100 percent")
    return float(depth)
