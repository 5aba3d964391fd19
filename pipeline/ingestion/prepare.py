"""Raw records in, shards and their manifest out: scan, resolve, write, each resumable."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Protocol, TypeVar

from filelock import FileLock, Timeout

from pipeline.contracts import RejectCount, ShardInfo, ShardManifest, TaskSpec, write_atomic
from pipeline.errors import InputError
from pipeline.ingestion import kept_scans
from pipeline.ingestion.adoption import adopt_shard, plan_adoption
from pipeline.ingestion.append import earlier_data, merged
from pipeline.ingestion.attainable import best_of_all
from pipeline.ingestion.columns import with_columns
from pipeline.ingestion.config import DataConfig
from pipeline.ingestion.image_twins import ImageTwins, image_digest_of
from pipeline.ingestion.lengths import tokenizer_digest
from pipeline.ingestion.profile import PROFILE, profile_data, scanned_before, scanned_records
from pipeline.ingestion.quarantine import check_limits, write_quarantine
from pipeline.ingestion.records import Unit, is_cut_by_row_groups, split_units, tell_dialects
from pipeline.ingestion.resolve import Decisions, Earlier, TellApart, check_left, resolve
from pipeline.ingestion.scan import ScanJob, scan_unit
from pipeline.ingestion.schemas import SCHEMAS, write_schemas
from pipeline.ingestion.source_file import SourceFile
from pipeline.ingestion.sources import find_archives, find_sources, with_digests
from pipeline.ingestion.write import plan_writes, write_shards
from pipeline.retry import persistently
from pipeline.shard_index import index_path
from pipeline.storage import is_remote

MANIFEST = "manifest.json"
FORMAT = 5
"""Part of the source digest: raised when equal input would give other shards."""
_NO_PART_OF_DIGEST = {"root", "files", "max_rejected", "max_rejected_share", "length_tokenizer"}
_In = TypeVar("_In")
_Out = TypeVar("_Out")


class Mapper(Protocol):
    """Applies a function to many items, perhaps in parallel, and gives the results in the items' order."""

    def __call__(self, function: Callable[[_In], _Out], items: Iterable[_In], /) -> Iterable[_Out]:
        """Yield ``function(item)`` for each item in order; function, items and results can be pickled."""


def prepare(
    config: DataConfig,
    tasks: Sequence[TaskSpec],
    folder: Path,
    seed: int,
    mapper: Mapper = map,
    append: bool = False,
) -> ShardManifest:
    """Write the shards of all tasks into a folder; where they stand already, return their manifest.

    A killed run leaves what it finished in ``FOLDER/.work`` and goes on from there; the result has the same bytes.

    Args:
        config: the input.
        tasks: what is read and how.
        folder: where the shards, their manifest and the quarantine go; with a parallel ``mapper`` every worker must
            reach it.
        seed: of the sample that ``max_samples`` draws.
        mapper: applies the passes to the units of work; ``map`` does it here, one after the other.
        append: add the input to the shards that are there, as further ones, without touching them.

    Raises:
        InputError: input is missing, names an unknown task, or has too many invalid records; another process is
            preparing the same folder; there is nothing whole to append to; partitions were appended to what stands
            there, which would be lost.
    """
    folder = Path(folder)
    check_tasks(tasks)
    tasks = tuple(task.as_prepared() for task in with_columns(config, tasks))
    sources = _sources(config, tasks, folder)
    digest = source_digest(config, tasks, sources, seed)
    current = _current(folder, digest)
    if current is not None:
        return current
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(folder / ".lock", timeout=0):
            current = _current(folder, digest)  # another process may have prepared it since
            if current is not None:
                return current
            old = _to_replace(folder, tasks, append)
            return _Run(config, tasks, folder, seed, mapper, old, append).run(sources, digest)
    except Timeout:
        raise InputError(f"one process at a time may prepare {folder}, another one does; wait for it") from None


def _current(folder: Path, digest: str) -> ShardManifest | None:
    """Return the manifest that stands in the folder if it is of this input and its shards are whole."""
    if not (folder / MANIFEST).is_file():
        return None
    manifest = ShardManifest.read(folder / MANIFEST)
    return manifest if digest in (manifest.source_sha256, *manifest.appended) and is_whole(folder, manifest) else None


