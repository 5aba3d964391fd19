"""First pass: read, validate and digest one unit of input into files in the work folder.

Per unit: ``.spill`` holds the samples as they will stand in the shards, of an adopted tar ``.places`` where they stand
already, ``.rows`` one fixed-width row a sample, ``.rejects`` the rejected records, and ``.json``, written last, the
counts: a unit that has it is not read again. Of an adopted tar all of it is kept for later, see ``kept_scans``.
"""

from __future__ import annotations

import hashlib
import json
import zlib
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from pipeline.contracts import PROBABILITIES_FIELD, ImageDigest, TaskSpec, write_atomic
from pipeline.errors import InputError, did_you_mean
from pipeline.ingestion.columns import columns_asked
from pipeline.ingestion.config import ANY_TASK, DataConfig
from pipeline.ingestion.image_twins import strong_digest
from pipeline.ingestion.images import ImageFolder, check_image
from pipeline.ingestion.kept_scans import TAR_FILES, keep, take
from pipeline.ingestion.lengths import LengthCounter
from pipeline.ingestion.records import Line, Unit, read_unit
from pipeline.ingestion.tar_places import PlacesOfTar
from pipeline.ingestion.tar_records import TarSample
from pipeline.json_text import parse_json
from pipeline.members import IMAGES, image_of
from pipeline.record import renamed, value_of
from pipeline.retry import persistently
from pipeline.storage import is_remote
from pipeline.validate import Checked, Rejected, check_record, day_of, key_of

ROW = np.dtype(
    [
        ("task", "<u2"),
        ("key", "<u8"),
        ("digest", "V16"),
        ("label", "<f8"),
        ("offset", "<u8"),
        ("size", "<u4"),
        ("image_size", "<u2"),
        ("length", "<u4"),
        ("line", "<u4"),
    ]
)
"""One sample: task number, digest of its key, digest of its texts, label (of a written answer, a number that stands for
it), where its payload (and then its image's name) lies in the spill, length, and line within the unit."""
_FLUSH_ROWS = 4096
_KEPT_DEPTH = 100
"""Deepest record that the quarantine keeps as it is."""


@dataclass(frozen=True)
class ScanJob:
    """One unit to read, and where to write."""

    number: int
    unit: Unit
    config: DataConfig
    tasks: tuple[TaskSpec, ...]
    work: Path
    generation: int = 0
    """0 for a first preparation, n for the n-th partition appended; part of made-up keys."""
    kept: Path | None = None
    """Of an adopted tar: where what it holds is kept for the next preparation."""

    image_digest: ImageDigest | None = None
    """What of an image goes into the digest of a sample: as in the shards that are appended to; None for the usual."""

    @property
    def made_up_head(self) -> str:
        """Begin of the keys of samples that have no id."""
        generation = f"g{self.generation}-" if self.generation else ""
        return f"row--{generation}{self.unit.source_number:04d}-"  # no id holds "--"


@dataclass(frozen=True)
class Scanned:
    """What a unit held."""

    number: int
    split: str
    lines: int
    rows: int
    tasks: dict[str, int]
    """Task → valid samples."""
    rejects: dict[str, dict[str, int]]
    """Task → reason → records."""
    first_rejects: dict[str, tuple[int, str]]
    """Task → line and reason of its first rejected record."""
    made_up_keys: int = 0
    """Samples without an id, whose keys tell the place of their source among the others."""


def part(work: Path, number: int, suffix: str) -> Path:
    """Return one of a unit's files."""
    return work / f"unit-{number:06d}.{suffix}"


def scan_unit(job: ScanJob) -> Scanned:
    """Read one unit.

    Raises:
        InputError: a record names a task that is not configured, or the file cannot be read.
    """
    if job.kept is not None:
        return _tar_scanned(job, job.kept)
    done = part(job.work, job.number, "json")
    if done.is_file():
        return Scanned(**parse_json(done.read_bytes()))
    found = _fetched(job)
    write_atomic(done, json.dumps(found.__dict__))
    return found


def _tar_scanned(job: ScanJob, kept: Path) -> Scanned:
    files = {name: part(job.work, job.number, name) for name in TAR_FILES}
    known = take(kept, files)
    if known is not None and known.pop("made_up_head") in ("", job.made_up_head):
        return Scanned(**known | {"number": job.number})
    found = _fetched(job)
    keep(kept, files, found.__dict__ | {"made_up_head": job.made_up_head if found.made_up_keys else ""})
    return found


def _fetched(job: ScanJob) -> Scanned:
    location = job.unit.source.location
    # A read from afar that breaks off begins again: its files are written anew.
    return persistently(lambda: _scanned(job), location) if is_remote(location) else _scanned(job)


