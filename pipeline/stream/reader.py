"""Samples out of the shards of one split: keys, lengths and decoded rows at any place."""

from __future__ import annotations

import io
import threading
import zlib
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import numpy as np

from pipeline.adopted_sample import adopted_sample
from pipeline.contracts import Sample, ShardInfo, TaskSpec
from pipeline.errors import InputError
from pipeline.shard_index import ShardIndex, image_extension, scan_tar
from pipeline.storage import join
from pipeline.stream.shard_files import OpenShard, ShardFiles, sha256_of


class ShardReader:
    """Random access to samples; safe between threads.

    Every index is checked against the digest in the manifest, every sample against the checksum in its index; a tar
    without an index is checked as a whole and scanned.
    """

    def __init__(self, files: ShardFiles, open_shards: int, tasks: Sequence[TaskSpec] = ()) -> None:
        self._tasks = {task.name: task for task in tasks}
        self._files, self._root, self._open_shards = files, files.root, open_shards
        self._indexes: OrderedDict[str, ShardIndex] = OrderedDict()
        self._shards: OrderedDict[str, OpenShard] = OrderedDict()
        self._lock = threading.RLock()

    def key(self, shard: ShardInfo, row: int) -> str:
        """Return ``TASK/KEY`` of one row."""
        return f"{shard.task}/{self._index(shard).keys[row]}"

    def lengths(self, shard: ShardInfo, rows: np.ndarray) -> np.ndarray:
        """Return the lengths of some rows' prompts, in tokens or characters, as counted when prepared, (N,)."""
        return np.asarray(self._index(shard).lengths)[rows]

    def sample(self, shard: ShardInfo, row: int) -> Sample:
        """Return one row decoded.

        Raises:
            InputError: it is damaged, or no valid sample of the shard's task.
        """
        if shard.adopted is not None:
            with self._lock:
                return adopted_sample(shard, self._tasks[shard.task], self._index(shard), row, self._file(shard).read)
        _, data, image = self._stored(shard, row)
        try:
            sample = Sample.model_validate_json(data)
        except ValueError as error:
            raise InputError(f"{shard.path} row {row} must be a valid sample: {error}; prepare it anew") from error
        if sample.task != shard.task:
            raise InputError(f"{shard.path} must hold samples of {shard.task!r}, row {row} is one of {sample.task!r}")
        return sample.model_copy(update={"image": image}) if image else sample

    def members(self, shard: ShardInfo, row: int) -> dict[str, Any]:
        """Return one row as webdataset does: key, URL, and the content of each member by its extension.

        A sample of an adopted tar comes with the members that it would have in a shard of our own.

        Raises:
            InputError: it is damaged.
        """
        if shard.adopted is not None:
            sample = self.sample(shard, row)
            payload = sample.model_dump_json(exclude_defaults=True).encode()
            given = {"__key__": sample.key, "__url__": shard.adopted.url, "json": payload}
            return given | {image_extension(sample.image): sample.image} if sample.image else given
        key, data, image = self._stored(shard, row)
        found = {"__key__": key, "__url__": join(self._root, shard.path), "json": data}
        return found | {image_extension(image): image} if image else found

    def _stored(self, shard: ShardInfo, row: int) -> tuple[str, bytes, bytes]:
        """Return key, ``KEY.json`` and image of one row as they stand in the tar, checked against the index."""
        index = self._index(shard)
        with self._lock:
            file = self._file(shard)
            data = file.read(int(index.offsets[row]), int(index.sizes[row]))
            size = int(index.image_sizes[row])
            image = file.read(int(index.image_offsets[row]), size) if size else b""
        checksum = zlib.crc32(data)
        if (zlib.crc32(image, checksum) if image else checksum) != index.checksums[row]:
            raise InputError(
                f"{shard.path} row {row} must have the checksum in its index, it has another: the shard is damaged; "
                "copy it again or prepare the data anew"
            )
        return index.keys[row], data, image

    def _index(self, shard: ShardInfo) -> ShardIndex:
        with self._lock:
            index = self._indexes.get(shard.path)
            if index is None:
                index = self._load_index(shard)
                if len(index) != shard.samples:
                    raise InputError(
                        f"{shard.path} must hold {shard.samples} samples, found {len(index)}; prepare the data anew"
                    )
                if bool(index.extensions) != (shard.adopted is not None):
                    raise InputError(f"{shard.path} and its index must be of one kind; prepare the data anew")
                index.check_places(shard.path, shard.bytes)
                self._indexes[shard.path] = index
                if len(self._indexes) > self._open_shards:
                    self._indexes.popitem(last=False)
            else:
                self._indexes.move_to_end(shard.path)
            return index

    def _load_index(self, shard: ShardInfo) -> ShardIndex:
        if shard.index_sha256 is not None:
            data = self._files.index(shard)
            if sha256_of(data) != shard.index_sha256:
                raise InputError(
                    f"the index of {shard.path} must have the digest in the manifest, it has another; "
                    "copy it again or prepare the data anew"
                )
            return ShardIndex.from_bytes(data, shard.path)
        tar = self._file(shard).read(0, shard.bytes)
        if sha256_of(tar) != shard.sha256:
            raise InputError(
                f"{shard.path} must have the digest in the manifest, it has another: the shard is damaged; "
                "copy it again or prepare the data anew"
            )
        return scan_tar(io.BytesIO(tar), shard.path)

    def _file(self, shard: ShardInfo) -> OpenShard:
        file = self._shards.get(shard.path)
        if file is None:
            file = self._shards[shard.path] = self._files.open(shard)
            if len(self._shards) > self._open_shards:
                self._shards.popitem(last=False)[1].close()
        else:
            self._shards.move_to_end(shard.path)
        return file
