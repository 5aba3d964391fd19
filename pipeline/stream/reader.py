"""Samples out of the shards of one split: keys and decoded rows at any place."""

from __future__ import annotations

import threading
from collections import OrderedDict
from pathlib import Path
from typing import BinaryIO

from pipeline.contracts import Sample, ShardInfo
from pipeline.errors import InputError
from pipeline.storage import join
from pipeline.stream.index import Member, ShardIndex, read_index

OPEN_SHARDS = 64


class ShardReader:
    """Random access to the samples of shards under one folder; safe between threads."""

    def __init__(self, root: str) -> None:
        self._root = root
        self._open: OrderedDict[str, tuple[BinaryIO, ShardIndex]] = OrderedDict()
        self._lock = threading.Lock()

    def key(self, shard: ShardInfo, row: int) -> str:
        """Return ``TASK/KEY`` of one row."""
        with self._lock:
            _, index = self._shard(shard)
            return f"{shard.task}/{index.keys[row]}"

    def sample(self, shard: ShardInfo, row: int) -> Sample:
        """Return one row decoded.

        Raises:
            InputError: the row is no valid sample of the shard's task.
        """
        with self._lock:
            file, index = self._shard(shard)
            data = _read(file, index.records[row])
            member = index.images[row]
            image = None if member is None else _read(file, member)
        try:
            sample = Sample.model_validate_json(data)
        except ValueError as error:
            raise InputError(f"{shard.path} row {row} must be a valid sample: {error}; prepare it anew") from error
        return sample if image is None else sample.model_copy(update={"image": image})

    def _shard(self, shard: ShardInfo) -> tuple[BinaryIO, ShardIndex]:
        found = self._open.get(shard.path)
        if found is None:
            path = Path(join(self._root, shard.path))
            if not path.is_file():
                raise InputError(f"every shard of the manifest must be there, {path} is missing; prepare the data anew")
            file = path.open("rb")
            index = read_index(file, str(path))
            if len(index.keys) != shard.samples:
                raise InputError(f"{path} must hold {shard.samples} samples, found {len(index.keys)}; prepare anew")
            found = self._open[shard.path] = (file, index)
            while len(self._open) > OPEN_SHARDS:
                self._open.popitem(last=False)[1][0].close()
        self._open.move_to_end(shard.path)
        return found


def _read(file: BinaryIO, member: Member) -> bytes:
    file.seek(member.offset)
    return file.read(member.size)
