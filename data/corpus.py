"""All text of a run: read once, hashed, and split into what is trained on and what is held out.

The split is by file (by a hash of its relative name) or, where a file holds records, by a hash of each record. It is
decided once per content, so two files or records with the same content are always on the same side.
"""

import dataclasses
import functools
import hashlib
import os
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from data import readers
from data.errors import DataError, Skipped, log
from data.sources import File, Source, find

TRAIN, HELDOUT, CUT, DROPPED = 0, 1, 2, 3  # CUT: the first part is trained on, the tail is held out.


@dataclasses.dataclass(frozen=True)
class Document:
    """One document: its text, the source it came from, and its relative name (with its record, counted from 1)."""

    text: str
    source: str
    name: str


@dataclasses.dataclass(frozen=True)
class Texts:
    """Documents as UTF-8, end to end in one array; a document is a span of it. Spans may share the array."""

    utf8: np.ndarray  # uint8
    starts: np.ndarray  # int64 [documents]
    lengths: np.ndarray  # int64 [documents], bytes
    names: Sequence[str]
    sources: Sequence[str]

    def __len__(self) -> int:
        return len(self.starts)

    @property
    def bytes(self) -> int:
        """Bytes of all documents."""
        return int(self.lengths.sum())

    def text(self, i: int) -> str:
        """The text of document `i`."""
        start = int(self.starts[i])
        return self.utf8[start : start + int(self.lengths[i])].tobytes().decode("utf-8")

    def __iter__(self) -> Iterator[str]:
        return (self.text(i) for i in range(len(self)))

    def digest(self) -> str:
        """sha256 over the documents in order: what a tokenizer trained on them is named after."""
        digest = hashlib.sha256()
        for start, length in zip(self.starts.tolist(), self.lengths.tolist(), strict=True):
            digest.update(length.to_bytes(8, "little"))
            digest.update(self.utf8[start : start + length].data)
        return digest.hexdigest()


@dataclasses.dataclass(frozen=True)
class Corpus:
    """The text of a run.

    `train` has one entry per training source (each a Texts), `heldout` is one for all. `hash` is the sha256 over the
    sorted (relative name, sha256 of the content) of every file that was read.
    """

    sources: tuple[Source, ...]
    train: tuple[Texts, ...]
    heldout: Texts
    hash: str
    skipped: Skipped
    empty: int  # Documents without a single byte: left out.
    dropped: int  # Training documents left out because the same text is held out.

    @property
    def files(self) -> tuple[File, ...]:
        """Every file that belongs to the corpus."""
        return tuple(file for source in self.sources for file in source.files)

    @property
    def train_bytes(self) -> int:
        """Bytes of text trained on."""
        return sum(texts.bytes for texts in self.train)

    @property
    def heldout_bytes(self) -> int:
        """Bytes of text held out."""
        return self.heldout.bytes

    @property
    def bytes(self) -> int:
        """Bytes of text, trained on and held out."""
        return self.train_bytes + self.heldout_bytes

    def describe(self) -> str:
        """A few lines for people: sources, split, hash, and everything that was left out."""
        documents = sum(map(len, self.train))
        lines = [f"{source.spec}: {len(source.files):,} files" for source in self.sources]
        lines.append(f"train: {documents:,} documents, {self.train_bytes:,} bytes")
        lines.append(f"held out: {len(self.heldout):,} documents, {self.heldout_bytes:,} bytes")
        lines.append(f"hash: {self.hash}")
        ignored = sum(n for source in self.sources for n in source.ignored.values())
        for count, what in (
            (ignored, "files of other kinds ignored"),
            (self.empty, "empty documents left out"),
            (self.dropped, "training documents left out: their text is held out"),
        ):
            if count:
                lines.append(f"{count:,} {what}")
        if self.skipped.count:
            lines.append(f"{self.skipped.count:,} records skipped, {self.skipped.report()}")
        return "\n".join(lines)


@dataclasses.dataclass
class _Reading:
    """Everything read so far; one list entry per document."""

    utf8: bytearray = dataclasses.field(default_factory=bytearray)
    lengths: list[int] = dataclasses.field(default_factory=list)
    source: list[int] = dataclasses.field(default_factory=list)
    names: list[str] = dataclasses.field(default_factory=list)
    digests: list[int] = dataclasses.field(default_factory=list)  # Of the content: what makes two documents equal.
    scores: list[float] = dataclasses.field(default_factory=list)  # In [0, 1): held out when below the share.
    file_hashes: list[tuple[str, str]] = dataclasses.field(default_factory=list)
    empty: int = 0

    def add(self, source: int, file: File, number: int, text: bytes) -> None:
        digest = _unit_hash(text)
        self.utf8 += text
        self.lengths.append(len(text))
        self.source.append(source)
        self.names.append(f"{file.name}:{number}" if number else file.name)
        self.digests.append(digest)
        self.scores.append((digest if number else _unit_hash(os.fsencode(file.name))) / 2**64)


