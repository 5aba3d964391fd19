"""The bytes of shards and of their indexes, from a local folder or from afar."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import numpy as np

from pipeline.contracts import ShardInfo
from pipeline.errors import InputError
from pipeline.retry import PATIENCE_S, persistently
from pipeline.schemes import scheme_of
from pipeline.shard_index import index_path
from pipeline.storage import filesystem, is_remote, join, stamp_of
from pipeline.stream.cache import CacheConfig, CacheFullError, ShardCache
from pipeline.stream.shard_table import ShardTable

CHUNK_BYTES = 8 << 20
BLOCK_BYTES = 512
"""Of a tar: a member's header alone takes one."""
_ASKING = 16
SIZED_SHARDS = 200_000
"""Up to so many shards, the size of each is looked at when a stream is opened: a second's system calls."""
ASKED_FILES = 2000
"""Up to so many files of a web server are asked for one by one when a stream is opened."""
UNKNOWN = -1
"""Size of a file of which the name alone was asked for."""


class OpenShard(Protocol):
    """One shard, read at any place."""

    def read(self, offset: int, size: int) -> bytes:
        """Return bytes of the tar; fewer than asked for at its end."""

    def close(self) -> None:
        """Give the file back."""


class ShardFiles(Protocol):
    """All shards of one manifest."""

    root: str
    """Folder or URL that they stand in."""

    def open(self, shard: ShardInfo) -> OpenShard:
        """Open one shard."""

    def index(self, shard: ShardInfo) -> bytes:
        """Return the content of the shard's index file."""

    def sizes(self, names: Sequence[str], names_alone: bool = False) -> dict[str, int]:
        """Return name → bytes of at least these files, where they are there; ``UNKNOWN`` where that was not asked."""


class _Local:
    def __init__(self, file: BinaryIO) -> None:
        self._file = file

    def read(self, offset: int, size: int) -> bytes:
        return os.pread(self._file.fileno(), size, offset)

    def close(self) -> None:
        self._file.close()


def _opened(path: Path) -> OpenShard:
    try:
        return _Local(path.open("rb"))
    except FileNotFoundError:
        raise InputError(
            f"every shard of the manifest must be there, {path} is missing; prepare the data anew"
        ) from None


class LocalFiles:
    """Shards in a folder."""

    def __init__(self, root: str) -> None:
        self.root = root

    def open(self, shard: ShardInfo) -> OpenShard:
        """Open one shard.

        Raises:
            InputError: it is not there, or has another size.
        """
        path = Path(join(self.root, shard.path))
        opened = _opened(path)
        if (size := path.stat().st_size) != shard.bytes:
            opened.close()
            raise InputError(
                f"a shard must have the {shard.bytes} bytes of the manifest, {path} has {size}; copy it again"
            )
        return opened

    def index(self, shard: ShardInfo) -> bytes:
        """Return the content of the shard's index file.

        Raises:
            InputError: it is not there.
        """
        path = Path(join(self.root, index_path(shard.path)))
        try:
            return path.read_bytes()
        except FileNotFoundError:
            raise InputError(f"a shard's index must be there, {path} is missing; prepare the data anew") from None

    def sizes(self, names: Sequence[str], names_alone: bool = False) -> dict[str, int]:
        """Return name → bytes of every file in the folder; a system call a file, unless names are enough."""
        if names_alone:
            return dict.fromkeys(os.listdir(self.root), UNKNOWN)  # noqa: PTH208 - a Path for each takes ten times as long
        with os.scandir(self.root) as entries:
            return {entry.name: entry.stat().st_size for entry in entries if entry.is_file()}


class _Ranges:
    """A shard of which only stretches are fetched."""

    def __init__(self, fetch: Callable[[int, int], bytes]) -> None:
        self._fetch = fetch

    def read(self, offset: int, size: int) -> bytes:
        return self._fetch(offset, size)

    def close(self) -> None:
        pass