def _to_replace(folder: Path, tasks: tuple[TaskSpec, ...], append: bool) -> ShardManifest | None:
    """Return the manifest that is appended to or replaced."""
    old = ShardManifest.read(folder / MANIFEST) if append or (folder / MANIFEST).is_file() else None
    if old is None or not (append or old.appended):
        return old
    if broken := next(broken_files(folder, old), None):
        raise InputError(
            f"shards with appended partitions must stand whole in {folder}, {broken} is missing or has another size; "
            "restore it, or prepare all partitions into another folder"
        )
    if not append:
        raise InputError(
            f"shards with appended partitions must not be prepared anew, {folder} has {len(old.appended)} of them, "
            "which would be deleted; prepare into another folder, or append with --append"
        )
    if old.tasks != tasks:
        raise InputError(
            f"what is appended must have the tasks of the shards that are there ({[t.name for t in old.tasks]}, "
            "with equal templates and label words), got other ones; prepare them into another folder"
        )
    return old


def _sources(config: DataConfig, tasks: Sequence[TaskSpec], folder: Path) -> list[SourceFile]:
    def find() -> list[SourceFile]:
        found = find_sources(config, tasks)
        return with_digests([*found, *find_archives(config, tasks, found)], folder)

    places = [config.root, *(pattern for splits in config.files.values() for pattern in splits.values())]
    remote = [place for place in places if place and is_remote(place)]
    return persistently(find, remote[0]) if remote else find()


def check_tasks(tasks: Sequence[TaskSpec]) -> None:
    """Refuse an empty list and two tasks of one name.

    Raises:
        InputError: one of these.
    """
    names = [task.name for task in tasks]
    if not names:
        raise InputError("tasks must list at least one task, got none; name the tasks to prepare")
    if double := sorted({name for name in names if names.count(name) > 1}):
        raise InputError(f"task names must differ, got {double} twice; rename one of them")


def source_digest(config: DataConfig, tasks: Sequence[TaskSpec], sources: Sequence[SourceFile], seed: int) -> str:
    """Return the digest of everything the shards depend on: settings, task specs, and the inputs' contents."""
    settings = config.model_dump(mode="json", exclude=_NO_PART_OF_DIGEST)
    settings["length_tokenizer"] = tokenizer_digest(config.length_tokenizer)
    inputs = [{k: v for k, v in asdict(source).items() if k != "location"} for source in sources]
    for source, entry in zip(sources, inputs, strict=True):
        if is_cut_by_row_groups(source):  # made-up keys name the unit; smaller files keep the digest they always had
            entry["is_cut_by_row_groups"] = True
    specs = [task.model_dump(mode="json") for task in tasks]
    return hashlib.sha256(json.dumps([FORMAT, settings, specs, inputs, seed], sort_keys=True).encode()).hexdigest()


def is_whole(folder: Path, manifest: ShardManifest) -> bool:
    """Whether every shard of a manifest and its index stand in the folder, with the right size."""
    return next(broken_files(folder, manifest), None) is None


def broken_files(folder: Path, manifest: ShardManifest) -> Iterator[str]:
    """Yield the shards that are missing or have another size, and the indexes that are missing."""
    for shard in manifest.shards:
        path = folder / shard.path
        if shard.adopted is None and (not path.is_file() or path.stat().st_size != shard.bytes):
            yield shard.path
        if shard.index_sha256 is not None and not (folder / index_path(shard.path)).is_file():
            yield index_path(shard.path)


