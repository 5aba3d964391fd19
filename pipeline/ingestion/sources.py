"""Records out of JSONL, CSV and Parquet files, gzip or not, local or on S3, one at a time."""

from __future__ import annotations

import csv
import datetime as dt
import gzip
import io
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from pipeline.contracts import TaskSpec
from pipeline.errors import InputError, did_you_mean
from pipeline.ingestion.config import ANY_TASK, DataConfig
from pipeline.ingestion.synthetic_ads import days_of, generate
from pipeline.storage import filesystem, is_remote, join

SUFFIXES = (".jsonl.gz", ".jsonl", ".csv.gz", ".csv", ".parquet")
MAX_LINE_BYTES = 4 << 20
"""Longest line of a record file; a longer one is rejected without being held in memory."""
SPLITS = ("train", "test")


@dataclass(frozen=True)
class SourceFile:
    """One input of records: a file, or one day of a synthetic task."""

    task: str
    """Task of its records; ``*`` where each names its own."""
    split: str
    location: str
    day: str | None = None
    size: int = 0
    """Bytes, part of the source digest with the time of change."""
    version: str = ""


@dataclass(frozen=True)
class Line:
    """One record as found, with where it stood; ``error`` where it could not be read."""

    number: int
    """Line or row number, from 1."""
    record: dict[str, Any]
    error: str | None = None


def find_sources(config: DataConfig, tasks: Sequence[TaskSpec]) -> list[SourceFile]:
    """Return the inputs in a fixed order.

    Raises:
        InputError: a file is missing, a glob matches nothing, or a task is unknown.
    """
    names = [task.name for task in tasks]
    for name in (*config.files, *(() if config.source == "records" else names)):
        known = names if config.source == "records" else _synthetic_names()
        if name not in known and name != ANY_TASK:
            raise InputError(f"data.files and tasks must name known tasks, got {name!r}{did_you_mean(name, known)}")
    if config.source == "synthetic_ads":
        windows = config.windows or config.synthetic.windows()
        return [
            SourceFile(name, split, f"synthetic_ads/{day.isoformat()}/{name}", day.isoformat())
            for name in names
            for split, window in windows.items()
            for day in days_of(window)
        ]
    found: list[SourceFile] = []
    if ANY_TASK in config.files or (not config.files and _has_mixed_files(config)):
        for split, pattern in _patterns(config, ANY_TASK).items():
            found += _expand(config, ANY_TASK, split, pattern)
        return found
    for name in names:
        for split, pattern in _patterns(config, name).items():
            found += _expand(config, name, split, pattern)
    return found


def _synthetic_names() -> list[str]:
    from pipeline.ingestion.synthetic_ads import TASKS

    return list(TASKS)


def _has_mixed_files(config: DataConfig) -> bool:
    root = str(config.root)
    fs, path = filesystem(root)
    return any(fs.exists(f"{path.rstrip('/')}/train{suffix}") for suffix in SUFFIXES)


def _patterns(config: DataConfig, task: str) -> dict[str, list[str]]:
    """Return for each split the candidates of one task: the first that exists is taken."""
    if task in config.files:
        return {split: [pattern] for split, pattern in config.files[task].items()}
    head = "" if task == ANY_TASK else f"{task}/"
    return {split: [f"{head}{split}{suffix}" for suffix in SUFFIXES] for split in SPLITS}


def _expand(config: DataConfig, task: str, split: str, candidates: list[str]) -> list[SourceFile]:
    if split in config.windows and task not in config.files:
        return _partitions(config, task, split)
    for candidate in candidates:
        location = candidate if _stands_alone(candidate) else join(config.root or ".", candidate)
        fs, path = filesystem(location)
        matches = sorted(fs.glob(path)) if any(c in path for c in "*?[") else [path] if fs.exists(path) else []
        if matches:
            return [_source(task, split, fs, match, location) for match in matches]
    if split == "test" and task not in config.files:
        return []
    raise InputError(
        f"task {task!r} must have its {split} records in {config.root or '.'}, found none of {candidates}; "
        f"put the file there or name it in data.files.{task}.{split}"
    )