class RemoteFiles:
    """Shards under a URL, whole through the cache or single samples by byte range."""

    def __init__(self, root: str, config: CacheConfig, whole: bool) -> None:
        self.root, self._config, self._whole = root, config, whole
        self._fs, self._path = filesystem(root)
        self._cache = ShardCache(config.path(), config.max_bytes)

    def open(self, shard: ShardInfo) -> OpenShard:
        """Open one shard: the cached copy, fetched first, or, where it does not fit, ranges of the original."""
        url = shard.adopted.url if shard.adopted else join(self.root, shard.path)
        if self._whole:
            is_verified = shard.adopted is None
            chunks = self._chunks(url, shard.bytes)
            try:
                return _Local(self._cache.open(shard.sha256, "tar", shard.bytes, chunks, is_verified))
            except CacheFullError:
                pass
        return _Ranges(lambda offset, size: self._range(url, offset, offset + size))

    def index(self, shard: ShardInfo) -> bytes:
        """Return the content of the shard's index, through the cache where there is room."""
        url = join(self.root, index_path(shard.path))

        def content() -> Iterator[bytes]:
            yield persistently(lambda: bytes(self._fs.cat_file(url)), url, self._config.patience_s)

        try:
            with self._cache.open(str(shard.index_sha256), "npz", None, content) as file:
                return file.read()
        except CacheFullError:
            return next(content())

    def sizes(self, names: Sequence[str], names_alone: bool = False) -> dict[str, int]:
        """Return name → bytes of every object under the root; a listing brings both.

        Where there is none, each file is asked for, up to ``ASKED_FILES`` of them.
        """
        if not _is_listed(self.root) and len(names) > ASKED_FILES:
            return dict.fromkeys(names, UNKNOWN)
        found = _infos(self.root, names, self._config.patience_s)
        return {name: int(info["size"] or 0) for name, info in found.items()}

    def _chunks(self, url: str, size: int) -> Callable[[], Iterator[bytes]]:
        def chunks() -> Iterator[bytes]:
            for start in range(0, size, CHUNK_BYTES):
                yield self._range(url, start, min(start + CHUNK_BYTES, size))

        return chunks

    def _range(self, url: str, start: int, end: int) -> bytes:
        fs, _ = filesystem(url)
        return persistently(lambda: bytes(fs.cat_file(url, start=start, end=end)), url, self._config.patience_s)


class _LocalOrAdopted(LocalFiles):
    """Shards in a folder, or indexes there of tars that lie elsewhere."""

    def __init__(self, root: str, config: CacheConfig, whole: bool) -> None:
        super().__init__(root)
        self._config, self._whole = config, whole
        self._remote: RemoteFiles | None = None

    def open(self, shard: ShardInfo) -> OpenShard:
        if shard.adopted is None:
            return super().open(shard)
        if is_remote(shard.adopted.url):
            self._remote = self._remote or RemoteFiles(shard.adopted.url, self._config, self._whole)
            return self._remote.open(shard)
        return _opened(Path(shard.adopted.url))


def shard_files(root: str, config: CacheConfig, working_set_bytes: int) -> ShardFiles:
    """Return the shards' files under a folder or URL."""
    fits = 2 * working_set_bytes <= config.max_bytes
    whole = config.range_reads == "never" or (config.range_reads == "auto" and fits)
    return RemoteFiles(root, config, whole) if is_remote(root) else _LocalOrAdopted(root, config, whole)


def read_manifest_bytes(location: str, patience_s: float) -> bytes:
    """Return the content of a manifest, local or remote.

    Raises:
        InputError: it is not there or cannot be read.
    """
    if not is_remote(location):
        try:
            return Path(location).read_bytes()
        except FileNotFoundError:
            raise InputError(f"a manifest must be a file, found none at {location}; run prepare first") from None
    fs, _ = filesystem(location)
    return persistently(lambda: bytes(fs.cat_file(location)), location, patience_s)