class _Run:
    def __init__(
        self,
        config: DataConfig,
        tasks: tuple[TaskSpec, ...],
        folder: Path,
        seed: int,
        mapper: Mapper,
        old: ShardManifest | None,
        append: bool,
    ) -> None:
        self.config, self.tasks, self.folder, self.seed, self.mapper = config, tasks, folder, seed, mapper
        self.old, self.append = old, append
        is_webdataset = config.source == "webdataset"
        self.image_digest = image_digest_of(old, is_webdataset) if append and old else None

    def run(self, sources: list[SourceFile], digest: str) -> ShardManifest:
        work = self.folder / ".work" / digest[:16]
        self._drop_other_work(work)
        units = split_units([source for source in sources if not source.is_archive])
        tell_dialects(self.config, sources)
        names = [task.name for task in self.tasks]
        generation = len(self.old.appended) + 1 if self.append and self.old else 0
        kept = self._kept_places(units)
        jobs = [
            ScanJob(n, unit, self.config, self.tasks, work, generation, kept.get(n), self.image_digest)
            for n, unit in enumerate(units)
        ]
        scanned = list(self.mapper(scan_unit, jobs))
        check_limits(self.config, scanned, units, self.tasks)
        earlier = earlier_data(self.folder, self.old) if self.append and self.old else Earlier()
        decisions = resolve(self.config, self.tasks, scanned, work, self.seed, earlier, self._tell_apart(units, work))
        if not self.append:
            check_left(self.config, names, decisions, work)
            (self.folder / MANIFEST).unlink(missing_ok=True)
        shards = self._write(work, decisions, units, generation)
        prefix = f"g{generation}-" if generation else ""
        quarantine, rejected = write_quarantine(self.folder, prefix, names, decisions, work, units)
        best = best_of_all(self.tasks, decisions, work)
        manifest = self._manifest(shards, quarantine, rejected, best, digest)
        write_schemas(self.tasks, self.folder / SCHEMAS)
        counts = scanned_records(scanned)
        if self.append and self.old:
            counts += scanned_before(self.folder, self.old)
        profile = profile_data(self.folder, manifest, counts)
        write_atomic(self.folder / PROFILE, profile.model_dump_json(by_alias=True))
        manifest.write(self.folder / MANIFEST)
        shutil.rmtree(self.folder / ".work", ignore_errors=True)
        self._drop_stale(manifest)
        if not self.append:
            kept_scans.drop_others(self.folder, list(kept.values()))
        with_digests(sources, self.folder)
        return manifest

    def _tell_apart(self, units: list[Unit], work: Path) -> TellApart | None:
        if self.config.source != "webdataset" or self.image_digest not in (None, "crc32"):
            return None
        old = self.old if self.append else None
        return ImageTwins(work, [unit.source for unit in units], self.tasks, self.folder, old).told_apart

    def _kept_places(self, units: list[Unit]) -> dict[int, Path]:
        """Return where what each adopted tar holds is kept, by its unit."""
        tars = {number: unit.source for number, unit in enumerate(units) if unit.source.is_tar}
        tokenizer = tokenizer_digest(self.config.length_tokenizer) if tars else ""
        others = (tokenizer, self.image_digest)
        return {n: kept_scans.place_of(self.folder, tar, self.config, self.tasks, *others) for n, tar in tars.items()}

    def _write(self, work: Path, decisions: Decisions, units: list[Unit], generation: int) -> list[ShardInfo]:
        first: dict[tuple[str, str], int] = {}
        for shard in self.old.shards if self.append and self.old else ():
            first[shard.task, shard.split] = first.get((shard.task, shard.split), 0) + 1
        sources = {number: unit.source.location for number, unit in enumerate(units)}
        if self.config.source == "webdataset":
            tars = [unit.source for unit in units]
            days = self.config.time_field
            kind = self.image_digest or "crc32"
            adopted = plan_adoption(decisions, work, self.folder, self.tasks, tars, first, generation, days, kind)
            return list(self.mapper(adopt_shard, list(adopted)))
        size = self.config.samples_per_shard
        jobs = plan_writes(decisions, work, self.folder, self.tasks, sources, size, first, generation)
        return [shard for shards in self.mapper(write_shards, jobs) for shard in shards]

    def _manifest(
        self,
        shards: list[ShardInfo],
        quarantine: list[str],
        rejected: list[RejectCount],
        best: dict[str, float],
        digest: str,
    ) -> ShardManifest:
        days = [day for shard in shards if shard.window for day in shard.window]
        manifest = ShardManifest(
            tasks=self.tasks,
            shards=tuple(sorted(shards, key=lambda shard: shard.path)),
            rejected=tuple(rejected),
            quarantine=tuple(quarantine),
            window=(min(days), max(days)) if days else None,
            source_sha256=digest,
            best_attainable=best,
        )
        return merged(self.old, manifest) if self.append and self.old else manifest

    def _drop_other_work(self, work: Path) -> None:
        for other in work.parent.iterdir() if work.parent.is_dir() else ():
            if other != work:
                shutil.rmtree(other, ignore_errors=True)
        work.mkdir(parents=True, exist_ok=True)

    def _drop_stale(self, manifest: ShardManifest) -> None:
        """Delete the shards of the preparation that this one replaced, and what a killed one left half-written."""
        kept = {shard.path for shard in manifest.shards}
        for shard in self.old.shards if self.old else ():
            if shard.path not in kept and "/" not in shard.path:
                (self.folder / shard.path).unlink(missing_ok=True)
                (self.folder / index_path(shard.path)).unlink(missing_ok=True)
        for leftover in self.folder.glob(".*.part"):
            leftover.unlink(missing_ok=True)
