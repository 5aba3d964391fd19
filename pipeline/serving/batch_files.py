"""The files of batch scoring: what is read, and scores that are written whole or not at all.

Axes: a *unit* is one input file; a *stretch* is so many of its rows in a row, the piece that is scored, kept and, after
an interruption, not scored again. ``OUTPUT/_work/`` holds stretches, ``OUTPUT/NAME.parquet`` a whole unit.
"""

from __future__ import annotations

import json
import posixpath
import re
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import Field

from pipeline.answer import ANSWER, GENERATED
from pipeline.contracts import Contract, Sample, TaskSpec
from pipeline.errors import InputError, did_you_mean
from pipeline.ingestion import DataConfig
from pipeline.ingestion.records import Line, Unit, read_unit
from pipeline.ingestion.source_file import SourceFile
from pipeline.ingestion.sources import SUFFIXES
from pipeline.record import Rejected, as_text, asked, renamed, value_of
from pipeline.retry import persistently
from pipeline.storage import check_location, check_target, exists, filesystem, is_remote, stamp_of, url_of

STRETCH_ROWS = 2048
STRETCH_CHARACTERS = 8 << 20
"""A stretch ends after so many rows, or after the row with which its texts reach so many characters."""
AS_THEY_ARE = DataConfig(source="records", root=".")
PLAN, MANIFEST, WORK, QUARANTINE = "_score.json", "_manifest.json", "_work", "_quarantine"
_COLUMNS = [
    pa.field("row", pa.int64()),
    pa.field("id", pa.string()),
    pa.field("task", pa.string()),
    pa.field("score", pa.float64()),
    pa.field("label", pa.int32()),
    pa.field("label_word", pa.string()),
    pa.field("probabilities", pa.list_(pa.float64())),
]
COLUMNS = tuple(field.name for field in _COLUMNS)
"""Columns that scores always have."""
_GENERATED = pa.field(GENERATED, pa.string())


class InputFile(Contract):
    """One file that is scored."""

    name: str
    """Its path within the input."""
    location: str
    size: int
    version: str
    """What changes with its content: ETag, or time of the last change."""


class ScoringPlan(Contract):
    """``_score.json``, written first: what this output is of. Another plan needs another output."""

    schema_version: Literal[1] = Field(default=1, alias="schema")
    model: str
    input: str
    task: str | None
    keep: tuple[str, ...]
    reading: dict[str, Any] = Field(default_factory=dict, exclude_if=lambda value: not value)
    """How records are found in the files, as in ``data``; see ``DataConfig.reading``."""
    files: tuple[InputFile, ...]


class ScoredFile(Contract):
    """One file of scores."""

    name: str
    rows: int
    reasons: dict[str, int]
    """Reason → rows that were put aside."""


class ScoreManifest(Contract):
    """``_manifest.json``, written last: the output is whole."""

    schema_version: Literal[1] = Field(default=1, alias="schema")
    model: str
    input: str
    columns: dict[str, str]
    rows: int
    rejected: int
    """Rows that were put aside, under ``_quarantine``."""
    files: tuple[ScoredFile, ...]

    @property
    def reasons(self) -> dict[str, int]:
        """Reason → rows that were put aside, over all files."""
        found = Counter[str]()
        for file in self.files:
            found.update(file.reasons)
        return dict(found.most_common())


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
        """Return it as JSON."""
        known = self.__dict__ | {"samples": [sample.model_dump(mode="json") for sample in self.samples]}
        return json.dumps(known, default=str).encode()

    @classmethod
    def load(cls, data: bytes) -> Stretch:
        """Return what :meth:`dump` wrote."""
        known = json.loads(data)
        known["samples"] = [Sample.model_construct(**sample) for sample in known["samples"]]
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
        if not place.endswith(SUFFIXES):
            raise InputError(f"a record file must end in one of {SUFFIXES}, got {place!r}; rename, convert or move it")
        info = fs.info(place)
        location = url_of(check_location(url), place)
        found.append(InputFile(name=name, location=location, size=int(info["size"]), version=stamp_of(info)))
    if not found:
        raise InputError(f"--input must name record files ({', '.join(SUFFIXES)}), found none at {url!r}")
    outputs = [scores_name(file.name) for file in found]
    if double := sorted({name for name in outputs if outputs.count(name) > 1}):
        raise InputError(f"input files must differ in more than their ending, several would be scored into {double}")
    return found


