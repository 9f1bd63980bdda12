"""From `config.data` to batches: the one entry point for training and evaluation."""

import functools
import numbers
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from data import corpus as corpora
from data import preferences
from data.corpus import Corpus, Document, Texts
from data.errors import DataError, log
from data.mixture import Mixture
from data.packing import Batch, PackedRows, PaddedRows, Rows, Tokens
from data.tokenizers import SMALLEST_BPE, ByteTokenizer, Tokenizer, cached_bpe, load_tokenizer

if TYPE_CHECKING:
    from data.iterator import TrainIterator


class Pipeline:
    """Tokenizer, corpus, endless training batches, and one pass over what is held out."""

    def __init__(
        self, config: Any, corpus: Corpus, tokenizer: Tokenizer, *, seed: int, process_index: int, process_count: int
    ):
        """Use `build`."""
        self.config, self.corpus, self.tokenizer = config, corpus, tokenizer
        self.seed, self.process_index, self.process_count = seed, process_index, process_count

    @functools.cached_property
    def rows(self) -> Rows:
        """The global sequence of training rows."""
        config, kind = self.config, PackedRows if self.config.packing else PaddedRows
        parts = self.corpus.train if config.weights else [_joined(self.corpus.train)]
        sources = [
            kind(encode(texts, self.tokenizer), config.length, self.tokenizer, f"{self.seed}/{i}")
            for i, texts in enumerate(parts)
        ]
        return Mixture(sources, config.weights) if config.weights else sources[0]

    @functools.cached_property
    def order(self) -> dict[str, Any]:
        """Everything that decides the global sequence of rows, by name; saved with the position."""
        config = self.config
        return {
            "training text": [texts.digest()[:16] for texts in self.corpus.train],
            "tokenizer": self.tokenizer.fingerprint[:16],
            "length": int(config.length),
            "packing": bool(config.packing),
            "weights": [float(weight) for weight in config.weights],
            "seed": int(self.seed),
        }

    def train(self) -> "TrainIterator":
        """An endless iterator over this process's share of the batches, from row 0; a grain DatasetIterator.

        Each batch has batch_size / process_count rows. `get_state` and `set_state` hold the position, see
        `data.iterator.TrainIterator`.
        """
        from data.iterator import TrainIterator  # grain takes seconds to import; evaluation does without.

        return TrainIterator(
            self.rows,
            self.order,
            batch_size=self.config.batch_size,
            process_index=self.process_index,
            process_count=self.process_count,
            workers=self.config.workers,
        )

    @functools.cached_property
    def _heldout(self) -> tuple[Document, ...]:
        texts = self.corpus.heldout
        return tuple(Document(texts.text(i), texts.sources[i], texts.names[i]) for i in range(len(texts)))

    def heldout_documents(self) -> tuple[Document, ...]:
        """The documents that are held out, in the order of sources and names; empty when heldout_share is 0."""
        return self._heldout

    @functools.cached_property
    def _heldout_tokens(self) -> Tokens:
        return encode(self.corpus.heldout, self.tokenizer)

    def heldout_batches(self, batch_size: int, length: int, *, limit: int = 0) -> Iterator[Batch]:
        """One pass over the held-out documents (the first `limit` of them; 0 is all), this process's rows.

        A document is cut into windows of `length` pairs, one window per row, padded at its end, so every held-out
        token is a target exactly once. `batch_size` counts rows over all processes; the last batch is filled with
        empty rows, so that all processes take the same number of batches. Besides the columns of training, the
        batches hold `document` int32 [B, T]: the number of the document in `heldout_documents()`, -1 for padding.

        Raises DataError at once when nothing is held out or the sizes do not fit.
        """
        if not len(self.corpus.heldout):
            raise DataError("nothing is held out: set config.data.heldout_share or config.data.heldout_sources")
        _positive("length", length)
        _positive("batch_size", batch_size)
        _divides(batch_size, self.process_count)
        tokens = self._heldout_tokens
        if limit > 0:
            tokens = tokens._replace(starts=tokens.starts[:limit], lengths=tokens.lengths[:limit])
        return self._heldout_pass(PaddedRows(tokens, length, self.tokenizer, None), batch_size)

    def _heldout_pass(self, rows: PaddedRows, batch_size: int) -> Iterator[Batch]:
        share = batch_size // self.process_count
        for first in range(self.process_index * share, self._rounded(rows.rows_per_epoch, batch_size), batch_size):
            numbers_ = np.arange(first, first + share, dtype=np.int64)
            real = numbers_ < rows.rows_per_epoch
            clipped = np.minimum(numbers_, rows.rows_per_epoch - 1)
            batch = rows.gather(clipped)
            batch["document"] = np.where(batch["segment"] > 0, rows.document(clipped)[0][:, None], -1).astype(np.int32)
            for name, empty in (("inputs", rows.pad), ("targets", rows.pad), ("segment", 0), ("position", 0)):
                batch[name][~real] = empty
            batch["weight"][~real] = 0
            batch["document"][~real] = -1
            yield batch

    @staticmethod
    def _rounded(rows: int, batch_size: int) -> int:
        return -(-rows // batch_size) * batch_size

    def describe(self) -> str:
        """A few lines for people: corpus, tokenizer, rows."""
        return f"{self.corpus.describe()}\n{self.tokenizer.describe()}"


class PreferencePipeline(Pipeline):
    """Batches of pairs of answers (`data.preferences.PairRows`); of what is held out, documents are the chosen ones."""

    @functools.cached_property
    def rows(self) -> Rows:
        """The global sequence of pairs."""
        parts = [preferences.pairs(texts) for texts in self.corpus.train]
        parts = parts if self.config.weights else [[one for part in parts for one in part]]
        sources = [self._pairs(part, f"{self.seed}/{i}") for i, part in enumerate(parts)]
        return Mixture(sources, self.config.weights) if self.config.weights else sources[0]

    @functools.cached_property
    def order(self) -> dict[str, Any]:
        """See Pipeline; how messages are written out is in the training text."""
        return super().order | {"form": "preferences", "max_prompt": int(self.config.max_prompt)}

    @functools.cached_property
    def _heldout(self) -> tuple[Document, ...]:
        return tuple(
            Document(one.prompt + one.chosen, document.source, document.name)
            for document in super()._heldout
            for one in [preferences.pair(document.text)]
        )

    @functools.cached_property
    def _heldout_tokens(self) -> Tokens:
        ids, lengths = self.tokenizer.encode_all(document.text for document in self._heldout)
        return Tokens(ids, np.cumsum(lengths) - lengths, lengths)

    def heldout_pairs(self, batch_size: int) -> Iterator[Batch]:
        """One pass over the held-out pairs, this process's share of each batch; pairs of weight 0 fill the last one."""
        _positive("batch_size", batch_size)
        _divides(batch_size, self.process_count)
        share = batch_size // self.process_count
        mine = slice(self.process_index * share, (self.process_index + 1) * share)
        return self._pairs(preferences.pairs(self.corpus.heldout), None).one_pass(batch_size, mine)

    def _pairs(self, given: list[preferences.Pair], seed: str | None) -> preferences.PairRows:
        return preferences.PairRows(given, self.config.length, self.tokenizer, seed, self.config.max_prompt)


def build(config: Any, *, seed: int, process_index: int = 0, process_count: int = 1) -> Pipeline:
    """Reads the corpus and makes the tokenizer; `config` is `config.data` of `configs/base.py`.

    Everything that can be wrong with the input is raised here, as a DataError of one line, before any long work
    (training a BPE comes last).
    """
    _check(config, process_index, process_count)
    began = time.perf_counter()
    pairs = config.form == "preferences"
    if pairs and config.tokenizer.startswith("bpe:"):
        raise DataError("config.data.tokenizer: preferences take that of the run they start from, <run>/tokenizer")
    size = _bpe_size(config.tokenizer) if config.tokenizer.startswith("bpe:") else 0
    tokenizer = None if size else load_tokenizer(config.tokenizer)  # First, so that a wrong path fails at once.
    corpus = corpora.load(
        config.sources,
        heldout_sources=config.heldout_sources,
        heldout_share=config.heldout_share,
        text_field=config.text_field,
        max_files=config.max_files,
        max_bad_share=config.max_bad_share,
        read=functools.partial(preferences.read, message_format=config.message_format) if pairs else None,
    )
    if tokenizer is None:
        texts = _joined(corpus.train)
        tokenizer = cached_bpe(texts, texts.digest(), size, config.tokenizer_cache)
    log.info("%s; data ready in %.2f s", tokenizer.describe(), time.perf_counter() - began)
    kind = PreferencePipeline if pairs else Pipeline
    return kind(config, corpus, tokenizer, seed=seed, process_index=process_index, process_count=process_count)


def encode(texts: Texts, tokenizer: Tokenizer) -> Tokens:
    """The documents as ids. The byte tokenizer's are the text itself, without a copy."""
    if isinstance(tokenizer, ByteTokenizer):
        return Tokens(texts.utf8, texts.starts, texts.lengths)
    ids, lengths = tokenizer.encode_all(texts)
    return Tokens(ids, np.cumsum(lengths) - lengths, lengths)


def _joined(parts: tuple[Texts, ...]) -> Texts:
    return Texts(
        parts[0].utf8,
        np.concatenate([part.starts for part in parts]),
        np.concatenate([part.lengths for part in parts]),
        [name for part in parts for name in part.names],
        [source for part in parts for source in part.sources],
    )


def _check(config: Any, process_index: int, process_count: int) -> None:
    if isinstance(config.sources, str) or not config.sources:
        raise DataError(f"config.data.sources: needs a tuple of at least one source, not {config.sources!r}")
    for name in ("length", "batch_size"):
        _positive(name, getattr(config, name))
    _divides(config.batch_size, process_count)
    if not 0 <= process_index < process_count:
        raise DataError(f"process {process_index} of {process_count}: the index must lie below the count")
    if not 0 <= config.heldout_share < 1:
        raise DataError(f"config.data.heldout_share: {config.heldout_share} is not a share from 0 to below 1")
    if not 0 <= config.max_bad_share <= 1:
        raise DataError(f"config.data.max_bad_share: {config.max_bad_share} is not a share from 0 to 1")
    if config.workers < 0 or config.max_files < 0:
        raise DataError("config.data.workers and config.data.max_files: neither may be negative")
    if config.weights:
        if len(config.weights) != len(config.sources):
            raise DataError(
                f"config.data.weights: {len(config.weights)} weights for {len(config.sources)} sources; give one each"
            )
        if not all(0 < float(w) < float("inf") for w in config.weights):
            raise DataError(f"config.data.weights: {tuple(config.weights)} must all be positive numbers")


def _bpe_size(spec: str) -> int:
    size = spec.removeprefix("bpe:")
    if not size.isdecimal() or int(size) < SMALLEST_BPE:
        raise DataError(
            f"config.data.tokenizer: {spec!r} needs a vocabulary size of at least {SMALLEST_BPE}, as in 'bpe:4096'"
        )
    return int(size)


def _positive(name: str, value: Any) -> None:
    if not isinstance(value, numbers.Integral) or isinstance(value, bool) or value < 1:
        raise DataError(f"config.data.{name}: {value!r} is not a whole number from 1 up")


def _divides(batch_size: int, process_count: int) -> None:
    if process_count < 1 or batch_size % process_count:
        raise DataError(
            f"config.data.batch_size: {batch_size} rows cannot be shared equally by {process_count} processes; "
            f"choose a multiple"
        )
