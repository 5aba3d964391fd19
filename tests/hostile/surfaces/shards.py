"""Surfaces of prepared data: manifests, shards and their indexes."""

from __future__ import annotations

import hashlib
import json
import random
from pathlib import Path

import numpy as np

from pipeline.contracts import Sample, ShardManifest
from tests.hostile.drive import Put
from tests.hostile.mutations import VALUES, as_json, mutated_bytes, mutated_value
from tests.hostile.surfaces.records import TASKS, look_at
from tests.pipeline.made_images import image_bytes


def _shards(folder: Path) -> ShardManifest:
    from pipeline.ingestion.shards import write_shard

    spec = TASKS[0]
    infos = []
    for number in range(2):
        samples = [
            Sample(
                key=f"{number}-{row}",
                task=spec.name,
                fields={"text": f"text {row}"},
                label=row % 2,
                image=image_bytes("PNG") if row == 2 else None,
            )
            for row in range(4)
        ]
        infos.append(write_shard(folder, spec.name, "train", number, samples))
    manifest = ShardManifest(tasks=(spec,), shards=tuple(infos), source_sha256="0")
    manifest.write(folder / "manifest.json")
    return manifest


def _read_shards(folder: Path, split: str = "train") -> None:
    from pipeline.stream import MixedStream, read_split

    stream = MixedStream(folder, 0, 4, split=split)
    assert len(stream.global_batch(0)) == 4
    for sample in read_split(folder, split):
        assert sample.task


def manifest(folder: Path) -> Put:
    """The list of shards, with the shards beside it."""
    shards = folder / "shards"
    shards.mkdir()
    _shards(shards)
    path = shards / "manifest.json"
    known, text = json.loads(path.read_text()), path.read_bytes()
    strange = [*VALUES, "../manifest.json", "/etc/passwd", "binary-train-000001.tar", "s3://b/x.tar", "a::b", "pipe:id"]

    def put(rng: random.Random) -> bool:
        whole = rng.random() < 0.6
        path.write_bytes(as_json(rng, mutated_value(rng, known, strange)) if whole else mutated_bytes(rng, text))
        _read_shards(shards)
        return True

    return put


def tar(folder: Path) -> Put:
    """Shards of our own without an index, and those of others."""
    shards = folder / "shards"
    shards.mkdir()
    first = _shards(shards).shards[0]
    data = (shards / first.path).read_bytes()
    alone = shards / "alone"
    alone.mkdir()

    def put(rng: random.Random) -> bool:
        changed = mutated_bytes(rng, data)
        if rng.random() < 0.6:  # a header's checksum kept right lets the change through to what reads it
            at = rng.choice([i for i in range(0, len(data), 512) if data[i + 257 : i + 262] == b"ustar"])
            header = bytearray((data[:at] + mutated_bytes(rng, data[at : at + 500]))[at : at + 512].ljust(512, b"\0"))
            header[148:156] = b" " * 8
            header[148:156] = f"{sum(header):06o}\0 ".encode()
            changed = data[:at] + bytes(header) + data[at + 512 :]
        path = alone / first.path
        path.write_bytes(changed)
        if rng.random() < 0.5:
            info = first.model_copy(
                update={
                    "bytes": max(len(changed), 1),
                    "sha256": hashlib.sha256(changed).hexdigest(),
                    "index_sha256": None,
                }
            )
            ShardManifest(tasks=TASKS[:1], shards=(info,), source_sha256="0").write(alone / "manifest.json")
            _read_shards(alone)
            return True
        return look_at(path, TASKS[0])

    return put


def index(folder: Path) -> Put:
    """Indexes of shards, whose digest the manifest is told anew."""
    import io

    from pipeline.shard_index import ShardIndex, index_path

    shards = folder / "shards"
    shards.mkdir()
    known = _shards(shards)
    first = known.shards[0]
    path = shards / index_path(first.path)
    data = path.read_bytes()
    with np.load(io.BytesIO(data)) as found:
        arrays = {name: found[name] for name in found.files}
    kinds = ("i8", "u8", "i4", "f8", "u1", "U3", "M8[s]", "?")

    def changed(rng: random.Random) -> bytes:
        if rng.random() < 0.4:
            return mutated_bytes(rng, data)
        other = {name: array.copy() for name, array in arrays.items()}
        name = rng.choice(list(other))
        array, kind = other[name], rng.randrange(6)
        if kind == 0:
            other[name] = array[: rng.randrange(len(array) + 1)]
        elif kind == 1 and array.size:
            limits = np.iinfo(array.dtype)
            array.flat[rng.randrange(array.size)] = rng.choice((limits.min, limits.max, 0, 1, 7, 2048 % limits.max))
        elif kind == 2:
            other[name] = array.astype(rng.choice(kinds))
        elif kind == 3:
            other[name] = array.reshape(-1, 1) if array.ndim == 1 else array.reshape(-1)
        elif kind == 4:
            del other[name]
        else:
            other[rng.choice(("extensions", "more", "keys"))] = np.frombuffer(b"txt\ncls", np.uint8)
        buffer = io.BytesIO()
        np.savez(buffer, **other)
        return buffer.getvalue()

    def put(rng: random.Random) -> bool:
        new = changed(rng)
        if rng.random() < 0.7:
            ShardIndex.from_bytes(new, "x")
        path.write_bytes(new)
        info = first.model_copy(update={"index_sha256": hashlib.sha256(new).hexdigest()})
        known.model_copy(update={"shards": (info, *known.shards[1:])}).write(shards / "manifest.json")
        _read_shards(shards)
        return True

    return put