def _stands_alone(pattern: str) -> bool:
    return pattern.startswith("/") or is_remote(pattern)


def _partitions(config: DataConfig, task: str, split: str) -> list[SourceFile]:
    found, missing = [], []
    for day in days_of(config.windows[split]):
        place = join(config.root or ".", day.isoformat())
        fs, path = filesystem(place)
        match = next((f"{path}/{task}{s}" for s in SUFFIXES if fs.exists(f"{path}/{task}{s}")), None)
        if match is None:
            missing.append(day.isoformat())
        else:
            found.append(_source(task, split, fs, match, place, day.isoformat()))
    if missing:
        raise InputError(
            f"data.windows.{split} must name days that have {config.root}/DATE/{task}.jsonl.gz, "
            f"missing {len(missing)}: {missing[:5]}; narrow the window or bring the partitions"
        )
    return found


def _source(task: str, split: str, fs: Any, path: str, location: str, day: str | None = None) -> SourceFile:
    if not path.endswith(SUFFIXES):
        raise InputError(f"a record file must end in one of {SUFFIXES}, got {path!r}; rename or convert it")
    info = fs.info(path)
    version = str(info.get("ETag") or info.get("mtime") or "")
    return SourceFile(task, split, f"s3://{path}" if is_remote(location) else path, day, int(info["size"]), version)


def read_records(source: SourceFile, config: DataConfig) -> Iterator[Line]:
    """Yield the records of one input in their order; unreadable lines come with their error."""
    if source.location.startswith("synthetic_ads/"):
        day = dt.date.fromisoformat(str(source.day))
        for number, record in enumerate(generate(config.synthetic, day)[source.task], 1):
            yield Line(number, record)
        return
    fs, path = filesystem(source.location)
    with fs.open(path, "rb") as raw:
        if path.endswith(".parquet"):
            yield from _parquet_rows(raw)
        else:
            stream = gzip.GzipFile(fileobj=raw) if path.endswith(".gz") else raw
            rows = _csv_rows if ".csv" in path.rsplit("/", 1)[-1] else _json_lines
            yield from _guarded(rows(stream), source.location)


def _guarded(lines: Iterator[Line], location: str) -> Iterator[Line]:
    try:
        yield from lines
    except (OSError, EOFError, csv.Error, UnicodeDecodeError) as error:
        raise InputError(
            f"{location} must be a whole file of its kind, reading stopped: {error}; copy it again"
        ) from error


def _json_lines(stream: Any) -> Iterator[Line]:
    number = 0
    buffered = io.BufferedReader(stream) if isinstance(stream, io.RawIOBase) else stream
    while line := buffered.readline(MAX_LINE_BYTES + 1):
        number += 1
        if len(line) > MAX_LINE_BYTES:
            while line and not line.endswith(b"\n"):
                line = buffered.readline(MAX_LINE_BYTES)
            yield Line(number, {}, f"line is longer than {MAX_LINE_BYTES} bytes")
            continue
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except ValueError:
            yield Line(number, {"raw": line[:200].decode("utf-8", "replace")}, "line is not JSON")
            continue
        if not isinstance(record, dict):
            yield Line(number, {"raw": line[:200].decode("utf-8", "replace")}, "line is not a JSON object")
            continue
        yield Line(number, record)


def _csv_rows(stream: Any) -> Iterator[Line]:
    csv.field_size_limit(MAX_LINE_BYTES)
    reader = csv.DictReader(io.TextIOWrapper(stream, encoding="utf-8-sig", newline=""))
    for number, row in enumerate(reader, 2):
        record = {k: v for k, v in row.items() if k is not None and v is not None}
        yield Line(number, record, "row has more fields than the header" if None in row else None)


def _parquet_rows(raw: Any) -> Iterator[Line]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    number = 0
    try:
        for batch in pq.ParquetFile(raw).iter_batches(batch_size=1024):
            for record in batch.to_pylist():
                number += 1
                yield Line(number, record)
    except pa.ArrowException as error:
        raise InputError(f"a .parquet file must be a whole one, reading stopped: {error}; copy it again") from error
