"""A bounded folder of shards fetched from afar, shared by all processes of a machine.

Files are named by their sha256, appear whole and verified or not at all, and the longest unused go first. Locks are
the operating system's: a killed process leaves none behind.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO, Literal

from filelock import FileLock, Timeout
from platformdirs import user_cache_path
from pydantic import Field

from pipeline.errors import InputError
from pipeline.retry import is_full
from pipeline.settings import Settings

_NAME = re.compile(r"[0-9a-f]{64}\.(tar|npz)")


class CacheConfig(Settings):
    """Where shards from afar are kept, and how many bytes of them."""

    folder: str | None = None
    """None: ``mtl-lora/shards`` in ``MTL_LORA_CACHE`` or the user's cache folder."""
    max_bytes: int = Field(default=20 << 30, ge=1)
    """Most bytes that are kept; the shards used longest ago go first."""
    range_reads: Literal["auto", "always", "never"] = "auto"
    """``always`` reads single samples by ranges and caches indexes only; ``auto`` does so where the shards that are
    read at a time do not fit."""
    patience_s: float = Field(default=300.0, gt=0)
    """How long a failing read is tried again."""

    def path(self) -> Path:
        """Return the cache folder."""
        if self.folder:
            return Path(self.folder).expanduser()
        return Path(os.environ.get("MTL_LORA_CACHE") or user_cache_path("mtl-lora")) / "shards"


class CacheFullError(OSError):
    """There is no room for a file, even with everything else gone."""


class ShardCache:
    """Whole files by digest."""

    def __init__(self, folder: Path, max_bytes: int) -> None:
        self.folder, self.max_bytes = folder, max_bytes
        (folder / ".locks").mkdir(parents=True, exist_ok=True)

    def open(
        self,
        sha256: str,
        suffix: str,
        size: int | None,
        chunks: Callable[[], Iterator[bytes]],
        is_verified: bool = True,
    ) -> BinaryIO:
        """Open a file, fetching it first where it is not there.

        Args:
            sha256: digest of the content, and its name.
            suffix: ``tar`` or ``npz``.
            size: bytes; None for a small file of unknown size.
            chunks: gives the content from the start.
            is_verified: whether ``sha256`` is the content's; else it is a name alone.

        Raises:
            CacheFullError: there is no room for it.
            InputError: what was fetched has another digest, twice.
        """
        path = self.folder / f"{sha256}.{suffix}"
        while True:
            with contextlib.suppress(FileNotFoundError):
                file = path.open("rb")
                os.utime(path)
                return file
            with FileLock(self.folder / ".locks" / path.name):
                if not path.is_file():
                    self._fetch(path, sha256 if is_verified else None, size, chunks)

    def _fetch(self, path: Path, sha256: str | None, size: int | None, chunks: Callable[[], Iterator[bytes]]) -> None:
        part = path.with_name(f"{path.name}.part")
        try:
            for _ in range(2):
                if self._download(part, size, chunks) == sha256 or sha256 is None:
                    part.replace(path)
                    return
            raise InputError(
                f"a shard must have the digest in its manifest, {path.name} was fetched twice with another; "
                "upload it anew or prepare the data anew"
            )
        except OSError as error:
            if is_full(error):
                raise CacheFullError(f"no room for {path.name} in {self.folder}: {error}") from error
            raise
        finally:
            part.unlink(missing_ok=True)

    def _download(self, part: Path, size: int | None, chunks: Callable[[], Iterator[bytes]]) -> str:
        digest, content = hashlib.sha256(), chunks()
        if size is None:  # a small file: take it whole, so that its room can be reserved
            whole = b"".join(content)
            size, content = len(whole), iter([whole])
        with self._reserved(part, size) as file:
            for chunk in content:
                digest.update(chunk)
                file.write(chunk)
            file.truncate()
        return digest.hexdigest()

    @contextlib.contextmanager
    def _reserved(self, part: Path, size: int) -> Iterator[BinaryIO]:
        """Open a file with its disk space taken beforehand, so that other processes count it."""
        with part.open("wb") as file:
            with FileLock(self.folder / ".locks" / "room"):
                self._make_room(size, part)
                if size:
                    try:
                        os.posix_fallocate(file.fileno(), 0, size)
                    except OSError as error:
                        if not is_full(error):
                            raise
                        self._make_room(self.max_bytes, part)  # the disk has less than the limit: give up all else
                        os.posix_fallocate(file.fileno(), 0, size)
            yield file

    def _make_room(self, size: int, part: Path) -> None:
        if size > self.max_bytes:
            raise CacheFullError(f"{size} bytes do not fit into a cache of {self.max_bytes}")
        files = []
        for found in self.folder.iterdir():
            with contextlib.suppress(FileNotFoundError):  # another process has just finished fetching it
                if found != part and not found.is_dir():
                    files.append((found, found.stat()))
        total = sum(status.st_size for _, status in files)
        for found, status in sorted(files, key=lambda item: item[1].st_mtime):
            if total + size <= self.max_bytes:
                return
            if self._delete(found):
                total -= status.st_size

    def _delete(self, path: Path) -> bool:
        """Delete a cached file, or a half-fetched one that nobody fetches any more. Open files stay readable."""
        if _NAME.fullmatch(path.name):
            path.unlink(missing_ok=True)
            return True
        if not path.name.endswith(".part"):
            return False
        try:
            with FileLock(self.folder / ".locks" / path.name.removesuffix(".part"), timeout=0):
                path.unlink(missing_ok=True)
                return True
        except Timeout:
            return False
