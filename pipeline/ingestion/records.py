"""Records out of JSONL, CSV and Parquet files, gzip or not, one at a time, in bounded memory."""

from __future__ import annotations

import csv
import datetime as dt
import gzip
import io
import json
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from pipeline.errors import InputError
from pipeline.ingestion.config import DataConfig
from pipeline.ingestion.sources import SourceFile
from pipeline.ingestion.synthetic_ads import generate
from pipeline.retry import is_outage
from pipeline.storage import filesystem, is_remote

MAX_LINE_BYTES = 4 << 20
"""Longest line of a record file; a longer one is rejected without being held in memory."""
UNIT_BYTES = 64 << 20
"""A plain .jsonl file is cut into stretches of this size, which are read in parallel."""


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
    """Line or row number within the unit, from 1."""
    place: int
    """A number that tells it from the other records of its source, however the source is cut into units."""
    record: dict[str, Any]
    error: str | None = None


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


def read_unit(unit: Unit, config: DataConfig) -> Iterator[Line]:
    """Yield the records of one unit in their order; unreadable lines come with their error.

    Raises:
        InputError: the file as a whole cannot be read (a truncated gzip, no Parquet).
    """
    source = unit.source
    if source.is_synthetic:
        day = dt.date.fromisoformat(str(source.day))
        for number, record in enumerate(generate(config.synthetic, day)[source.task], 1):
            yield Line(number, number, record)
        return
    fs, path = filesystem(source.location)
    try:
        with fs.open(path, "rb") as raw:
            if path.endswith(".parquet"):
                yield from _parquet_rows(raw)
            elif ".csv" in path.rsplit("/", 1)[-1]:
                yield from _csv_rows(gzip.GzipFile(fileobj=raw) if path.endswith(".gz") else raw)
            elif path.endswith(".gz"):
                yield from _json_lines(io.BufferedReader(gzip.GzipFile(fileobj=raw), 1 << 20), 0, None)
            else:
                yield from _json_lines(raw, unit.start, unit.stop)
    except (OSError, EOFError, zlib.error, csv.Error, UnicodeDecodeError) as error:
        if is_remote(source.location) and is_outage(error):
            raise  # the caller reads again
        raise InputError(
            f"{source.location} must be a whole file of its kind, reading stopped: {error}; copy it again"
        ) from error


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
    return Line(number, place, record)


def _csv_rows(stream: Any) -> Iterator[Line]:
    csv.field_size_limit(MAX_LINE_BYTES)
    reader = csv.DictReader(io.TextIOWrapper(stream, encoding="utf-8-sig", newline=""), strict=True)
    for number, row in enumerate(reader, 2):
        record = {k: v for k, v in row.items() if k is not None and v is not None}
        yield Line(number, number, record, "row has more fields than the header" if None in row else None)


def _parquet_rows(raw: Any) -> Iterator[Line]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    number = 0
    try:
        for batch in pq.ParquetFile(raw).iter_batches(batch_size=1024):
            for record in batch.to_pylist():
                number += 1
                yield Line(number, number, record)
    except pa.ArrowException as error:
        raise OSError(f"not a whole Parquet file: {error}") from error
