"""What batch scoring reads: files of records or shards, cut into stretches of checked rows.

A *unit* is one input file; a *stretch* is so many of its rows in a row, the piece that is scored, kept and, after an
interruption, not scored again.
"""

from __future__ import annotations

import pickle
import posixpath
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pipeline.contracts import Contract, Sample, TaskSpec
from pipeline.errors import InputError, did_you_mean
from pipeline.images import EXTENSIONS
from pipeline.ingestion import DataConfig
from pipeline.ingestion.records import Line, Unit, read_unit
from pipeline.ingestion.source_file import SourceFile
from pipeline.ingestion.sources import SUFFIXES
from pipeline.record import Rejected, as_text, asked, renamed, value_of
from pipeline.retry import persistently
from pipeline.storage import check_location, exists, filesystem, is_remote, stamp_of, url_of

STRETCH_ROWS = 2048
STRETCH_CHARACTERS = 8 << 20
"""A stretch ends after so many rows, or after the row with which its texts reach so many characters."""
AS_THEY_ARE = DataConfig(source="records", root=".")
INPUTS = (*SUFFIXES, ".tar")
"""Endings of what is read: records, and WebDataset shards, others' and our own."""


class InputFile(Contract):
    """One file that is scored."""

    name: str
    """Its path within the input."""
    location: str
    size: int
    version: str
    """What changes with its content: ETag, or time of the last change."""


@dataclass(frozen=True)
class Stretch:
    """Rows of a unit that are scored together.

    Args:
        unit: number of its file.
        number: from 0.
        is_last: no further one follows.
        place: bytes of the file that are behind it, where that is known, else 0.
        rows: number within the file from 1, id, and the texts of the kept columns, for each sample.
        samples: what is scored.
        rejected: number, reason and record of each row that cannot be.
    """

    unit: int
    number: int
    is_last: bool
    place: int
    rows: list[tuple[int, str | None, list[str | None]]]
    samples: list[Sample]
    rejected: list[tuple[int, str, Any]]

    def dump(self) -> bytes:
        """Return it as one process sends it to another of the same cluster."""
        # Of plain values: a pickled model takes several times as long, and JSON leaves a sample's image behind.
        return pickle.dumps(self.__dict__ | {"samples": [sample.__dict__ for sample in self.samples]})

    @classmethod
    def load(cls, data: bytes) -> Stretch:
        """Return what :meth:`dump` wrote."""
        known = pickle.loads(data)
        known["samples"] = [Sample(**sample) for sample in known["samples"]]
        return cls(**known)


def find_files(url: str) -> list[InputFile]:
    """Return the record files that an input names, in the order of their names.

    Args:
        url: a file, a folder, searched to its depth, or a glob. Names that begin with ``_`` or ``.`` are passed over.

    Raises:
        InputError: there is none, or one has no known ending.
    """
    return persistently(lambda: _found(url), url) if is_remote(url) else _found(url)


def _found(url: str) -> list[InputFile]:
    fs, path = filesystem(url)
    path = path.rstrip("/")
    if re.search(r"[*?\[]", path) and not exists(fs, path):
        root = path[: re.search(r"[*?\[]", path).start()].rpartition("/")[0]  # type: ignore[union-attr]
        places = [place for place in fs.glob(path) if fs.isfile(place)]
    elif fs.isfile(path):
        root, places = posixpath.dirname(path), [path]
    else:
        root, places = path, fs.find(path)
    found = []
    for place in sorted(places):
        name = place.removeprefix(root).lstrip("/")
        if any(part.startswith(("_", ".")) for part in name.split("/")):
            continue
        if not place.endswith(INPUTS):
            raise InputError(f"a record file must end in one of {INPUTS}, got {place!r}; rename, convert or move it")
        info = fs.info(place)
        location = url_of(check_location(url), place)
        found.append(InputFile(name=name, location=location, size=int(info["size"]), version=stamp_of(info)))
    if not found:
        raise InputError(f"--input must name record files ({', '.join(INPUTS)}), found none at {url!r}")
    outputs = [scores_name(file.name) for file in found]
    if double := sorted({name for name in outputs if outputs.count(name) > 1}):
        raise InputError(f"input files must differ in more than their ending, several would be scored into {double}")
    return found


def scores_name(name: str) -> str:
    """Return the name of a file's scores."""
    return f"{next(name.removesuffix(end) for end in INPUTS if name.endswith(end))}.parquet"


