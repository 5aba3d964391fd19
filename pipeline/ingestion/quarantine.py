"""Rejected records: counted, limited, and kept with the reason, the source and the line."""

from __future__ import annotations

import contextlib
import gzip
import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from pipeline.contracts import RejectCount, TaskSpec
from pipeline.errors import InputError
from pipeline.ingestion.config import DataConfig
from pipeline.ingestion.diagnosis import cause, missing_fields
from pipeline.ingestion.records import Unit
from pipeline.ingestion.resolve import CHUNK_ROWS, REASONS, Decisions
from pipeline.ingestion.scan import Scanned, part, read_rows
from pipeline.ingestion.tar_places import TarPlaces
from pipeline.json_text import parse_json
from pipeline.record import column_of
from pipeline.validate import fields_asked

FOLDER = "quarantine"
RECORDS_A_FILE = 100_000


def check_limits(
    config: DataConfig, scanned: Sequence[Scanned], units: Sequence[Unit], tasks: Sequence[TaskSpec]
) -> None:
    """Stop where too many of a task's records are invalid; repeated and leaking ones do not count.

    Raises:
        InputError: with the worst reasons, the first place, and what its file has instead.
    """
    specs = {task.name: task for task in tasks}
    for task in sorted({task for unit in scanned for task in (*unit.tasks, *unit.rejects)}):
        reasons = Counter[str]()
        for unit in scanned:
            reasons.update(unit.rejects.get(task, {}))
        rejected = reasons.total()
        total = rejected + sum(unit.tasks.get(task, 0) for unit in scanned)
        limit = total if config.max_rejected is None else config.max_rejected
        if rejected <= min(limit, config.max_rejected_share * total):
            continue
        first = next(unit for unit in scanned if task in unit.first_rejects)
        line = first_lines(scanned, units)[first.number] + first.first_rejects[task][0]
        source, columns = units[first.number].source, specs[task].columns
        missing = missing_fields(first.rejects[task], fields_asked(specs[task]))
        wanted = [column_of(columns[field], ()) if field in columns else field for field in missing]
        raise InputError(
            f"task {task!r}: at most {config.max_rejected_share:.1%} of its records"
            f"{'' if config.max_rejected is None else f' and {config.max_rejected} in number'} may be invalid, got "
            f"{rejected} of {total}: {'; '.join(f'{n} x {why}' for why, n in reasons.most_common(5))} (first: "
            f"{source.name} line {line}){cause(source, wanted)}; fix them, or "
            "raise data.max_rejected_share"
        )


def first_lines(scanned: Sequence[Scanned], units: Sequence[Unit]) -> dict[int, int]:
    """Return for each unit how many lines of its source come before it."""
    before: dict[int, int] = {}
    for at, unit in enumerate(scanned):
        same = at > 0 and units[unit.number].source_number == units[scanned[at - 1].number].source_number
        before[unit.number] = before[scanned[at - 1].number] + scanned[at - 1].lines if same else 0
    return before


def write_quarantine(
    folder: Path, prefix: str, tasks: Sequence[str], decisions: Decisions, work: Path, units: Sequence[Unit]
) -> tuple[list[str], list[RejectCount]]:
    """Write all rejected records as ``quarantine/…TASK-SPLIT-000000.jsonl.gz`` and return the files and the counts."""
    counts = Counter[tuple[str, str, str]]()
    with contextlib.ExitStack() as stack:
        files = _Files(folder, prefix, stack)
        for entry in _rejected(tasks, decisions, work, units):
            task, split = entry.pop("task"), entry.pop("split")
            counts[task, split, entry["reason"]] += 1
            files.write(task, split, json.dumps(entry, default=str).encode() + b"\n")
    rejected = [RejectCount(task=t, split=s, reason=r, records=n) for (t, s, r), n in sorted(counts.items())]
    return sorted(files.names), rejected


class _Files:
    """One open gzip file a task and split, a new one after so many records."""

    def __init__(self, folder: Path, prefix: str, stack: contextlib.ExitStack) -> None:
        self._folder, self._prefix, self._stack = folder, prefix, stack
        self._open: dict[tuple[str, str], BinaryIO] = {}
        self._written = Counter[tuple[str, str]]()
        self.names: list[str] = []

    def write(self, task: str, split: str, line: bytes) -> None:
        place = (task, split)
        if self._written[place] % RECORDS_A_FILE == 0:
            number = self._written[place] // RECORDS_A_FILE
            name = f"{FOLDER}/{self._prefix}{task}-{split}-{number:06d}.jsonl.gz"
            (self._folder / FOLDER).mkdir(exist_ok=True)
            if number:
                self._open[place].close()
            raw = self._stack.enter_context((self._folder / name).open("wb"))
            file = gzip.GzipFile(filename="", fileobj=raw, mode="wb", mtime=0)
            self._open[place] = self._stack.enter_context(file)  # type: ignore[assignment]
            self.names.append(name)
        self._open[place].write(line)
        self._written[place] += 1


def _rejected(
    tasks: Sequence[str], decisions: Decisions, work: Path, units: Sequence[Unit]
) -> Iterator[dict[str, Any]]:
    before = first_lines(decisions.scanned, units)
    for unit in decisions.scanned:
        name = units[unit.number].source.name
        if unit.rejects:
            with part(work, unit.number, "rejects").open("rb") as file:
                for line in file:
                    entry = parse_json(line)
                    line_number = entry["line"] + before[unit.number]
                    yield {**entry, "split": unit.split, "source": name, "line": line_number}
        yield from _dropped(tasks, decisions.of[unit.number], work, unit, name, before[unit.number])


def _dropped(
    tasks: Sequence[str], codes: np.ndarray, work: Path, unit: Scanned, source: str, before: int
) -> Iterator[dict[str, Any]]:
    with _kept_samples(work, unit.number) as sample_of:
        for start in range(0, unit.rows, CHUNK_ROWS):
            found = codes[start : start + CHUNK_ROWS]
            dropped = np.flatnonzero(np.isin(found, list(REASONS)))
            if not len(dropped):
                continue
            rows = read_rows(work, unit.number, start, CHUNK_ROWS)
            for place in dropped:
                row = rows[place]
                yield {
                    "task": tasks[int(row["task"])],
                    "split": unit.split,
                    "reason": REASONS[int(found[place])],
                    "source": source,
                    "line": int(row["line"]) + before,
                    "record": sample_of(start + int(place), row),
                }


@contextlib.contextmanager
def _kept_samples(work: Path, number: int) -> Iterator[Callable[[int, np.void], dict[str, Any]]]:
    """Give what returns a valid sample of a unit by its number and row: its content, of an adopted tar its places."""
    if (places := part(work, number, "places")).is_file():
        found = TarPlaces.read(places)
        yield lambda place, _: found.entry(place)
        return
    with part(work, number, "spill").open("rb") as spill:

        def read(_: int, row: np.void) -> dict[str, Any]:
            spill.seek(int(row["offset"]))
            sample: dict[str, Any] = parse_json(spill.read(int(row["size"])))
            return sample

        yield read
