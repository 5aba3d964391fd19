"""Records out of JSONL, CSV and Parquet files, gzip or not, one at a time, in bounded memory."""

from __future__ import annotations

import csv
import gzip
import io
import json
import re
import zlib
from collections import Counter, deque
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Any

from pipeline.errors import InputError
from pipeline.ingestion.config import DataConfig
from pipeline.ingestion.diagnosis import cause
from pipeline.ingestion.source_file import SourceFile
from pipeline.ingestion.synthetic_source import synthetic_records
from pipeline.ingestion.tar_records import TarSample, tar_records
from pipeline.retry import is_outage
from pipeline.storage import filesystem, is_remote

MAX_LINE_BYTES = 4 << 20
"""Longest line of a record file and largest row of a Parquet file; a longer one is rejected without being held in
memory."""
UNIT_BYTES = 64 << 20
"""A plain .jsonl file is cut into stretches of this size, which are read in parallel."""
_NOT_UTF8 = re.compile("[\udc80-\udcff]")
"""A byte that ``surrogateescape`` has let through."""
_BEFORE_VALUES = (b'":', b" :", b"\t:", b"\r:")
"""One of these stands between each key of a line of JSON and its value, and perhaps elsewhere."""


@dataclass(frozen=True)
class Unit:
    """A part of the input that one worker reads: a whole source, or a stretch of a plain .jsonl file."""

    source: SourceFile
    source_number: int
    start: int = 0
    stop: int | None = None
    """Bytes: lines that begin in [start, stop) belong to it."""


@dataclass(frozen=True)
class Line:
    """One record as found; ``error`` where it could not be read."""

    number: int
    """Line or row number within the unit, from 1; of a CSV row over several lines the first one."""
    place: int
    """A number that tells it from the other records of its source, however the source is cut into units."""
    record: dict[str, Any]
    error: str | None = None
    sample: TarSample | None = None
    """Where it stands in a tar that others wrote."""


def split_units(sources: list[SourceFile], unit_bytes: int = UNIT_BYTES) -> list[Unit]:
    """Cut the inputs into units, in their order."""
    units = []
    for number, source in enumerate(sources):
        if source.location.endswith(".jsonl") and source.size > unit_bytes:
            starts = range(0, source.size, unit_bytes)
            units += [Unit(source, number, start, start + unit_bytes) for start in starts]
        else:
            units.append(Unit(source, number))
    return units


def read_unit(unit: Unit, config: DataConfig, columns: Collection[str] | None = None) -> Iterator[Line]:
    """Yield the records of one unit in their order; unreadable lines come with their error.

    Args:
        unit: what to read.
        config: the input.
        columns: fields that are needed, which spares the others of a Parquet file; None for all.

    Raises:
        InputError: the file as a whole cannot be read (a truncated gzip, no Parquet, a CSV header that is none or
            names a field twice).
    """
    source = unit.source
    if source.is_synthetic:
        for number, record in enumerate(synthetic_records(config, source), 1):
            yield Line(number, number, record)
        return
    fs, path = filesystem(source.location)
    try:
        if source.is_tar:
            for number, found in enumerate(tar_records(source.location, columns or ()), 1):
                yield Line(number, number, *found)
            return
        with fs.open(path, "rb") as raw:
            if path.endswith(".parquet"):
                yield from _parquet_lines(raw, columns, source.location)
            elif ".csv" in path.rsplit("/", 1)[-1]:
                yield from _csv_rows(gzip.GzipFile(fileobj=raw) if path.endswith(".gz") else raw, source.location)
            elif path.endswith(".gz"):
                yield from _json_lines(io.BufferedReader(gzip.GzipFile(fileobj=raw), 1 << 20), 0, None)
            else:
                lines = io.BufferedReader(_Stretches(raw), 1 << 20) if is_remote(source.location) else raw
                yield from _json_lines(lines, unit.start, unit.stop)
    except (OSError, EOFError, zlib.error, csv.Error) as error:
        if is_remote(source.location) and is_outage(error):
            raise  # the caller reads again
        raise InputError(
            f"{source.location} must be a whole file of its kind, reading stopped: {error}; copy it again"
            f"{cause(source)}"
        ) from error


class _Stretches(io.RawIOBase):
    """A file on S3, whose own ``readline`` takes no limit, for a buffer to be laid over it."""

    def __init__(self, file: Any) -> None:
        self._file = file

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = 0) -> int:
        return int(self._file.seek(offset, whence))

    def tell(self) -> int:
        return int(self._file.tell())

    def readinto(self, buffer: Any) -> int:
        data = self._file.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)


