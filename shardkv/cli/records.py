"""Files of keys and values: JSON lines and CSV, read and written as byte streams with known offsets.

A record is a key and a value (and, written, a version). JSON lines follow the JSON rules; CSV has a header and the
columns ``key, key_base64, value, value_base64, version``, of each pair exactly one filled. Text is verbatim, without
escapes. Offsets are what lets an interrupted import or export carry on.
"""

import csv
import io
import json
from collections.abc import Iterator
from typing import BinaryIO, Final, NamedTuple

from shardkv.cli import text
from shardkv.json_rules import BASE64_SUFFIX, json_field
from shardkv.types import KEY_BYTES_MAX, VALUE_BYTES_MAX

FORMATS: Final = ("jsonl", "csv")
COLUMNS: Final = ("key", "key_base64", "value", "value_base64", "version")
"""Of CSV, and the fields of JSON lines."""

LINE_BYTES_MAX: Final = 64 * 1024 * 1024
"""Far above the largest record however it is escaped. A file that is none may have no second line."""


class Record(NamedTuple):
    key: bytes
    value: bytes
    offset_after: int
    """Where the next record starts in the file, in bytes."""
    line: int
    """The line it ends on, from 1."""


class BadRecord(ValueError):
    """A record that cannot be read; the message begins with its line."""


def format_of(path: str, given: str | None) -> str:
    """The format asked for, or the one that the file's name says; JSON lines if it says nothing."""
    return given or ("csv" if path.lower().endswith(".csv") else "jsonl")


def write_header(file_format: str) -> bytes:
    return _csv_line(COLUMNS) if file_format == "csv" else b""


def write_record(file_format: str, key: bytes, value: bytes, version: int) -> bytes:
    """One record with its line end."""
    fields = dict([json_field("key", key), json_field("value", value), ("version", str(version))])
    if file_format == "csv":
        return _csv_line([str(fields.get(column, "")) for column in COLUMNS])
    return json.dumps(fields, ensure_ascii=False, separators=(",", ":")).encode() + b"\n"


def _csv_line(cells: tuple[str, ...] | list[str]) -> bytes:
    line = io.StringIO()
    # "\n" alone would leave a bare "\r" in a field unquoted and so unreadable.
    csv.writer(line, lineterminator="\r\n").writerow(cells)
    return line.getvalue().encode()


def read_records(file: BinaryIO, file_format: str, offset: int = 0, line: int = 0) -> Iterator[Record]:
    """The records from ``offset`` on, which is 0 or an ``offset_after``; ``line`` counts the lines before it.

    Raises:
        BadRecord: a line is not a record; those before it have been yielded.
    """
    lines = _Lines(file, offset, line)
    return _read_csv(file, lines) if file_format == "csv" else _read_json_lines(lines)


class _Lines:
    """The lines of a file as text, with the offset and the count of those handed out, without a byte order mark."""

    def __init__(self, file: BinaryIO, offset: int, line: int) -> None:
        self.offset = offset
        self.line = line
        self._file = file
        if offset:
            file.seek(offset)

    def __iter__(self) -> Iterator[str]:
        while raw := self._file.readline(LINE_BYTES_MAX + 1):
            self.offset += len(raw)
            self.line += 1
            if len(raw) > LINE_BYTES_MAX:
                raise BadRecord(f"line {self.line}: longer than {LINE_BYTES_MAX:,} bytes, which no record is")
            try:
                yield raw.decode("utf-8-sig" if self.line == 1 else "utf-8")
            except UnicodeDecodeError as problem:
                raise BadRecord(f"line {self.line}: not UTF-8: {problem}") from None


def _read_json_lines(lines: _Lines) -> Iterator[Record]:
    for content in lines:
        if not content.strip():
            continue
        try:
            fields = json.loads(content, object_pairs_hook=tuple)  # a dict would hold the last of several alike
        except (ValueError, RecursionError) as problem:
            raise BadRecord(f"line {lines.line}: not JSON: {problem}") from None
        if isinstance(fields, tuple):
            _refuse_repeated([name for name, _ in fields], f"line {lines.line}: the record")
            fields = dict(fields)
        yield _record(fields, lines)


def _refuse_repeated(names: list[str], where: str) -> None:
    """Which of the two was meant nobody knows. What no record has may be there more than once."""
    if len(set(names)) < len(names):
        for name in COLUMNS:
            if names.count(name) > 1:
                raise BadRecord(f"{where} names {name} more than once")


def _read_csv(file: BinaryIO, lines: _Lines) -> Iterator[Record]:
    resumed_at = lines.offset
    if resumed_at:
        file.seek(0)
    top = _Lines(file, 0, 0)
    csv.field_size_limit(LINE_BYTES_MAX)
    try:
        header = next(csv.reader(top), [])
    except csv.Error as problem:
        raise _not_csv(top, problem) from None
    lacking = [name for name in ("key", "value") if not {name, name + BASE64_SUFFIX} & set(header)]
    if lacking:
        raise BadRecord(
            f"line {top.line or 1}: the header lacks {' and '.join(lacking)};"
            f" a CSV file starts with one such as key,value, without blanks, and this is {header!r:.200}"
        )
    _refuse_repeated(header, f"line {top.line}: the header")
    if resumed_at:
        file.seek(resumed_at)
    else:
        lines.offset, lines.line = top.offset, top.line
    rows = csv.reader(lines, strict=True)
    while True:
        try:
            row = next(rows, None)
        except csv.Error as problem:
            raise _not_csv(lines, problem) from None
        if row is None:
            return
        if not row:
            continue
        if len(row) != len(header):
            raise BadRecord(f"line {lines.line}: {len(row)} fields under a header of {len(header)}")
        fields: dict[str, object] = dict(zip(header, row))
        for name in ("key", "value"):
            # Of each pair the empty column is no field. Where both are filled the record is refused.
            other = name if fields.get(name + BASE64_SUFFIX) else name + BASE64_SUFFIX
            if fields.get(other) == "":
                del fields[other]
        yield _record(fields, lines)


def _not_csv(lines: _Lines, problem: csv.Error) -> BadRecord:
    why = str(problem)
    if why.startswith("new-line character"):  # and goes on about Python
        why = "a CR without LF ends no line; end lines in LF or CRLF, and put fields that hold a CR in quotes"
    return BadRecord(f"line {lines.line}: not CSV: {why}")


def _record(fields: object, lines: _Lines) -> Record:
    if not isinstance(fields, dict):
        raise BadRecord(f"line {lines.line}: a record must be an object with key and value")
    try:
        key, value = text.bytes_from_json(fields, "key"), text.bytes_from_json(fields, "value")
    except ValueError as problem:
        raise BadRecord(f"line {lines.line}: {problem}") from None
    if not key or value is None:
        raise BadRecord(f"line {lines.line}: a record needs a key of at least one byte and a value")
    for name, part, bytes_max in (("key", key, KEY_BYTES_MAX), ("value", value, VALUE_BYTES_MAX)):
        if len(part) > bytes_max:
            raise BadRecord(f"line {lines.line}: a {name} may have {bytes_max} bytes; this one has {len(part)}")
    return Record(key, value, lines.offset, lines.line)
