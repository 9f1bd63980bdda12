"""Pairs of answers to one prompt, a better and a worse one: from records to rows of tokens.

A record (a line of .jsonl, a row of .parquet) has "chosen" and "rejected". Either these are texts and "prompt" is the
text before them; or, as in UltraFeedback and its like, they are conversations, lists of {"role", "content"}, that agree
in all but the last message, the assistant's: this is the answer, what comes before it the prompt, and "prompt" is not
read.
"""

import functools
import json
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from data import readers
from data.corpus import Texts
from data.errors import DataError
from data.packing import Batch, permutation
from data.readers import Record
from data.sources import File
from data.tokenizers import Tokenizer

_HINT = "see config.data.form in docs/data.md"
SIDES = ("chosen", "rejected")


class Pair(NamedTuple):
    """A prompt with its two answers."""

    prompt: str
    chosen: str
    rejected: str


def read(file: File, message_format: str) -> Iterator[Record]:
    """The pairs of a file, each as the text that `pair` reads; a record that is none comes with a reason."""
    if file.kind == "text":
        yield Record(0, reason="preferences are records, of .jsonl or .parquet files")
        return
    parse = functools.partial(_record, message_format=message_format)
    yield from readers.records(file, readers.Form(SIDES, ("prompt",), parse, _HINT))


def pair(text: str) -> Pair:
    """What `read` made a text of. Raises DataError if it is not whole."""
    try:
        return Pair(*json.loads(text))
    except ValueError as error:
        raise DataError(
            "a source of preferences with a single pair cannot be both trained on and held out: give more pairs, or "
            "set config.data.heldout_sources"
        ) from error


def pairs(texts: Texts) -> list[Pair]:
    """All of them, in order."""
    return [pair(text) for text in texts]


class PairRows:
    """An endless sequence of pairs (see `data.packing.Rows`), in an order of its own in each epoch.

    A batch has, over [B, 2, T] with the chosen answer first, `inputs`, `targets`, `segment`, `position` as other rows
    have them and `completion`, 1 where the target belongs to the answer; and over [B] `weight`, 1 per pair. A row is
    begin, prompt, answer, end.

    A pair fits if its prompt and its longer answer do. Where it does not, only the last `max_prompt` tokens of the
    prompt stay, in both rows; where it still does not, answers lose what is beyond the row, their end token first.
    """

    def __init__(
        self, given: list[Pair], length: int, tokenizer: Tokenizer, seed: str | None, max_prompt: int = 0
    ) -> None:
        """`seed` is any text that names the order, None for the order given; `max_prompt` 0 is half of `length`."""
        self.length, self.seed, self.max_prompt = length, seed, max_prompt or length // 2
        self.bos, self.eos, self.pad = tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id
        self.rows_per_epoch = len(given)
        # Prompt and answers apart, so that no token lies across the border between them.
        self._ids, self._lengths = tokenizer.encode_all(text for one in given for text in one)
        self._starts = np.cumsum(self._lengths) - self._lengths
        self._plans: dict[int, np.ndarray] = {}

    def gather(self, rows: np.ndarray) -> Batch:
        """See `data.packing.Rows`."""
        epochs, places = np.divmod(np.asarray(rows, np.int64), self.rows_per_epoch)
        chosen = [int(self._plan(int(epoch))[place]) for epoch, place in zip(epochs, places, strict=True)]
        return self.batch(np.asarray(chosen, np.int64))

    def batch(self, numbers: np.ndarray) -> Batch:
        """The pairs of these numbers, in the order given."""
        shape = (len(numbers), 2, self.length)
        inputs, targets = np.full(shape, self.pad, np.int32), np.full(shape, self.pad, np.int32)
        segment, completion = np.zeros(shape, np.int32), np.zeros(shape, np.float32)
        for row, number in enumerate(numbers.tolist()):
            prompt, *answers = (self._text(3 * number + part) for part in range(3))
            if len(prompt) + max(map(len, answers)) + 1 > self.length:
                prompt = prompt[max(0, len(prompt) - self.max_prompt) :]
            for side, answer in enumerate(answers):
                ids = np.concatenate([[self.bos], prompt, answer, [self.eos]])[: self.length + 1]
                inputs[row, side, : len(ids) - 1], targets[row, side, : len(ids) - 1] = ids[:-1], ids[1:]
                segment[row, side, : len(ids) - 1] = 1
                completion[row, side, len(prompt) : len(ids) - 1] = 1
        position = np.where(segment > 0, np.arange(self.length, dtype=np.int32), 0)
        return {
            "inputs": inputs, "targets": targets, "segment": segment, "position": position, "completion": completion,
            "weight": np.ones(len(numbers), np.float32),
        }  # fmt: skip

    def one_pass(self, batch_size: int, share: slice) -> Iterator[Batch]:
        """All pairs once, in the order given: `share` of each batch, the last filled up with pairs of weight 0."""
        for first in range(0, self.rows_per_epoch, batch_size):
            numbers = first + np.arange(share.start, share.stop, dtype=np.int64)
            real = numbers < self.rows_per_epoch
            batch = self.batch(np.minimum(numbers, self.rows_per_epoch - 1))
            batch["weight"] = real.astype(np.float32)
            yield batch

    def _plan(self, epoch: int) -> np.ndarray:
        """The order of an epoch; the last two stay in memory."""
        if self.seed is None:
            return np.arange(self.rows_per_epoch)
        if epoch not in self._plans:
            kept = dict(sorted(self._plans.items())[-1:])
            self._plans = {**kept, epoch: permutation(self.rows_per_epoch, f"{self.seed}/pairs/{epoch}")}
        return self._plans[epoch]

    def _text(self, number: int) -> np.ndarray:
        start = int(self._starts[number])
        return self._ids[start : start + int(self._lengths[number])].astype(np.int32)


