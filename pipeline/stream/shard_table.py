"""The shards of a manifest as columns: 10⁶ of them opened in seconds, each made whole only when it is used.

``manifest.json`` holds one shard a line. Where it is large, Arrow reads the columns that the order needs from these
lines, and a line becomes a :class:`ShardInfo`, with all that the contract checks, when its shard is read.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from itertools import pairwise
from typing import Any, overload

import numpy as np

from pipeline.contracts import SHARDS_BEGIN, SHARDS_END, ShardInfo
from pipeline.errors import InputError

_CHUNK_BYTES = 16 << 20
_SHARDS_AT_HAND = 4096


class ShardTable(Sequence[ShardInfo]):
    """Shards in path order, and as arrays what the order needs of all of them."""

    def __init__(self, paths: list[str], samples: np.ndarray, sizes: np.ndarray, shards: Sequence[ShardInfo]) -> None:
        self.paths, self.samples, self.bytes, self._shards = paths, samples, sizes, shards
        self.adopted: tuple[ShardInfo, ...] = ()

    @classmethod
    def of(cls, shards: Sequence[ShardInfo]) -> ShardTable:
        """Return the table of shards at hand."""
        ordered = sorted(shards, key=lambda shard: shard.path)
        samples, sizes = (np.array([getattr(s, name) for s in ordered], dtype=np.int64) for name in _NUMBERS)
        table = cls([shard.path for shard in ordered], samples, sizes, ordered)
        table.adopted = tuple(shard for shard in ordered if shard.adopted)
        return table

    def __len__(self) -> int:
        return len(self.paths)

    @overload
    def __getitem__(self, place: int) -> ShardInfo: ...

    @overload
    def __getitem__(self, place: slice) -> Sequence[ShardInfo]: ...

    def __getitem__(self, place: int | slice) -> ShardInfo | Sequence[ShardInfo]:
        return self._shards[place]


_NUMBERS = ("samples", "bytes")


class _Lines(Sequence[ShardInfo]):
    """Shards out of some lines of a manifest."""

    def __init__(self, data: bytes, starts: np.ndarray, location: str) -> None:
        self._data, self._starts, self._location = data, starts, location
        self._shard = lru_cache(_SHARDS_AT_HAND)(self._parsed)

    def __len__(self) -> int:
        return len(self._starts)

    @overload
    def __getitem__(self, place: int) -> ShardInfo: ...

    @overload
    def __getitem__(self, place: slice) -> Sequence[ShardInfo]: ...

    def __getitem__(self, place: int | slice) -> ShardInfo | Sequence[ShardInfo]:
        if isinstance(place, slice):
            return _Lines(self._data, self._starts[place], self._location)
        return self._shard(int(self._starts[place]))

    def _parsed(self, start: int) -> ShardInfo:
        line = self._data[start : self._data.index(b"\n", start)].removesuffix(b",")
        try:
            return ShardInfo.model_validate_json(line)
        except ValueError as error:
            raise InputError(
                f"{self._location} must hold valid shards, one is none: {error}; prepare the data anew"
            ) from error


def cut_out(data: bytes) -> tuple[bytes, tuple[int, int]] | None:
    """Return a manifest without its shards, and from where to where their lines stand; None where it has no lines,
    as earlier releases wrote it."""
    start, end = data.find(SHARDS_BEGIN), -1
    if start >= 0:
        end = data.find(SHARDS_END, start)
    if end < 0:
        return None
    first = start + SHARDS_BEGIN.index(b"{")
    return data[: start + SHARDS_BEGIN.index(b"[") + 1] + data[end + SHARDS_END.index(b"]") :], (first, end + 1)


def shards_by_task(
    data: bytes, lines: tuple[int, int], split: str, tasks: Sequence[str], location: str
) -> tuple[dict[str, ShardTable], set[str]]:
    """Return the shards of a split by task out of a manifest's lines, and the names of all splits.

    Raises:
        InputError: a line is no shard, or of a task that the manifest does not name.
    """
    starts, table = _columns(data, lines, location)
    named, splits = set(table["task"].unique().to_pylist()), set(table["split"].unique().to_pylist())
    numbers = {name: table[name].to_numpy() for name in _NUMBERS}
    if named - set(tasks) or any((column < 1).any() for column in numbers.values()):
        raise InputError(
            f"{location} must hold shards of its tasks {list(tasks)} with at least one sample and one byte, tasks are "
            f"{sorted(named)}, least numbers { ({n: int(c.min()) for n, c in numbers.items()}) }; prepare the data anew"
        )
    found = {}
    for task in tasks:
        chosen = _where(table, task, split)
        paths = table["path"].take(chosen).to_pylist()
        if any(after < before for before, after in pairwise(paths)):
            order = sorted(range(len(paths)), key=paths.__getitem__)
            chosen, paths = chosen[order], [paths[place] for place in order]
        samples, sizes = (numbers[name][chosen] for name in _NUMBERS)
        found[task] = ShardTable(paths, samples, sizes, _Lines(data, starts[chosen], location))
    return found, splits


def _where(table: Any, task: str, split: str) -> np.ndarray:
    import pyarrow.compute as pc

    mask = pc.and_(pc.equal(table["task"], task), pc.equal(table["split"], split))
    return np.flatnonzero(mask.to_numpy())


def _columns(data: bytes, lines: tuple[int, int], location: str) -> tuple[np.ndarray, Any]:
    """Return where each line starts, and the columns of all lines as an Arrow table."""
    import pyarrow as pa  # a third of a second, which manifests of usual size need not wait for
    import pyarrow.json as pj

    text = [pa.field(name, pa.string()) for name in ("path", "task", "split")]
    schema = pa.schema([*text, *(pa.field(name, pa.int64()) for name in _NUMBERS)])
    parse = pj.ParseOptions(explicit_schema=schema, unexpected_field_behavior="ignore")
    read = pj.ReadOptions(use_threads=False, block_size=2 * _CHUNK_BYTES)
    starts, tables = [], []
    position, end = lines
    while position < end:
        stop = end if end - position <= _CHUNK_BYTES else data.rindex(b"\n", position, position + _CHUNK_BYTES) + 1
        chunk = data[position:stop]
        ends = np.flatnonzero(np.frombuffer(chunk, dtype=np.uint8) == ord("\n"))
        starts.append(position + np.concatenate([[0], ends[:-1] + 1]))
        try:
            table = pj.read_json(pa.BufferReader(chunk.replace(b"},\n", b"}\n")), read, parse)
        except pa.ArrowInvalid as error:
            raise InputError(f"{location} must hold one shard a line: {error}; prepare the data anew") from error
        if table.num_rows != len(ends) or any(column.null_count for column in table.columns):
            raise InputError(
                f"{location} must hold one shard a line with its path, task, split, samples and bytes, got "
                f"{table.num_rows} in {len(ends)} lines; prepare the data anew"
            )
        tables.append(table)
        position = stop
    return np.concatenate(starts), pa.concat_tables(tables)
