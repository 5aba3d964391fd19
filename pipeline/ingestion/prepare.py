"""Raw records in, shards and their manifest out."""

from __future__ import annotations

import gzip
import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.contracts import RejectCount, Sample, ShardManifest, TaskSpec, write_atomic
from pipeline.errors import InputError, did_you_mean
from pipeline.ingestion.attainable import best_attainable
from pipeline.ingestion.config import ANY_TASK, DataConfig
from pipeline.ingestion.images import ImageFolder
from pipeline.ingestion.shards import write_shard
from pipeline.ingestion.sources import Line, SourceFile, find_sources, read_records
from pipeline.ingestion.synthetic_ads import PROBABILITIES_FIELD
from pipeline.ingestion.validate import Rejected, sanitize_key, to_sample

MANIFEST = "manifest.json"


@dataclass
class _Rows:
    """What became of one task's split."""

    samples: list[Sample] = field(default_factory=list)
    probabilities: list[list[float]] = field(default_factory=list)
    keys: set[str] = field(default_factory=set)
    rejects: list[dict[str, Any]] = field(default_factory=list)


def prepare(config: DataConfig, tasks: Sequence[TaskSpec], folder: Path, seed: int) -> ShardManifest:
    """Write the shards of all tasks into a folder; where they stand already, return their manifest.

    Raises:
        InputError: input is missing, names an unknown task, or has too many invalid records.
    """
    folder = Path(folder)
    check_tasks(tasks)
    sources = find_sources(config, tasks)
    digest = source_digest(config, tasks, sources, seed)
    if (manifest := existing_manifest(folder, digest)) is not None:
        return manifest
    rows: dict[tuple[str, str], _Rows] = {}
    for source in sources:
        images = ImageFolder(source.location) if any(task.image_field for task in tasks) else None
        for line, spec in _lines(source, config, tasks):
            part = rows.setdefault((spec.name, source.split), _Rows())
            _take(part, line, spec, source, config, images)
    _check_limits(config, rows)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / MANIFEST).unlink(missing_ok=True)
    manifest = _write(config, tasks, folder, seed, digest, rows)
    manifest.write(folder / MANIFEST)
    return manifest


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
    """Return the digest of everything the shards depend on: settings, task specs, and the inputs' sizes and times."""
    settings = config.model_dump(mode="json", exclude={"root", "files"})
    specs = [task.model_dump(mode="json") for task in tasks]
    content = json.dumps([settings, specs, [asdict(source) for source in sources], seed], sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()


def existing_manifest(folder: Path, digest: str) -> ShardManifest | None:
    """Return the folder's manifest where it has this digest and all its shards are there."""
    if not (folder / MANIFEST).is_file():
        return None
    manifest = ShardManifest.read(folder / MANIFEST)
    whole = all(
        (folder / shard.path).is_file() and (folder / shard.path).stat().st_size == shard.bytes
        for shard in manifest.shards
    )
    return manifest if whole and manifest.source_sha256 == digest else None


def _lines(source: SourceFile, config: DataConfig, tasks: Sequence[TaskSpec]) -> Iterator[tuple[Line, TaskSpec]]:
    """Yield each line with the task it belongs to.

    Raises:
        InputError: a record names a task that is not configured.
    """
    by_name = {task.name: task for task in tasks}
    for line in read_records(source, config):
        named = line.record.get(config.task_field)
        if named is not None and named not in by_name:
            raise InputError(
                f"each record's {config.task_field!r} must be a configured task, got {named!r} in "
                f"{source.location} line {line.number}{did_you_mean(str(named), by_name)}; "
                "configure the task or mend the record"
            )
        if source.task != ANY_TASK:
            yield line, by_name[source.task]
        elif named is not None:
            yield line, by_name[named]
        else:
            raise InputError(
                f"each record of {source.location} must name its task in {config.task_field!r}, line {line.number} "
                "has none; add the field, or set data.task_field to the one that holds it"
            )


def _take(
    part: _Rows, line: Line, spec: TaskSpec, source: SourceFile, config: DataConfig, images: ImageFolder | None
) -> None:
    record = line.record
    time = record.get(config.time_field) or source.day
    try:
        if line.error is not None:
            raise Rejected(line.error)
        if record.get(config.task_field) not in (None, spec.name):
            raise Rejected("record names another task than its file")
        identity = record.get(config.id_field)
        key = sanitize_key(str(identity)) if identity is not None else ""
        key = key or f"{source.split}-{len(part.keys):09d}"
        if key in part.keys:
            raise Rejected("another record has the same id")
        sample = to_sample(record, spec, key, None if time is None else str(time))
        if spec.image_field and images is not None:
            sample = sample.model_copy(update={"image": images.read(record.get(spec.image_field))})
    except Rejected as reason:
        place = {"reason": str(reason), "source": source.location, "line": line.number}
        part.rejects.append({**place, "record": record})
        return
    part.keys.add(key)
    part.samples.append(sample)
    if PROBABILITIES_FIELD in record:
        part.probabilities.append(record[PROBABILITIES_FIELD])


def _check_limits(config: DataConfig, rows: dict[tuple[str, str], _Rows]) -> None:
    for task in sorted({task for task, _ in rows}):
        parts = [part for (name, _), part in rows.items() if name == task]
        rejected = sum(len(part.rejects) for part in parts)
        total = rejected + sum(len(part.samples) for part in parts)
        limit = config.max_rejected if config.max_rejected is not None else total
        if rejected > limit or rejected > config.max_rejected_share * total:
            worst = Counter(r["reason"] for part in parts for r in part.rejects).most_common(5)
            first = next(r for part in parts for r in part.rejects)
            raise InputError(
                f"task {task!r}: at most {config.max_rejected_share:.1%} of its records"
                f"{'' if config.max_rejected is None else f' and {config.max_rejected} in number'} may be invalid, "
                f"got {rejected} of {total}: {'; '.join(f'{n} x {why}' for why, n in worst)} "
                f"(first: {first['source']} line {first['line']}); mend them, or raise data.max_rejected_share"
            )


def _write(
    config: DataConfig,
    tasks: Sequence[TaskSpec],
    folder: Path,
    seed: int,
    digest: str,
    rows: dict[tuple[str, str], _Rows],
) -> ShardManifest:
    shards, quarantine, counts, best = [], [], [], {}
    for (task, split), part in sorted(rows.items()):
        spec = next(t for t in tasks if t.name == task)
        chosen = _choose(len(part.samples), config.max_samples.get(split), [seed, *f"{task}/{split}".encode()])
        samples = [part.samples[i] for i in chosen]
        for number, start in enumerate(range(0, len(samples), config.samples_per_shard)):
            shards.append(write_shard(folder, task, split, number, samples[start : start + config.samples_per_shard]))
        if split == "test" and part.probabilities and len(part.probabilities) == len(part.samples):
            best[task] = best_attainable(spec, samples, [part.probabilities[i] for i in chosen])
        if part.rejects:
            quarantine.append(f"quarantine/{task}-{split}.jsonl.gz")
            lines = b"".join(json.dumps(reject).encode() + b"\n" for reject in part.rejects)
            write_atomic(folder / quarantine[-1], gzip.compress(lines, mtime=0))
            reasons = Counter(reject["reason"] for reject in part.rejects)
            counts += [RejectCount(task=task, split=split, reason=r, records=n) for r, n in sorted(reasons.items())]
    days = [day for shard in shards if shard.window for day in shard.window]
    return ShardManifest(
        tasks=tuple(tasks),
        shards=tuple(shards),
        rejected=tuple(counts),
        quarantine=tuple(quarantine),
        window=(min(days), max(days)) if days else None,
        source_sha256=digest,
        best_attainable=best,
    )


def _choose(available: int, wanted: int | None, seed: list[int]) -> list[int]:
    if wanted is None or wanted >= available:
        return list(range(available))
    return sorted(np.random.default_rng(seed).permutation(available)[:wanted].tolist())
