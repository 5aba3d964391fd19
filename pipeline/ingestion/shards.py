"""WebDataset shards that are the same byte for byte whenever their samples are."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import webdataset as wds

from pipeline.contracts import Sample, ShardInfo


def shard_name(task: str, split: str, number: int) -> str:
    """Return the file name of one shard."""
    return f"{task}-{split}-{number:06d}.tar"


def write_shard(folder: Path, task: str, split: str, number: int, samples: Sequence[Sample]) -> ShardInfo:
    """Write one shard, whole or not at all, and describe it."""
    path = folder / shard_name(task, split, number)
    temporary = path.with_suffix(".tar.part")
    with (
        temporary.open("wb") as file,
        wds.TarWriter(file, user="", group="", mode=0o644, mtime=0, encoder=False) as tar,
    ):
        for sample in samples:
            members = {"__key__": sample.key, "json": sample.model_dump_json(exclude_defaults=True).encode()}
            if sample.image is not None:
                members[image_extension(sample.image)] = sample.image
            tar.write(members)
    data = temporary.read_bytes()
    temporary.replace(path)
    labels = Counter(f"{sample.label:g}" for sample in samples)
    days = sorted(sample.time for sample in samples if sample.time)
    return ShardInfo(
        path=path.name,
        task=task,
        split=split,
        samples=len(samples),
        bytes=len(data),
        sha256=hashlib.sha256(data).hexdigest(),
        label_counts=dict(sorted(labels.items())),
        window=(days[0], days[-1]) if days else None,
    )


def image_extension(data: bytes) -> str:
    """Return the member extension of an encoded image, by its first bytes."""
    return "jpg" if data[:2] == b"\xff\xd8" else "png"