class Reader:
    """Reads a unit and cuts it into stretches of checked rows; holds no model.

    Args:
        tasks: that the model answers.
        task: of rows that do not name one in the column ``task``.
        keep: columns of the records that are carried into the output.
        data: how records are found in files: dialects, encodings, columns.
    """

    def __init__(
        self, tasks: Sequence[TaskSpec], task: str | None, keep: Sequence[str], data: DataConfig = AS_THEY_ARE
    ) -> None:
        self._specs = {spec.name: (spec, spec.text_fields) for spec in tasks}
        self._task, self._keep, self._data = task, tuple(keep), data
        asked_for = {field for spec in tasks for field in (*spec.text_fields, spec.choices_field)}
        asked_for |= {field for spec in tasks if spec.image_field for field in (spec.image_field, *EXTENSIONS)}
        asked_for |= {
            path for columns in (data.columns, *(spec.columns for spec in tasks)) for path in columns.values()
        }
        self._columns = frozenset({*asked_for, data.task_field, data.id_field, *keep})

    def stretches(self, unit: int, file: InputFile, done: frozenset[int] = frozenset()) -> Iterator[Stretch]:
        """Yield the stretches of a file in their order, those that are done left out but for the last one.

        Raises:
            InputError: the file as a whole cannot be read.
        """
        source = SourceFile(self._task or "*", "score", file.location, file.name, size=file.size, digest=file.version)
        columns = self._columns if source.is_tar else None  # of a shard, members of other names are not read
        lines = map(self._unpacked, read_unit(Unit(source, unit), self._data, columns))
        counts_bytes = file.location.endswith(".jsonl")
        for number, (part, is_last) in enumerate(_cut(lines)):
            if is_last or number not in done:  # the last one says that the file has come to its end
                place = part[-1].place if part and counts_bytes else 0
                yield self._checked(Stretch(unit, number, is_last, place, [], [], []), part)

    def _unpacked(self, line: Line) -> Line:
        """Return a sample of a shard as its fields: one that ``prepare`` stored holds them under ``fields``; its key is
        the id of one that brings none."""
        if line.sample is None:
            return line
        record = line.record
        if isinstance(record.get("fields"), dict) and "key" in record:
            known = self._specs.get(str(record.get("task")))
            choices = {known[0].choices_field: record["choices"]} if known and record.get("choices") else {}
            record = {**record, **record["fields"], **choices}
        field = self._data.id_field
        return line._replace(record=record | {field: line.sample.key if record.get(field) is None else record[field]})

    def _checked(self, stretch: Stretch, lines: Sequence[Line]) -> Stretch:
        for line in lines:
            try:
                if line.error is not None:
                    raise Rejected(line.error)
                sample = self._sample(line)
                identity = self._value(line.record, self._data.id_field, self._specs[sample.task][0].columns)
                kept = [as_text(value_of(line.record, name)) for name in self._keep]
            except Rejected as reason:
                stretch.rejected.append((line.number, str(reason), line.record))
                continue
            stretch.rows.append((line.number, None if identity is None else as_text(identity), kept))
            stretch.samples.append(sample)
        return stretch

    def _sample(self, line: Line) -> Sample:
        field = self._data.task_field
        name = self._value(line.record, field, {})
        name = self._task if name is None else str(name)
        if name is None:
            raise Rejected(f"field {field!r} is missing")
        if name not in self._specs:
            raise Rejected(f"field {field!r} names no task of the model")
        spec, text_fields = self._specs[name]
        return asked(line.record, spec, text_fields, str(line.number))

    def _value(self, record: Mapping[Any, Any], field: str, columns: Mapping[str, str]) -> Any:
        """Return a field's value, in its column or, where that is absent, under its own name."""
        path = columns.get(field) or self._data.columns.get(field)
        if path is not None:
            record = {**record, **renamed(record, {field: path})}
        return value_of(record, field)


def _cut(lines: Iterator[Line]) -> Iterator[tuple[list[Line], bool]]:
    """Yield the rows of each stretch, and whether it is the last one; a file without rows has one that is empty."""
    part: list[Line] = []
    size = 0
    for line in lines:
        if len(part) >= STRETCH_ROWS or size >= STRETCH_CHARACTERS:
            yield part, False
            part, size = [], 0
        part.append(line)
        size += sum(len(value) for value in line.record.values() if isinstance(value, str))
    yield part, True


def check_task(task: str | None, tasks: Sequence[TaskSpec]) -> None:
    """Refuse a task that the model does not answer.

    Raises:
        InputError: it does not.
    """
    names = [spec.name for spec in tasks]
    if task is not None and task not in names:
        raise InputError(f"--task must be one of the model's, got {task!r}{did_you_mean(task, names)}")
