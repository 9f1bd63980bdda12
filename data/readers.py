"""From one file to its documents: UTF-8 bytes, or the reason why a record cannot be one."""

import dataclasses
import gzip
import hashlib
import json
import zlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from data.errors import DataError, shorten
from data.sources import File


@dataclasses.dataclass(frozen=True)
class Record:
    """One document, or one failure to read it. `number` counts records (lines, rows) from 1; 0 is the whole file."""

    number: int
    text: bytes = b""  # Sound UTF-8.
    reason: str = ""  # Why there is no text; "" when there is.


class Form(NamedTuple):
    """What is read of a record of a .jsonl or .parquet file.

    Attributes:
        fields: what every record must have.
        others: what it may have besides.
        parse: called with the record's number and those of its fields that are there.
        hint: where a person finds what is wanted.
    """

    fields: tuple[str, ...]
    others: tuple[str, ...]
    parse: Callable[[int, dict[str, Any]], Record]
    hint: str


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
    if file.kind == "text":
        yield _utf8(0, file.path.read_bytes())
        return
    parse = lambda number, record: string(number, record[text_field], text_field)  # noqa: E731
    yield from records(file, Form((text_field,), (), parse, "see config.data.text_field"))


def records(file: File, form: Form) -> Iterator[Record]:
    """The records of a .jsonl or .parquet file in order, each as `form.parse` makes it or with a reason."""
    yield from (_jsonl if file.kind == "jsonl" else _parquet)(file, form)


def _utf8(number: int, raw: bytes) -> Record:
    try:
        raw.decode("utf-8")
    except UnicodeDecodeError as error:
        return Record(number, reason=_not_utf8(error))
    return Record(number, raw)


def _not_utf8(error: UnicodeDecodeError) -> str:
    return f"not UTF-8 (byte 0x{error.object[error.start]:02x} at offset {error.start})"


def _jsonl(file: File, form: Form) -> Iterator[Record]:
    zipped = file.name.lower().endswith(".gz")
    number = 0
    try:
        if zipped and file.path.stat().st_size == 0:  # gzip reads an emptied file as an empty one, without complaint.
            yield Record(0, reason="the file is empty, which no gzip file is")
        with gzip.open(file.path, "rb") if zipped else open(file.path, "rb") as lines:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    yield _json_record(number, line, form)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        yield Record(number + 1, reason=f"the gzip stream is cut off or damaged after line {number} ({shorten(error)})")


def _json_record(number: int, line: bytes, form: Form) -> Record:
    try:
        record = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        return Record(number, reason=_not_utf8(error))
    except (ValueError, RecursionError) as error:
        end = "" if line.endswith(b"\n") else " and the line has no end: the file is probably cut off"
        return Record(number, reason=f"not JSON ({shorten(error, 80)}){end}")
    if not isinstance(record, dict):
        kind = type(record).__name__
        return Record(number, reason=f"a JSON {kind}, not an object with the field {form.fields[0]!r}")
    for field in form.fields:
        if field not in record:
            there = shorten(", ".join(record), 80) or "none"
            return Record(number, reason=f"no field {field!r} (its fields: {there}; {form.hint})")
    return form.parse(number, {field: record[field] for field in (*form.fields, *form.others) if field in record})


def string(number: int, value: Any, field: str) -> Record:
    """The record whose text is `value`, the content of `field`."""
    if not isinstance(value, str):
        return Record(number, reason=f"field {field!r} holds {type(value).__name__}, not text")
    try:
        return Record(number, value.encode("utf-8"))
    except UnicodeEncodeError as error:  # JSON may hold half a surrogate pair.
        return Record(number, reason=f"field {field!r} is not Unicode text (half a surrogate at {error.start})")


def _parquet(file: File, form: Form) -> Iterator[Record]:
    try:
        import pyarrow  # Only this kind of file needs it.
        from pyarrow import parquet
    except ImportError as error:
        raise DataError(f"{file.name}: reading .parquet needs pyarrow: pip install pyarrow") from error

    number = 0
    try:
        with parquet.ParquetFile(file.path, page_checksum_verification=True) as table:
            there = table.schema_arrow.names
            for field in form.fields:
                if field not in there:
                    columns = shorten(", ".join(there), 80)
                    yield Record(0, reason=f"no column {field!r} (columns: {columns}; {form.hint})")
                    return
            wanted = [field for field in (*form.fields, *form.others) if field in there]
            for batch in table.iter_batches(columns=wanted, batch_size=1024):
                for row in range(batch.num_rows):
                    number += 1
                    yield _row(number, {field: batch.column(field)[row] for field in wanted}, form)
    except (pyarrow.ArrowException, OSError) as error:
        reason = f"the table is cut off or damaged after row {number} ({shorten(error, 100)})"
        yield Record(number + 1 if number else 0, reason=reason)


def _row(number: int, cells: dict[str, Any], form: Form) -> Record:
    record = {}
    for field, cell in cells.items():
        try:
            record[field] = cell.as_py()
        except UnicodeDecodeError as error:
            return Record(number, reason=f"field {field!r} is not UTF-8 ({shorten(error, 80)})")
    return form.parse(number, record)
