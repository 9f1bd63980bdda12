"""From one file to its documents: UTF-8 bytes, or the reason why a record cannot be one."""

import dataclasses
import gzip
import hashlib
import json
import zlib
from collections.abc import Iterator
from typing import Any

from data.errors import DataError, shorten
from data.sources import File


@dataclasses.dataclass(frozen=True)
class Record:
    """One document, or one failure to read it. `number` counts records (lines, rows) from 1; 0 is the whole file."""

    number: int
    text: bytes = b""  # Sound UTF-8.
    reason: str = ""  # Why there is no text; "" when there is.


def content_hash(file: File) -> str:
    """sha256 of the file's bytes as they lie on disk. Raises OSError, also for what is no regular file."""
    if file.path.exists() and not file.path.is_file():
        raise OSError("a pipe or device, not a file")  # Opening a pipe would wait for ever.
    with open(file.path, "rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def read(file: File, text_field: str) -> Iterator[Record]:
    """The documents of `file` in order; a record that cannot be read comes as a Record with a reason.

    A .txt, .md or .py file is one document; .jsonl and .parquet hold one per record, in the field `text_field`.
    Line ends and byte order marks stay as they are: what a model is scored on is what the file holds.
    """
    readers = {"text": _text, "jsonl": _jsonl, "parquet": _parquet}
    yield from readers[file.kind](file, text_field)


def _text(file: File, text_field: str) -> Iterator[Record]:
    del text_field
    yield _utf8(0, file.path.read_bytes())


def _utf8(number: int, raw: bytes) -> Record:
    try:
        raw.decode("utf-8")
    except UnicodeDecodeError as error:
        return Record(number, reason=_not_utf8(error))
    return Record(number, raw)


def _not_utf8(error: UnicodeDecodeError) -> str:
    return f"not UTF-8 (byte 0x{error.object[error.start]:02x} at offset {error.start})"


def _jsonl(file: File, text_field: str) -> Iterator[Record]:
    zipped = file.name.lower().endswith(".gz")
    number = 0
    try:
        if zipped and file.path.stat().st_size == 0:  # gzip reads an emptied file as an empty one, without complaint.
            yield Record(0, reason="the file is empty, which no gzip file is")
        with gzip.open(file.path, "rb") if zipped else open(file.path, "rb") as lines:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    yield _json_record(number, line, text_field)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        yield Record(number + 1, reason=f"the gzip stream is cut off or damaged after line {number} ({shorten(error)})")


def _json_record(number: int, line: bytes, text_field: str) -> Record:
    try:
        record = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        return Record(number, reason=_not_utf8(error))
    except (ValueError, RecursionError) as error:
        end = "" if line.endswith(b"\n") else " and the line has no end: the file is probably cut off"
        return Record(number, reason=f"not JSON ({shorten(error, 80)}){end}")
    if not isinstance(record, dict):
        return Record(number, reason=f"a JSON {type(record).__name__}, not an object with the field {text_field!r}")
    if text_field not in record:
        fields = shorten(", ".join(record), 80) or "none"
        return Record(number, reason=f"no field {text_field!r} (its fields: {fields}; see config.data.text_field)")
    return _string(number, record[text_field], text_field)


def _string(number: int, value: Any, text_field: str) -> Record:
    if not isinstance(value, str):
        return Record(number, reason=f"field {text_field!r} holds {type(value).__name__}, not text")
    try:
        return Record(number, value.encode("utf-8"))
    except UnicodeEncodeError as error:  # JSON may hold half a surrogate pair.
        return Record(number, reason=f"field {text_field!r} is not Unicode text (half a surrogate at {error.start})")


def _parquet(file: File, text_field: str) -> Iterator[Record]:
    try:
        import pyarrow  # Only this kind of file needs it.
        from pyarrow import parquet
    except ImportError as error:
        raise DataError(f"{file.name}: reading .parquet needs pyarrow: pip install pyarrow") from error

    number = 0
    try:
        with parquet.ParquetFile(file.path, page_checksum_verification=True) as table:
            if text_field not in table.schema_arrow.names:
                columns = shorten(", ".join(table.schema_arrow.names), 80)
                yield Record(0, reason=f"no column {text_field!r} (columns: {columns}; see config.data.text_field)")
                return
            for batch in table.iter_batches(columns=[text_field], batch_size=1024):
                for value in batch.column(0):
                    number += 1
                    yield _cell(number, value, text_field)
    except (pyarrow.ArrowException, OSError) as error:
        reason = f"the table is cut off or damaged after row {number} ({shorten(error, 100)})"
        yield Record(number + 1 if number else 0, reason=reason)


def _cell(number: int, value: Any, text_field: str) -> Record:
    try:
        return _string(number, value.as_py(), text_field)
    except UnicodeDecodeError as error:
        return Record(number, reason=f"field {text_field!r} is not UTF-8 ({shorten(error, 80)})")
