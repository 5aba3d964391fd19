"""Records out of JSON, JSONL, CSV and Parquet files, gzip or not, one at a time, in bounded memory."""

from __future__ import annotations

import csv
import gzip
import io
import zlib
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from pipeline.errors import InputError
from pipeline.ingestion.config import DataConfig
from pipeline.ingestion.csv_records import csv_rows, found_dialect
from pipeline.ingestion.diagnosis import cause, head_of
from pipeline.ingestion.encodings import HEAD_BYTES, AsUtf8, text_encoding, undecodable
from pipeline.ingestion.json_records import is_array, json_array, json_line
from pipeline.ingestion.source_file import MAX_LINE_BYTES, Line, SourceFile
from pipeline.ingestion.synthetic_source import synthetic_records
from pipeline.ingestion.tar_records import tar_records
from pipeline.progress import say
from pipeline.retry import is_outage, persistently
from pipeline.storage import filesystem, is_remote, stamp_of

JSON_KEY = "data.json_encoding"
UNIT_BYTES = 64 << 20
"""A plain .jsonl file is cut into stretches of this size, and a Parquet file into stretches of row groups of at least
this size, which are read in parallel."""


@dataclass(frozen=True)
class Unit:
    """A part of the input that one worker reads: a whole source, or a stretch of a plain .jsonl or Parquet file."""

    source: SourceFile
    source_number: int
    start: int = 0
    stop: int | None = None
    """Lines that begin in the bytes [start, stop) belong to it, or the row groups of these numbers."""


def split_units(sources: list[SourceFile], unit_bytes: int = UNIT_BYTES) -> list[Unit]:
    """Cut the inputs into units, in their order."""
    units = []
    for number, source in enumerate(sources):
        if source.location.endswith(".jsonl") and source.size > unit_bytes:
            starts = range(0, source.size, unit_bytes)
            units += [Unit(source, number, start, start + unit_bytes) for start in starts]
        elif is_cut_by_row_groups(source, unit_bytes):
            units += [Unit(source, number, *stretch) for stretch in _row_groups(source, unit_bytes)]
        else:
            units.append(Unit(source, number))
    return units


def is_cut_by_row_groups(source: SourceFile, unit_bytes: int = UNIT_BYTES) -> bool:
    """Whether a source is a Parquet file so large that its row groups are read in parallel."""
    return source.location.endswith(".parquet") and source.size > unit_bytes


def _row_groups(source: SourceFile, unit_bytes: int) -> list[tuple[int, int | None]]:
    from pipeline.ingestion.row_groups import row_group_stretches

    fs, path = filesystem(source.location)

    def stretches() -> list[tuple[int, int | None]]:
        try:
            with fs.open(path, "rb") as raw:
                return [*row_group_stretches(raw, unit_bytes)] or [(0, None)]
        except OSError as error:
            if is_remote(source.location) and is_outage(error):
                raise
            return [(0, None)]  # where it is read, its damage is said

    return persistently(stretches, source.location) if is_remote(source.location) else stretches()


def read_unit(
    unit: Unit, config: DataConfig, columns: Collection[str] | None = None, by_image: bool = True
) -> Iterator[Line]:
    """Yield the records of one unit in their order; unreadable lines come with their error.

    Args:
        unit: what to read.
        config: the input.
        columns: fields that are needed, which spares the others of a Parquet file; None for all.
        by_image: of an adopted tar, see ``tar_records``.

    Raises:
        InputError: the file as a whole cannot be read (a truncated gzip, no Parquet, a CSV header that is none or
            names a field twice), or has changed since it was found.
    """
    source = unit.source
    if source.is_synthetic:
        for number, record in enumerate(synthetic_records(config, source), 1):
            yield Line(number, number, record)
        return
    fs, path = filesystem(source.location)
    yield from _lines(unit, config, columns, by_image, fs, path)
    if is_remote(source.location) and source.digest:
        _check_unchanged(source, fs, path)