def scores_name(name: str) -> str:
    """Return the name of a file's scores."""
    return f"{next(name.removesuffix(end) for end in SUFFIXES if name.endswith(end))}.parquet"


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

    def stretches(self, unit: int, file: InputFile, done: frozenset[int] = frozenset()) -> Iterator[Stretch]:
        """Yield the stretches of a file in their order, those that are done left out but for the last one.

        Raises:
            InputError: the file as a whole cannot be read.
        """
        source = SourceFile(self._task or "*", "score", file.location, file.name, size=file.size, digest=file.version)
        lines = read_unit(Unit(source, unit), self._data)
        counts_bytes = file.location.endswith(".jsonl")
        for number, (part, is_last) in enumerate(_cut(lines)):
            if is_last or number not in done:  # the last one says that the file has come to its end
                place = part[-1].place if part and counts_bytes else 0
                yield self._checked(Stretch(unit, number, is_last, place, [], [], []), part)

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


def schema(keep: Sequence[str], answered: Sequence[str] = ANSWER) -> pa.Schema:
    """Return the columns of the scores."""
    written = [_GENERATED] if GENERATED in answered else []
    return pa.schema([*_COLUMNS, *written, *(pa.field(name, pa.string()) for name in keep)])


class Output:
    """The folder of the scores, local or remote.

    Args:
        url: of the folder.
        keep: fields that are carried along.
        answered: names of the values that an answer has.

    Raises:
        InputError: the folder can only be read.
    """

    def __init__(self, url: str, keep: Sequence[str], answered: Sequence[str] = ANSWER) -> None:
        self.url, self._schema, self.answered = check_target(url, "scores"), schema(keep, answered), tuple(answered)
        self._kept = len(keep)

    def read(self, name: str) -> bytes | None:
        """Return a file's content, None where it is missing."""
        fs, path = filesystem(posixpath.join(self.url, name))
        return persistently(lambda: bytes(fs.cat_file(path)) if exists(fs, path) else None, f"{self.url}/{name}")

    def write(self, name: str, fill: Callable[[Any], object]) -> None:
        """Write a file whole or not at all.

        Args:
            name: within the output.
            fill: writes to the open file.
        """
        fs, path = filesystem(posixpath.join(self.url, name))
        if is_remote(self.url):  # an object that is closed early would stand there, cut off
            with tempfile.NamedTemporaryFile() as file:
                fill(file)
                file.flush()
                persistently(lambda: fs.put_file(file.name, path), f"{self.url}/{name}")
            return
        fs.makedirs(posixpath.dirname(path), exist_ok=True)
        scratch = posixpath.join(posixpath.dirname(path), f".{posixpath.basename(path)}.part")
        with fs.open(scratch, "wb") as file:
            fill(file)
        fs.mv(scratch, path)

    def done(self, files: Sequence[InputFile]) -> tuple[dict[int, ScoredFile], dict[int, frozenset[int]]]:
        """Return what an earlier call has finished: whole units, and stretches of the others, by unit."""
        whole, parts = {}, {}
        for unit in range(len(files)):
            found = self.read(f"{WORK}/{unit:06d}.json")
            if found is not None:
                whole[unit] = ScoredFile.model_validate_json(found)
                continue
            fs, path = filesystem(posixpath.join(self.url, WORK, f"{unit:06d}"))
            names = [posixpath.basename(place) for place in fs.find(path)] if exists(fs, path) else []
            parts[unit] = frozenset(int(n[:6]) for n in names if re.fullmatch(r"\d{6}\.parquet", n))
        return whole, parts

    def write_stretch(self, stretch: Stretch, answers: Mapping[str, Sequence[Any]]) -> None:
        """Write a stretch's scores, the rows that were put aside first.

        Args:
            stretch: that was scored.
            answers: column → one value a sample, of those that an answer has.
        """
        kept = zip(*(texts for *_, texts in stretch.rows), strict=True)
        numbers = {"row": [number for number, *_ in stretch.rows], "id": [known for _, known, _ in stretch.rows]}
        columns = numbers | dict(answers)
        values: list[Any] = [columns[name] for name in self._schema.names[: len(self._schema.names) - self._kept]]
        values += list(kept) or [[] for _ in range(self._kept)]
        table = pa.table([pa.array(v, f.type) for v, f in zip(values, self._schema, strict=True)], schema=self._schema)
        place = f"{WORK}/{stretch.unit:06d}/{stretch.number:06d}"
        if stretch.rejected:
            entries = [{"row": n, "reason": reason, "record": record} for n, reason, record in stretch.rejected]
            text = "".join(json.dumps(entry, default=str) + "\n" for entry in entries)
            self.write(f"{place}.rejects", lambda file: file.write(text.encode()))
        self.write(f"{place}.parquet", lambda file: pq.write_table(table, file))

    def join(self, unit: int, file: InputFile, stretches: int) -> ScoredFile:
        """Write a unit's file of scores from its stretches, and that of the rows that were put aside.

        Returns:
            What it holds.
        """
        places = [f"{WORK}/{unit:06d}/{number:06d}" for number in range(stretches)]
        rejects = b"".join(self.read(f"{place}.rejects") or b"" for place in places)
        reasons = Counter(json.loads(line)["reason"] for line in rejects.splitlines())
        rows = 0

        def fill(target: Any) -> None:
            nonlocal rows
            with pq.ParquetWriter(target, self._schema) as writer:
                for place in places:
                    fs, path = filesystem(posixpath.join(self.url, f"{place}.parquet"))
                    with fs.open(path, "rb") as part:
                        table = pq.read_table(part)
                    writer.write_table(table)
                    rows += table.num_rows

        self.write(scores_name(file.name), fill)
        if rejects:
            self.write(f"{QUARANTINE}/{file.name}.jsonl", lambda target: target.write(rejects))
        scored = ScoredFile(name=scores_name(file.name), rows=rows, reasons=dict(sorted(reasons.items())))
        self.write(f"{WORK}/{unit:06d}.json", lambda target: target.write(scored.model_dump_json().encode()))
        fs, path = filesystem(posixpath.join(self.url, WORK, f"{unit:06d}"))
        fs.rm(path, recursive=True)
        return scored

    def begin(self, plan: ScoringPlan) -> ScoreManifest | None:
        """Claim the output for a plan; return its manifest where it is whole already.

        Raises:
            InputError: the output is of another plan, or holds something else.
        """
        found = self.read(PLAN)
        if found is None:
            fs, path = filesystem(self.url)
            if exists(fs, path) and fs.find(path):
                raise InputError(f"--output must be a new folder, {self.url!r} holds other files; name another one")
            self.write(PLAN, lambda file: file.write(plan.model_dump_json(by_alias=True, indent=2).encode()))
            return None
        before = ScoringPlan.model_validate_json(found)
        if before != plan:
            names = ScoringPlan.model_fields
            other = [name for name in names if getattr(before, name) != getattr(plan, name)]
            raise InputError(
                f"--output must be of one model and one input, {self.url!r} differs in {other} (model there "
                f"{before.model}, here {plan.model}); name another folder, or ask for the same again"
            )
        whole = self.read(MANIFEST)
        return None if whole is None else ScoreManifest.model_validate_json(whole)

    def finish(self, plan: ScoringPlan, scored: Sequence[ScoredFile]) -> ScoreManifest:
        """Write the manifest and take the work away."""
        manifest = ScoreManifest(
            model=plan.model,
            input=plan.input,
            columns={field.name: str(field.type) for field in self._schema},
            rows=sum(file.rows for file in scored),
            rejected=sum(sum(file.reasons.values()) for file in scored),
            files=tuple(scored),
        )
        self.write(MANIFEST, lambda file: file.write(manifest.model_dump_json(by_alias=True, indent=2).encode()))
        fs, path = filesystem(posixpath.join(self.url, WORK))
        if exists(fs, path):
            fs.rm(path, recursive=True)
        return manifest


def check_task(task: str | None, tasks: Sequence[TaskSpec]) -> None:
    """Refuse a task that the model does not answer.

    Raises:
        InputError: it does not.
    """
    names = [spec.name for spec in tasks]
    if task is not None and task not in names:
        raise InputError(f"--task must be one of the model's, got {task!r}{did_you_mean(task, names)}")
