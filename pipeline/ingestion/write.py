"""Second pass: the kept rows of one task and split become shards."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.contracts import ShardInfo, TaskSpec
from pipeline.ingestion.images import ImageFolder
from pipeline.ingestion.resolve import CHUNK_ROWS, KEEP, RENAMED, Decisions
from pipeline.ingestion.scan import ROW, Scanned, part, read_rows
from pipeline.ingestion.shards import Packed, replace_file, shard_name, write_packed

SHARDS_A_JOB = 4
_KEY_START = len(b'{"key":"')
_LABEL, _DIGEST, _OFFSET, _SIZE, _IMAGE_SIZE, _LENGTH, _LINE = map(
    list(ROW.names or ()).index, ("label", "digest", "offset", "size", "image_size", "length", "line")
)


@dataclass(frozen=True)
class Piece:
    """Rows of one chunk of a unit."""

    unit: int
    source: str
    start: int
    """Row of the unit at which the chunk begins."""
    rows: np.ndarray
    """Rows to write, counted from there."""
    renamed: np.ndarray
    """Whether each takes a made-up key, because another record has its own."""


@dataclass(frozen=True)
class WriteJob:
    """A run of shards of one task and split."""

    work: Path
    folder: Path
    task: TaskSpec
    split: str
    first_shard: int
    samples_per_shard: int
    pieces: tuple[Piece, ...]
    generation: int = 0
    """0 for a first preparation, n for the n-th partition appended; part of made-up keys."""


def plan_writes(
    decisions: Decisions,
    work: Path,
    folder: Path,
    tasks: Sequence[TaskSpec],
    sources: dict[int, str],
    samples_per_shard: int,
    first_shards: dict[tuple[str, str], int],
    generation: int = 0,
) -> Iterator[WriteJob]:
    """Yield the jobs that write all kept rows; ``sources`` names each unit's input."""
    for number, task in enumerate(tasks):
        for split in sorted({unit.split for unit in decisions.scanned if unit.tasks.get(task.name)}):
            units = [unit for unit in decisions.scanned if unit.split == split and unit.tasks.get(task.name)]
            shard, pieces, held = first_shards.get((task.name, split), 0), [], 0
            limit = samples_per_shard * SHARDS_A_JOB
            for piece in _pieces(decisions, work, number, units, sources):
                while len(piece.rows):
                    take = min(limit - held, len(piece.rows))
                    pieces.append(_cut(piece, 0, take))
                    piece, held = _cut(piece, take, len(piece.rows)), held + take
                    if held == limit:
                        yield WriteJob(work, folder, task, split, shard, samples_per_shard, tuple(pieces), generation)
                        shard, pieces, held = shard + SHARDS_A_JOB, [], 0
            if pieces:
                yield WriteJob(work, folder, task, split, shard, samples_per_shard, tuple(pieces), generation)


def _pieces(
    decisions: Decisions, work: Path, task: int, units: Sequence[Scanned], sources: dict[int, str]
) -> Iterator[Piece]:
    for unit in units:
        codes = decisions.of[unit.number]
        for start in range(0, unit.rows, CHUNK_ROWS):
            found = codes[start : start + CHUNK_ROWS]
            kept = found & ~np.uint8(RENAMED) == KEEP
            if len(unit.tasks) > 1:
                kept &= read_rows(work, unit.number, start, CHUNK_ROWS)["task"] == task
            rows = np.flatnonzero(kept)
            yield Piece(unit.number, sources[unit.number], start, rows.astype(np.uint32), found[rows] >= RENAMED)


def _cut(piece: Piece, start: int, stop: int) -> Piece:
    return Piece(piece.unit, piece.source, piece.start, piece.rows[start:stop], piece.renamed[start:stop])


def write_shards(job: WriteJob) -> list[ShardInfo]:
    """Write the shards of one job; a shard that a killed run left whole is taken as it is."""
    total = sum(len(piece.rows) for piece in job.pieces)
    samples = _samples(job)
    shards = []
    for number, start in enumerate(range(0, total, job.samples_per_shard), job.first_shard):
        count = min(job.samples_per_shard, total - start)
        note = job.work / f"{shard_name(job.task.name, job.split, number)}.json"
        info = _finished(note, job.folder)
        if info is None:
            info = write_packed(job.folder, job.task.name, job.split, number, _take(samples, count), job.task)
            replace_file(note, info.model_dump_json().encode())
        else:
            for _ in _take(samples, count):
                pass
        shards.append(info)
    return shards


def _finished(note: Path, folder: Path) -> ShardInfo | None:
    if not note.is_file():
        return None
    info = ShardInfo.read(note)
    path = folder / info.path
    return info if path.is_file() and path.stat().st_size == info.bytes else None


def _take(samples: Iterator[Packed], count: int) -> Iterator[Packed]:
    for _ in range(count):
        yield next(samples)


def _samples(job: WriteJob) -> Iterator[Packed]:
    images = None
    for piece in job.pieces:
        if not len(piece.rows):
            continue
        if job.task.image_field and (images is None or images.record_file != piece.source):
            images = ImageFolder(piece.source)
        first, count = int(piece.rows[0]), int(piece.rows[-1]) + 1
        table = read_rows(job.work, piece.unit, piece.start + first, count - first)[piece.rows - first].tolist()
        head = f"{f'g{job.generation}-' if job.generation else ''}u{piece.unit:04d}"
        with part(job.work, piece.unit, "spill").open("rb") as spill:
            for row, renamed in zip(table, piece.renamed.tolist(), strict=True):
                spill.seek(row[_OFFSET])
                data = spill.read(row[_SIZE] + row[_IMAGE_SIZE])
                packed = _pack(row, data, images, head if renamed else "")
                yield packed._replace(label=0.0) if job.task.kind == "generation" else packed


def _pack(row: tuple[Any, ...], data: bytes, images: ImageFolder | None, renamed: str) -> Packed:
    payload, image_name = data[: row[_SIZE]], data[row[_SIZE] :].decode()
    end = payload.index(b'"', _KEY_START)
    key = payload[_KEY_START:end].decode()
    if renamed:  # no id holds "--", so this is no other record's key
        key = f"{key}--{renamed}-{row[_LINE]:09d}"
        payload = payload[:_KEY_START] + key.encode() + payload[end:]
    image = images.read(image_name) if images is not None else None
    # The date is the last field of the payload, where there is one.
    time = payload[-12:-2].decode() if payload[-20:-12] == b'"time":"' else None
    return Packed(key, payload, row[_LABEL], row[_LENGTH], row[_DIGEST], image, time)