def load(
    sources: Sequence[str],
    *,
    heldout_sources: Sequence[str] = (),
    heldout_share: float = 0.05,
    text_field: str = "text",
    max_files: int = 0,
    max_bad_share: float = 0.0,
    read: Callable[[File], Iterator[readers.Record]] | None = None,
) -> Corpus:
    """Reads and splits the corpus; the fields are those of `config.data`. `read` reads files in another way.

    With `heldout_sources`, all of their documents are held out and training documents with the same text are left
    out. Without, each source gives about `heldout_share` of its files or records, and at least one where it has two.
    A source that is one single document is cut: its tail, from a line end on, is held out.

    Raises DataError for a missing or empty source, for unreadable records above `max_bad_share`, and when nothing
    is left to train on.
    """
    read = read or functools.partial(readers.read, text_field=text_field)
    found = tuple(find(spec, max_files=max_files) for spec in (*sources, *heldout_sources))
    skipped = Skipped(max_bad_share)
    reading = _Reading()
    for index, source in enumerate(found):
        before = len(reading.lengths)
        for file in source.files:
            _read_file(reading, index, file, read, skipped)
        if len(reading.lengths) == before:
            raise DataError(
                f"source {source.spec!r}: {len(source.files)} files but no text in them (unreadable records of all "
                f"sources: {skipped.count}, {skipped.report()}); choose another source"
            )
    skipped.check(good=len(reading.lengths) + reading.empty)

    if heldout_sources:
        sides = _explicit(reading, first_heldout=len(sources))
    else:
        sides = _by_share(reading, len(sources), heldout_share)
    corpus = _assemble(found, len(sources), reading, sides, heldout_share, skipped)
    for source, texts in zip(corpus.sources, corpus.train, strict=False):
        if not len(texts):
            raise DataError(f"source {source.spec!r}: every document in it is held out; nothing is left to train on")
    log.info("corpus\n%s", corpus.describe())
    return corpus


def _read_file(
    reading: _Reading, source: int, file: File, read: Callable[[File], Iterator[readers.Record]], skipped: Skipped
) -> None:
    try:
        file_hash = readers.content_hash(file)
        for record in read(file):
            if record.reason:
                skipped.add(f"{file.path}:{record.number}" if record.number else str(file.path), record.reason)
            elif record.text:
                reading.add(source, file, record.number, record.text)
            else:
                reading.empty += 1
    except OSError as error:
        skipped.add(str(file.path), f"cannot be read ({error.strerror or error})")
    else:
        reading.file_hashes.append((file.name, file_hash))


def _unit_hash(content: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "big")


def _explicit(reading: _Reading, first_heldout: int) -> list[int]:
    held = {digest for digest, source in zip(reading.digests, reading.source, strict=True) if source >= first_heldout}
    return [
        HELDOUT if source >= first_heldout else DROPPED if digest in held else TRAIN
        for digest, source in zip(reading.digests, reading.source, strict=True)
    ]


def _by_share(reading: _Reading, sources: int, share: float) -> list[int]:
    if share <= 0:
        return [TRAIN] * len(reading.digests)
    members: list[dict[int, float]] = [{} for _ in range(sources)]  # Per source: content -> its first score.
    for digest, score, source in zip(reading.digests, reading.scores, reading.source, strict=True):
        members[source].setdefault(digest, score)
    decided: dict[int, int] = {}
    for scores in members:
        new = {digest: score for digest, score in scores.items() if digest not in decided}
        if len(scores) == 1:
            decided.update(dict.fromkeys(new, CUT))
            continue
        decided.update({digest: HELDOUT if score < share else TRAIN for digest, score in new.items()})
        sides = {decided[digest] for digest in scores}
        if new and not sides & {HELDOUT, CUT}:
            decided[min(new, key=new.__getitem__)] = HELDOUT
        elif new and not sides & {TRAIN, CUT}:
            decided[max(new, key=new.__getitem__)] = TRAIN
    return [decided[digest] for digest in reading.digests]


def _assemble(
    found: tuple[Source, ...], train_sources: int, reading: _Reading, sides: list[int], share: float, skipped: Skipped
) -> Corpus:
    utf8 = np.frombuffer(reading.utf8, np.uint8)
    starts = np.cumsum([0, *reading.lengths[:-1]], dtype=np.int64)
    train: list[list[tuple[int, int, int]]] = [[] for _ in range(train_sources)]  # (document, start, length)
    heldout: list[tuple[int, int, int]] = []
    for i, (side, start, length) in enumerate(zip(sides, starts.tolist(), reading.lengths, strict=True)):
        if side == HELDOUT:
            heldout.append((i, start, length))
        elif side == TRAIN:
            train[reading.source[i]].append((i, start, length))
        elif side == CUT:
            kept = _cut(utf8[start : start + length], share)
            train[reading.source[i]].append((i, start, kept))
            if kept < length:
                heldout.append((i, start + kept, length - kept))

    def spans(chosen: list[tuple[int, int, int]]) -> Texts:
        table = np.asarray(chosen, np.int64).reshape(-1, 3)
        names = [reading.names[i] for i, _, _ in chosen]
        return Texts(utf8, table[:, 1], table[:, 2], names, [found[reading.source[i]].spec for i, _, _ in chosen])

    lines = b"".join(b"%b\0%b\n" % (os.fsencode(name), d.encode()) for name, d in sorted(reading.file_hashes))
    return Corpus(
        sources=found,
        train=tuple(map(spans, train)),
        heldout=spans(heldout),
        hash=hashlib.sha256(lines).hexdigest(),
        skipped=skipped,
        empty=reading.empty,
        dropped=sides.count(DROPPED),
    )


def _cut(text: np.ndarray, share: float) -> int:
    """Bytes of `text` to train on: about 1 - share of them, up to a line end or, without lines, to a character."""
    target = max(1, min(len(text) - 1, round(len(text) * (1 - share))))
    line_ends = np.flatnonzero(text[:-1] == ord("\n")) + 1
    characters = np.flatnonzero((text & 0xC0) != 0x80)[1:]  # Bytes that begin a character, the first one apart.
    for ends, reach in ((line_ends, share * len(text) / 2), (characters, len(text))):
        nearest = ends[np.abs(ends - target).argmin()] if len(ends) else 0
        if nearest and abs(nearest - target) <= reach:
            return int(nearest)
    return len(text)  # A single character.
