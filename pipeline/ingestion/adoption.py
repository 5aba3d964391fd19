"""Shards that others wrote, second pass: the index of each, while the tar stays where it is."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pipeline.contracts import AdoptedTar, ImageDigest, ShardInfo, TaskSpec
from pipeline.ingestion.resolve import KEEP, RENAMED, Decisions
from pipeline.ingestion.scan import part, read_rows
from pipeline.ingestion.shards import replace_file, shard_name
from pipeline.ingestion.source_file import SourceFile
from pipeline.ingestion.tar_places import TarPlaces
from pipeline.labels import label_counts
from pipeline.shard_index import ShardIndex, index_path


@dataclass(frozen=True)
class AdoptJob:
    """The samples of one task in one tar."""

    work: Path
    folder: Path
    task: TaskSpec
    task_number: int
    unit: int
    source: SourceFile
    number: int
    """Of the shard within its task and split."""
    kept: np.ndarray
    """Rows of the unit."""
    renamed: np.ndarray
    """Whether each takes a made-up key, because another sample has its own."""
    generation: int
    time_field: str
    image_digest: ImageDigest


def plan_adoption(
    decisions: Decisions,
    work: Path,
    folder: Path,
    tasks: Sequence[TaskSpec],
    sources: Sequence[SourceFile],
    first_shards: dict[tuple[str, str], int],
    generation: int,
    time_field: str,
    image_digest: ImageDigest,
) -> Iterator[AdoptJob]:
    """Yield a job for each task of each tar that has kept samples; ``sources`` has the tar of each unit."""
    numbers = Counter(first_shards)
    for unit in decisions.scanned:
        codes = decisions.of[unit.number]
        owners = read_rows(work, unit.number)["task"]
        for place, task in enumerate(tasks):
            kept = np.flatnonzero((codes & ~np.uint8(RENAMED) == KEEP) & (owners == place))
            if len(kept):
                number = numbers[task.name, unit.split]
                numbers[task.name, unit.split] += 1
                source, renamed = sources[unit.number], codes[kept] >= RENAMED
                yield AdoptJob(
                    work,
                    folder,
                    task,
                    place,
                    unit.number,
                    source,
                    number,
                    kept,
                    renamed,
                    generation,
                    time_field,
                    image_digest,
                )


def adopt_shard(job: AdoptJob) -> ShardInfo:
    """Write the index of one shard and describe it."""
    rows = read_rows(job.work, job.unit)[job.kept]
    places = TarPlaces.read(part(job.work, job.unit, "places"))
    head = f"{f'g{job.generation}-' if job.generation else ''}u{job.unit:04d}"
    keys = [places.keys[row] for row in job.kept.tolist()]
    for place in np.flatnonzero(job.renamed).tolist():
        keys[place] += f"--{head}-{int(rows['line'][place]):09d}"  # no id holds "--", so this is no other sample's key
    offsets, sizes = places.offsets[job.kept], places.sizes[job.kept]
    used = np.flatnonzero(offsets.any(axis=0))
    none = np.zeros(len(rows), dtype=np.int32)
    index = ShardIndex(
        keys=keys,
        offsets=offsets[:, used],
        sizes=sizes[:, used].astype(np.int32),
        checksums=places.checksums[job.kept].astype(np.uint32),
        image_offsets=none,
        image_sizes=none,
        lengths=rows["length"].astype(np.int32),
        digests=np.frombuffer(rows["digest"].tobytes(), dtype=np.uint8).reshape(-1, 16),
        extensions=tuple(places.extensions[column] for column in used),
    ).to_bytes()
    source = job.source
    path = shard_name(job.task.name, source.split, job.number)
    replace_file(job.folder / index_path(path), index)
    url = source.location if "://" in source.location else str(Path(source.location).absolute())
    told = rows["label"].tolist() if job.task.kind != "generation" else [0.0] * len(rows)
    labels = Counter(told)
    days = sorted(places.days[row] for row in job.kept.tolist() if places.days[row])
    return ShardInfo(
        path=path,
        adopted=AdoptedTar(url=url, stamp=source.digest, time_field=job.time_field, image_digest=job.image_digest),
        task=job.task.name,
        split=source.split,
        samples=len(keys),
        bytes=source.size,
        sha256=hashlib.sha256(json.dumps([url, source.size, source.digest]).encode()).hexdigest(),
        index_sha256=hashlib.sha256(index).hexdigest(),
        label_counts=label_counts(labels, job.task),
        window=(days[0], days[-1]) if days else None,
    )