def _scanned(job: ScanJob) -> Scanned:
    with (
        part(job.work, job.number, "spill").open("wb") as spill,
        part(job.work, job.number, "rows").open("wb") as rows,
        part(job.work, job.number, "rejects").open("wb") as rejects,
        part(job.work, job.number, "known").open("wb") as known,
    ):
        scan = _Scan(job)
        found = scan.run(spill, rows, rejects, known)
    if job.unit.source.is_tar:
        scan.places.found().write(part(job.work, job.number, "places"))
    return found


class _Scan:
    def __init__(self, job: ScanJob) -> None:
        self.job = job
        self.by_name = {task.name: (number, task, task.text_fields) for number, task in enumerate(job.tasks)}
        self.own = self.by_name.get(job.unit.source.task)
        self.images: ImageFolder | None = None
        self.reasons: dict[str, Counter[str]] = {}
        self.first_rejects: dict[str, tuple[int, str]] = {}
        self.counter = LengthCounter(job.config.length_tokenizer)
        self.places = PlacesOfTar()
        self.made_up_keys = 0

    def run(self, spill: BinaryIO, rows: BinaryIO, rejects: BinaryIO, known: BinaryIO) -> Scanned:
        unit, config = self.job.unit, self.job.config
        pending: list[tuple[Any, ...]] = []
        prompts: list[str] = []
        counts = Counter[str]()
        offset = lines = total = 0
        for line in read_unit(unit, config, self._columns(), self.job.image_digest in (None, "crc32")):
            lines = line.number
            named = self._name_of(line.record)
            number, spec, text_fields = self.own if named is None and self.own else self._task_of(line, named)
            found = line
            if spec.columns and not line.error:
                line = line._replace(record=renamed(line.record, spec.columns))
            if unit.source.keep < 1 and not self._drawn(line):
                continue
            try:
                checked, image, image_digest = self._check(line, named, spec, text_fields)
            except Rejected as reason:
                self._reject(found, spec, str(reason), rejects)
                continue
            key = self._key(line)
            payload, name = self._payload(line, checked, spec, key, image)
            spill.write(payload + name)
            place = (offset, len(payload), len(name))
            pending.append((number, hash_key(key), checked.digest(image_digest), checked.told, *place, 0, line.number))
            prompts.append(checked.prompt(spec))
            if unit.source.split != "train" and PROBABILITIES_FIELD in line.record:
                probabilities = line.record[PROBABILITIES_FIELD]
                if _are_numbers(probabilities, spec.num_classes or len(checked.choices)):
                    known.write(json.dumps([total, probabilities]).encode() + b"\n")
            offset += len(payload) + len(name)
            counts[spec.name] += 1
            total += 1
            if len(pending) >= _FLUSH_ROWS:
                self._flush(pending, prompts, rows)
        self._flush(pending, prompts, rows)
        reasons = {task: dict(found) for task, found in self.reasons.items()}
        return Scanned(
            self.job.number,
            unit.source.split,
            lines,
            total,
            dict(counts),
            reasons,
            self.first_rejects,
            self.made_up_keys,
        )

    def _payload(self, line: Line, checked: Checked, spec: TaskSpec, key: str, image: str) -> tuple[bytes, bytes]:
        """Return what the spill holds of a sample: nothing where the tar has the content."""
        if line.sample is None:
            return checked.payload(spec, key, self._day(line)), image.encode()
        self.places.add(key, line.sample, image, self._day(line))
        return b"", b""

    def _columns(self) -> set[str]:
        """Return the fields that are needed of the unit's records."""
        source = self.job.unit.source
        tasks = [spec for spec in self.job.tasks if source.task in (spec.name, ANY_TASK)]
        asked = columns_asked(self.job.config, tasks)
        # In a tar, a sample's only image is taken whatever its format.
        return asked.union(IMAGES) if source.is_tar and any(spec.image_field for spec in tasks) else asked

    def _name_of(self, record: dict[str, Any]) -> Any:
        """Return the task that a record names, None where it names none."""
        field = self.job.config.task_field
        if field in self.job.config.columns:
            record = renamed(record, {field: self.job.config.columns[field]})
        return _name_of(record, field)

    def _drawn(self, line: Line) -> bool:
        """Whether a record of a replayed day is taken: a function of its key and of the window trained on."""
        salt = f"{self.job.config.windows.get('train')}"
        return hash_key(f"{salt}/{self.job.unit.source.task}/{self._key(line)}") < self.job.unit.source.keep * 2**64

    def _reject(self, line: Line, spec: TaskSpec, reason: str, rejects: BinaryIO) -> None:
        self.reasons.setdefault(spec.name, Counter())[reason] += 1
        self.first_rejects.setdefault(spec.name, (line.number, reason))
        record = (
            line.record if _depth_at_most(line.record, _KEPT_DEPTH) else {"raw": f"nested deeper than {_KEPT_DEPTH}"}
        )
        if line.sample is not None:
            record = line.sample.reference()
        entry = {"task": spec.name, "reason": reason, "line": line.number, "record": record}
        rejects.write(json.dumps(entry, default=str).encode() + b"\n")

    def _flush(self, pending: list[tuple[Any, ...]], prompts: list[str], rows: BinaryIO) -> None:
        table = np.array(pending, dtype=ROW)
        table["length"] = self.counter.count(prompts)
        table.tofile(rows)
        pending.clear()
        prompts.clear()

    def _task_of(self, line: Line, named: Any) -> tuple[int, TaskSpec, tuple[str, ...]]:
        source, field = self.job.unit.source, self.job.config.task_field
        known = self.by_name.get(named) if isinstance(named, str) else None
        if isinstance(named, str) and known is None and line.error is None:
            raise InputError(
                f"each record's {field!r} must be a configured task, got {named!r} in {source.location} "
                f"line {line.number}{self._after()}{did_you_mean(str(named), self.by_name)}; "
                "configure the task or fix the record"
            )
        if source.task != ANY_TASK:
            return self.by_name[source.task]
        if named is None and line.error is None:
            raise InputError(
                f"each record of {source.location} must name its task in {field!r}, line {line.number} has none; "
                "add the field, or set data.task_field to the one that holds it"
            )
        return known or next(iter(self.by_name.values()))

    def _after(self) -> str:
        unit = self.job.unit
        place = "the first {} row groups" if unit.source.location.endswith(".parquet") else "byte {}"
        return f" after {place.format(unit.start)}" if unit.start else ""

    def _check(
        self, line: Line, named: Any, spec: TaskSpec, text_fields: tuple[str, ...]
    ) -> tuple[Checked, str, bytes]:
        """Return what a record says, its image's name, in a tar its member's extension, and the digest of its image."""
        if line.error is not None:
            raise Rejected(line.error)
        if named is not None and not isinstance(named, str):
            raise Rejected(f"task {self.job.config.task_field!r} is not text")
        if named not in (None, spec.name):
            raise Rejected("record names another task than its file")
        if self.job.unit.source.day is not None and self._day(line) != self.job.unit.source.day:
            raise Rejected("record is dated another day than its partition")
        try:
            checked = check_record(line.record, spec, text_fields)
        except InputError as error:
            raise InputError(f"{self.job.unit.source.location} line {line.number}{self._after()}: {error}") from None
        if spec.image_field is None:
            return checked, "", b""
        if line.sample is not None:
            image = image_of(line.record, spec)
            check_image(image)
            return checked, *self._tar_image(line.sample, image)
        if self.images is None:
            self.images = ImageFolder(self.job.unit.source.location)
        name = value_of(line.record, spec.image_field)
        image = self.images.read(name)
        check_image(image)
        return checked, str(name), strong_digest(image, self.job.image_digest or "blake2b")

    def _tar_image(self, sample: TarSample, image: bytes) -> tuple[str, bytes]:
        """Return the extension of a sample's image and what of it goes into the sample's digest."""
        extension, kind = sample.member_of(image), self.job.image_digest or "crc32"
        if kind != "crc32":
            return extension, strong_digest(image, kind)
        checksum = sample.images.get(extension) or zlib.crc32(image).to_bytes(4, "little")
        return extension, len(image).to_bytes(4, "little") + checksum

    def _key(self, line: Line) -> str:
        key = key_of(line.record.get(self.job.config.id_field))
        if not key and line.sample is not None:
            key = key_of(line.sample.key)
        if not key:
            self.made_up_keys += 1
            key = f"{self.job.made_up_head}{line.place:012d}"
        return key

    def _day(self, line: Line) -> str | None:
        return day_of(line.record, self.job.config.time_field) or self.job.unit.source.day


def _name_of(record: dict[str, Any], field: str) -> Any:
    """Return the task that a record names, None where it names none."""
    value = record.get(field)
    if value is None or type(value) is str:  # the usual case
        return value
    try:
        return value_of(record, field)
    except Rejected:
        return record[field]


def _are_numbers(values: Any, count: int) -> bool:
    numbers = isinstance(values, list) and len(values) == count and all(type(v) in (int, float) for v in values)
    return numbers and all(abs(v) <= 1 for v in values)


def _depth_at_most(record: Any, depth: int) -> bool:
    """Whether a record can be written and read again as JSON, which takes a place on the stack each level."""
    level: list[Any] = [record]
    for _ in range(depth):
        level = [v for item in level for v in (item.values() if isinstance(item, dict) else item)
                 if isinstance(v, dict | list)]  # fmt: skip
        if not level:
            return True
    return False


def hash_key(key: str) -> int:
    """Return a 64-bit digest of a key."""
    return int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest(), "little")


def read_rows(work: Path, number: int, start: int = 0, count: int = -1) -> np.ndarray:
    """Return rows of a unit, all from ``start`` or ``count`` of them."""
    return np.fromfile(part(work, number, "rows"), dtype=ROW, count=count, offset=start * ROW.itemsize)