def _check_unchanged(source: SourceFile, fs: Any, path: str) -> None:
    """Refuse a file that is another one than was found: part of what was read may be the old one's."""
    fs.invalidate_cache()
    if (now := stamp_of(fs.info(path))) != source.digest:
        raise InputError(
            f"{source.location} must stay as it is while it is read, its version was {source.digest} and is {now}; "
            "run again when it is written whole"
        )


def _lines(
    unit: Unit, config: DataConfig, columns: Collection[str] | None, by_image: bool, fs: Any, path: str
) -> Iterator[Line]:
    source = unit.source
    try:
        if source.is_tar:
            for number, found in enumerate(tar_records(source.location, columns or (), by_image), 1):
                yield Line(number, number, *found)
            return
        with fs.open(path, "rb") as raw:
            if path.endswith(".parquet"):
                yield from _parquet_lines(raw, columns, unit)
            elif ".csv" in path.rsplit("/", 1)[-1]:
                unpacked = gzip.GzipFile(fileobj=raw) if path.endswith(".gz") else raw
                yield from csv_rows(unpacked, config.csv, source.location)
            else:
                lines = raw
                if path.endswith(".gz"):
                    lines = io.BufferedReader(gzip.GzipFile(fileobj=raw), 1 << 20)
                elif is_remote(source.location):
                    lines = io.BufferedReader(_Stretches(raw), 1 << 20)
                yield from _json_records(lines, unit, config.json_encoding)
    except (OSError, EOFError, zlib.error, csv.Error) as error:
        if is_remote(source.location) and is_outage(error):
            raise  # the caller reads again
        raise InputError(
            f"{source.location} must be a whole file of its kind, reading stopped: {error}; copy it again"
            f"{cause(source)}"
        ) from error


def tell_dialects(config: DataConfig, sources: Sequence[SourceFile]) -> None:
    """Say which dialect each CSV file is found to be written in, where that is not told, and which encoding JSON is in.

    Raises:
        InputError: it is not found.
    """
    for source in sources:
        name = source.location.rsplit("/", 1)[-1]
        if config.csv.is_open and ".csv" in name:
            found = found_dialect(head_of(source.location), config.csv, source.name)
            say(f"{source.name}: CSV with delimiter {found.delimiter!r} in {found.encoding}")
        elif config.json_encoding == "auto" and ".json" in name:
            encoding = text_encoding(head_of(source.location), "auto", source.name, JSON_KEY)
            say(f"{source.name}: JSON in {encoding}")


class _Stretches(io.RawIOBase):
    """A file from afar, whose own ``readline`` takes no limit, for a buffer to be laid over it."""

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


def _json_records(stream: Any, unit: Unit, told: str) -> Iterator[Line]:
    """Yield the records of a JSON file, an array or lines, in whatever encoding."""
    name, start, stop = unit.source.location, unit.start, unit.stop
    encoding = text_encoding(stream.read(HEAD_BYTES), told, name, JSON_KEY)
    stream.seek(0)
    if encoding != "utf-8":
        if start:  # no line's beginning is known but the first one's: the first unit reads all
            return
        stream, stop = io.BufferedReader(AsUtf8(stream, encoding), 1 << 20), None
    try:
        if name.removesuffix(".gz").endswith(".json") and is_array(stream):
            yield from json_array(stream)
        else:
            yield from _json_lines(stream, start, stop)
    except UnicodeError as error:
        raise undecodable(name, encoding, JSON_KEY, error) from error


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
            yield json_line(number, at, line)


def _skip_line(stream: Any) -> int:
    skipped = 0
    while line := stream.readline(MAX_LINE_BYTES):
        skipped += len(line)
        if line.endswith(b"\n"):
            break
    return skipped


def _parquet_lines(raw: Any, columns: Collection[str] | None, unit: Unit) -> Iterator[Line]:
    from pipeline.ingestion.parquet import parquet_rows
    from pipeline.ingestion.row_groups import rows_before

    before, stretch = rows_before(raw, unit.start), (unit.start, unit.stop)
    for number, row in enumerate(parquet_rows(raw, columns, MAX_LINE_BYTES, unit.source.location, stretch), 1):
        yield Line(number, before + number, *row)