def _record(number: int, record: dict[str, Any], message_format: str) -> Record:
    if all(isinstance(record[side], list) for side in SIDES):
        sides = []
        for side in SIDES:
            reason = _conversation(record[side])
            if reason:
                return Record(number, reason=f"field {side!r} {reason}")
            sides.append(record[side])
        chosen, rejected = ([(message["role"], message["content"]) for message in side] for side in sides)
        if chosen[:-1] != rejected[:-1]:
            return Record(number, reason="'chosen' and 'rejected' answer different conversations")
        before = "".join(_written(role, content, message_format) for role, content in chosen[:-1])
        opening, closing = (part.replace("{role}", "assistant") for part in message_format.split("{content}"))
        texts = {"prompt": before + opening} | {
            side: messages[-1][1] + closing for side, messages in zip(SIDES, (chosen, rejected), strict=True)
        }
    elif "prompt" not in record:
        return Record(number, reason=f"no field 'prompt' before the texts 'chosen' and 'rejected' ({_HINT})")
    else:
        texts = {field: record[field] for field in ("prompt", *SIDES)}
    for field, text in texts.items():
        sound = readers.string(number, text, field)
        if sound.reason:
            return sound
    return Record(number, json.dumps(list(texts.values()), ensure_ascii=False).encode("utf-8"))


def _conversation(messages: list[Any]) -> str:
    """What is wrong with a conversation; "" for nothing."""
    for place, message in enumerate(messages, 1):
        if not isinstance(message, dict) or not all(isinstance(message.get(key), str) for key in ("role", "content")):
            return f"has no texts 'role' and 'content' in message {place}"
    if not messages or messages[-1]["role"] != "assistant":
        return "does not end with a message of the assistant"
    return ""


def _written(role: str, content: str, message_format: str) -> str:
    # Cut first, so that braces in a content are only text.
    before, after = message_format.split("{content}")
    return before.replace("{role}", role) + content + after.replace("{role}", role)