def check_shards(files: ShardFiles, tables: Sequence[ShardTable], root: str) -> None:
    """Refuse shards that are missing or have another size, before anything is read.

    Of more than ``SIZED_SHARDS`` in a folder only the names are looked up here; the size is looked at when a shard is
    opened.

    Raises:
        InputError: with how many of how many, and the first ones.
    """
    adopted = [(shard.adopted, shard.bytes) for table in tables for shard in table.adopted if shard.adopted]
    check_adopted({tar.url: tar.stamp for tar, _ in adopted}, {tar.url: size for tar, size in adopted})
    tables = [table.of([shard for shard in table if not shard.adopted]) if table.adopted else table for table in tables]
    shards = sum(map(len, tables))
    names = [path for table in tables for path in table.paths]
    found = files.sizes(names, names_alone=shards > SIZED_SHARDS) if shards else {}
    missing, other = [], []
    for table in tables:
        if (crowded := np.flatnonzero(table.samples > table.bytes // BLOCK_BYTES)).size:
            at = int(crowded[0])
            raise InputError(
                f"a sample must have {BLOCK_BYTES} bytes of its tar at least, the manifest says of {table.paths[at]} "
                f"{table.samples[at]} samples in {table.bytes[at]} bytes; prepare the data anew"
            )
        for path, size in zip(table.paths, table.bytes.tolist(), strict=True):
            there = found.get(path)
            if there is None:
                missing.append(path)
            elif there not in (size, UNKNOWN):
                other.append(path)
    if missing or other:
        raise InputError(
            f"all {shards} shards of the manifest must stand whole in {root}, {len(missing)} are missing "
            f"{missing[:3]} and {len(other)} have another size {other[:3]}; copy them again or prepare the data anew"
        )


def check_adopted(stamps: Mapping[str, str], sizes: Mapping[str, int]) -> None:
    """Refuse tars of others that are gone or have changed since they were adopted.

    Args:
        stamps: URL → stamp when it was adopted.
        sizes: URL → bytes when it was adopted.

    Raises:
        InputError: with the first ones.
    """
    changed = []
    for folder in sorted({url.rpartition("/")[0] for url in stamps}):
        urls = [url for url in stamps if url.rpartition("/")[0] == folder]
        listed = _infos(folder, [url.rpartition("/")[2] for url in urls])
        for url in urls:
            info = listed.get(url.rpartition("/")[2])
            if info is None or int(info["size"]) != sizes[url] or stamp_of(info) != stamps[url]:
                changed.append(url)
    if changed:
        raise InputError(
            f"adopted shards must stay as they were when their index was made, {len(changed)} of {len(stamps)} are "
            f"gone or have changed since: {changed[:3]}; restore them, or run prepare again, which indexes them anew"
        )


def _infos(folder: str, names: Sequence[str], patience_s: float = PATIENCE_S) -> dict[str, dict[str, Any]]:
    """Return name → what storage knows of it, of all files in a folder, or, where it lists none, of those named."""
    fs, path = filesystem(folder)
    if _is_listed(folder):

        def listed() -> list[dict[str, Any]]:
            fs.invalidate_cache()
            return list(fs.ls(path, detail=True))

        found = persistently(listed, folder, patience_s)
        return {str(info["name"]).rstrip("/").rpartition("/")[2]: info for info in found}

    def asked(name: str) -> dict[str, Any] | None:
        def info() -> dict[str, Any] | None:
            try:
                return dict(fs.info(f"{path}/{name}"))
            except FileNotFoundError:
                return None

        return persistently(info, f"{folder}/{name}", patience_s)

    with ThreadPoolExecutor(_ASKING) as pool:
        return {name: info for name, info in zip(names, pool.map(asked, names), strict=True) if info is not None}


def _is_listed(url: str) -> bool:
    scheme = scheme_of(url)
    return scheme is None or scheme.is_listed


def sha256_of(data: bytes) -> str:
    """Return the digest of some bytes."""
    return hashlib.sha256(data).hexdigest()