def _json_lines(stream: Any, start: int, stop: int | None) -> Iterator[Line]:
    place = start
    if start:  # the line that runs across the border belongs to the unit before
        stream.seek(start - 1)
        place += _skip_line(stream) - 1
    number = 0
    while (stop is None or place < stop) and (line := stream.readline(MAX_LINE_BYTES + 1)):
        number, at = number + 1, place
        place += len(line)
        if len(line) > MAX_LINE_BYTES:
            place += 0 if line.endswith(b"\n") else _skip_line(stream)
            yield Line(number, at, {}, f"line is longer than {MAX_LINE_BYTES} bytes")
        elif line.strip():
            yield _json_line(number, at, line)


def _skip_line(stream: Any) -> int:
    skipped = 0
    while line := stream.readline(MAX_LINE_BYTES):
        skipped += len(line)
        if line.endswith(b"\n"):
            break
    return skipped


def _json_line(number: int, place: int, line: bytes) -> Line:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return Line(number, place, {"raw": line[:200].decode("utf-8", "replace")}, "line is not JSON")
    if not isinstance(record, dict):
        return Line(number, place, {"raw": line[:200].decode("utf-8", "replace")}, "line is not a JSON object")
    if line.count(b":") != len(record) and sum(map(line.count, _BEFORE_VALUES)) != len(record):
        try:  # more colons than keys: they stand in texts, or a key came twice
            json.loads(line, object_pairs_hook=_without_doubles)
        except _DoubleKeyError:
            return Line(number, place, {"raw": line[:200].decode("utf-8", "replace")}, "line has a key twice")
    return Line(number, place, record)


class _DoubleKeyError(Exception):
    pass


def _without_doubles(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    record = dict(pairs)
    if len(record) != len(pairs):
        raise _DoubleKeyError
    return record


class _CsvLines:
    """The physical lines of a CSV file, decoded; those of a row that proves bad are read again, but for its first."""

    def __init__(self, stream: Any) -> None:
        self._text = io.TextIOWrapper(stream, encoding="utf-8-sig", errors="surrogateescape", newline="")
        self._ahead: deque[str] = deque()
        self._row: list[str] = []
        self._size = 0
        self._number = 0

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        line = self._ahead.popleft() if self._ahead else self._next_line()
        if not line:
            raise StopIteration
        self._row.append(line)
        self._size += len(line)
        if self._size > MAX_LINE_BYTES:
            raise csv.Error(f"longer than {MAX_LINE_BYTES} characters")
        if not line.isascii() and _NOT_UTF8.search(line):
            raise csv.Error("not UTF-8")
        return line

    def _next_line(self) -> str:
        line = self._text.readline(MAX_LINE_BYTES + 1)
        rest = line
        while len(rest) >= MAX_LINE_BYTES and not rest.endswith(("\n", "\r")):
            rest = self._text.readline(MAX_LINE_BYTES)
        return line

    def begin_row(self) -> int:
        """Return the number of the line that the next row begins with."""
        self._number += len(self._row)
        self._row, self._size = [], 0
        return self._number + 1

    def take_back(self) -> str:
        """Return the first line of the row just read; the lines after it come again."""
        self._ahead.extendleft(reversed(self._row[1:]))
        del self._row[1:]
        return self._row[0]


def _csv_rows(stream: Any, name: str) -> Iterator[Line]:
    csv.field_size_limit(MAX_LINE_BYTES)
    lines = _CsvLines(stream)
    reader = csv.reader(lines, strict=True)
    header = next(reader, [])
    counts = Counter(field.strip() for field in header)
    if double := [field for field, count in counts.items() if field and count > 1]:
        raise InputError(
            f"a CSV header must have each field once, that of {name} has {double} more than once; rename one"
        )
    while True:
        number = lines.begin_row()
        try:
            row = next(reader, None)
        except csv.Error as error:
            raw = lines.take_back()[:200].encode(errors="surrogateescape").decode(errors="replace")
            yield Line(number, number, {"raw": raw}, f"row cannot be read: {error}")
            continue
        if row is None:
            return
        if row:
            error_of_row = "row has more fields than the header" if len(row) > len(header) else None
            yield Line(number, number, dict(zip(header, row, strict=False)), error_of_row)


def _parquet_lines(raw: Any, columns: Collection[str] | None, name: str) -> Iterator[Line]:
    from pipeline.ingestion.parquet import parquet_rows

    for number, row in enumerate(parquet_rows(raw, columns, MAX_LINE_BYTES, name), 1):
        yield Line(number, number, *row)
