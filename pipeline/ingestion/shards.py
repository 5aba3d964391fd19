"""WebDataset shards that are the same byte for byte whenever their samples are, each with its index."""

from __future__ import annotations

import hashlib
import zlib
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np

from pipeline.contracts import Sample, ShardInfo, TaskSpec
from pipeline.labels import label_counts
from pipeline.shard_index import ShardIndex, image_extension, index_path


class Packed(NamedTuple):
    """One sample ready for the tar."""

    key: str
    payload: bytes
    """Content of ``KEY.json``."""
    label: float
    length: int
    """Of its prompt, in tokens or characters."""
    digest: bytes
    """128-bit digest of its texts."""
    image: bytes | None = None
    time: str | None = None


class _HashingFile:
    """A file that digests and counts what is written to it."""

    def __init__(self, file: BinaryIO) -> None:
        self._file, self.sha256, self.bytes = file, hashlib.sha256(), 0

    def write(self, data: bytes) -> int:
        self.sha256.update(data)
        self.bytes += len(data)
        return self._file.write(data)


def shard_name(task: str, split: str, number: int) -> str:
    """Return the file name of one shard."""
    return f"{task}-{split}-{number:06d}.tar"


def pack(sample: Sample, digest: bytes = b"\0" * 16) -> Packed:
    """Encode one sample."""
    payload = sample.model_dump_json(exclude_defaults=True).encode()
    length = sum(map(len, sample.fields.values()))
    return Packed(sample.key, payload, sample.label, length, digest, sample.image, sample.time)


def write_shard(folder: Path, task: str, split: str, number: int, samples: Iterable[Sample]) -> ShardInfo:
    """Write one shard of samples and its index, whole or not at all, and describe it."""
    return write_packed(folder, task, split, number, map(pack, samples))


def write_packed(
    folder: Path, task: str, split: str, number: int, samples: Iterable[Packed], spec: TaskSpec | None = None
) -> ShardInfo:
    """Write one shard of encoded samples and its index, whole or not at all, and describe it; ``spec`` tells what is
    counted of its labels."""
    from pipeline.ingestion.tar_writer import SampleTarWriter  # webdataset brings torch, which takes seconds

    path = folder / shard_name(task, split, number)
    temporary = path.with_name(f".{path.name}.part")
    rows: list[tuple[int, int, int, int, int, int]] = []
    keys, digests, labels, days = [], bytearray(), Counter[float](), set()
    with temporary.open("wb") as file:
        out = _HashingFile(file)
        with SampleTarWriter(out) as tar:  # type: ignore[arg-type]  # all it needs is write
            for sample in samples:
                start = tar.add(f"{sample.key}.json", sample.payload)
                image_start, image_size = 0, 0
                if sample.image is not None:
                    image_start = tar.add(f"{sample.key}.{image_extension(sample.image)}", sample.image)
                    image_size = len(sample.image)
                checksum = zlib.crc32(sample.image or b"", zlib.crc32(sample.payload))
                rows.append((start, len(sample.payload), checksum, image_start, image_size, sample.length))
                keys.append(sample.key)
                digests += sample.digest
                labels[sample.label] += 1
                days.add(sample.time)
    columns = np.array(rows, dtype=np.int64).T
    index = ShardIndex(
        keys=keys,
        offsets=columns[0],
        sizes=columns[1].astype(np.int32),
        checksums=columns[2].astype(np.uint32),
        image_offsets=columns[3],
        image_sizes=columns[4].astype(np.int32),
        lengths=columns[5].astype(np.int32),
        digests=np.frombuffer(bytes(digests), dtype=np.uint8).reshape(-1, 16),
    ).to_bytes()
    replace_file(folder / index_path(path.name), index)
    temporary.replace(path)
    window = sorted(day for day in days if day)
    return ShardInfo(
        path=path.name,
        task=task,
        split=split,
        samples=len(keys),
        bytes=out.bytes,
        sha256=out.sha256.hexdigest(),
        index_sha256=hashlib.sha256(index).hexdigest(),
        label_counts=label_counts(labels, spec),
        window=(window[0], window[-1]) if window else None,
    )


def replace_file(path: Path, data: bytes) -> None:
    """Write a whole file or nothing, without waiting for the disk: the manifest's digests tell what is whole."""
    temporary = path.with_name(f".{path.name}.part")
    temporary.write_bytes(data)
    temporary.replace(path)
