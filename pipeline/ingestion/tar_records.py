"""Records out of a tar that others wrote: the members of each sample, gathered wherever they stand in the tar."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from types import MappingProxyType
from typing import Any, BinaryIO, NamedTuple

from pipeline.ingestion.tar_members import DamagedTarError, tar_members
from pipeline.members import PICKLES, checksum_of, image_checksums, is_image, record_of, split_name
from pipeline.record import Rejected
from pipeline.shard_index import MAX_MEMBER_BYTES
from pipeline.storage import filesystem, is_remote

_COPY = 8 << 20
_AHEAD = 64 << 10
"""Bytes that are read at one go where members are smaller."""


class TarSample(NamedTuple):
    """Where one sample stands in its tar."""

    key: str
    """As the tar has it."""
    members: Mapping[str, tuple[int, int]]
    """Extension → place and size of each member that is read, in bytes; of a rejected sample, of all."""
    checksum: int = 0
    """Of their contents, as the index has it: ``pipeline.members.checksum_of``."""
    contents: Mapping[str, bytes] = MappingProxyType({})
    """Extension → content of each member that was read."""
    images: Mapping[str, bytes] = MappingProxyType({})
    """Extension → CRC-32 of each image, where it was asked for."""

    def member_of(self, content: bytes) -> str:
        """Return the extension of the member that has this content: of this very object."""
        return next(extension for extension, found in self.contents.items() if found is content)

    def reference(self) -> dict[str, Any]:
        """Return what quarantine keeps of a sample: its members' names and places, not their contents."""
        return {"key": self.key, "members": {f"{self.key}.{e}": list(at) for e, at in self.members.items()}}


class TarRecord(NamedTuple):
    """One sample as found; ``error`` where it could not be read."""

    record: dict[str, Any]
    error: str | None
    sample: TarSample


class _Ahead:
    """Reads small members that follow each other many at a time."""

    def __init__(self, file: BinaryIO) -> None:
        self._descriptor, self._start, self._data = file.fileno(), 0, b""

    def read(self, offset: int, size: int) -> bytes:
        at = offset - self._start
        if not 0 <= at <= len(self._data) - size:
            if at < 0 and self._data:  # back, where no order is to be seen
                return os.pread(self._descriptor, size, offset)
            self._data, self._start, at = os.pread(self._descriptor, max(size, _AHEAD), offset), offset, 0
        return self._data[at : at + size]


def tar_records(location: str, columns: Collection[str], by_image: bool = True) -> Iterator[TarRecord]:
    """Yield the samples of a tar in the order of their first members.

    Of a damaged tar every sample that can be told comes with the damage as its error, or one nameless sample.

    Args:
        location: path or URL.
        columns: fields that are needed; members of other names are not read.
        by_image: whether checksums are made of the CRC-32 of each image, instead of its bytes.
    """
    with _opened(location) as file:
        samples, faults, damage = _samples(file)
        if not samples:
            yield TarRecord({}, damage or "tar holds no sample", TarSample("", {}))
        read = _Ahead(file).read
        needed: dict[tuple[str, ...], tuple[list[str], bool]] = {}
        for key, members in samples.items():
            if fault := damage or faults.get(key):
                yield TarRecord({}, fault, TarSample(key, members))
                continue
            extensions = tuple(members)
            if extensions not in needed:
                found = sorted(each for each in extensions if _is_needed(each, columns))
                needed[extensions] = found, by_image and any(map(is_image, found))
            yield _read(read, key, members, *needed[extensions])


_Samples = dict[str, dict[str, tuple[int, int]]]


def _samples(file: BinaryIO) -> tuple[_Samples, dict[str, str], str | None]:
    """Return the members of each sample, what is wrong with some, and what is wrong with the whole tar."""
    samples: _Samples = {}
    faults: dict[str, str] = {}
    try:
        for name, offset, size, wrong in tar_members(file, os.fstat(file.fileno()).st_size):
            named = split_name(name)
            if named is None:
                continue
            key, extension = named
            members = samples.get(key)
            if members is None:
                members = samples[key] = {}
            if extension in members:
                wrong = "sample has a member twice in its tar"
            elif extension.rpartition(".")[2] in PICKLES:
                wrong = f"member {extension!r} would have to be unpickled, which is never done"
            if wrong:
                faults.setdefault(key, wrong)
            members[extension] = (offset, size)
    except DamagedTarError as error:
        return samples, faults, str(error)
    return samples, faults, None


def _read(
    read: Callable[[int, int], bytes],
    key: str,
    members: dict[str, tuple[int, int]],
    extensions: list[str],
    by_image: bool,
) -> TarRecord:
    needed = {extension: members[extension] for extension in extensions}
    contents = {}
    for extension, (offset, size) in needed.items():
        if size > MAX_MEMBER_BYTES:
            return TarRecord({}, f"member is larger than {MAX_MEMBER_BYTES} bytes", TarSample(key, members))
        contents[extension] = read(offset, size)
    images = image_checksums(contents) if by_image else {}
    sample = TarSample(key, needed, checksum_of(contents, images), contents, images)
    try:
        return TarRecord(record_of(contents), None, sample)
    except Rejected as reason:
        return TarRecord({}, str(reason), sample)


def _is_needed(extension: str, columns: Collection[str]) -> bool:
    if extension == "json" or extension in columns:
        return True
    return "." in extension and any(column.startswith(f"{extension}.") for column in columns)


@contextmanager
def _opened(location: str) -> Iterator[BinaryIO]:
    """Open a tar for reading at any place; one that lies elsewhere is fetched into a file without a name."""
    fs, path = filesystem(location)
    if not is_remote(location):
        with open(path, "rb") as file:  # noqa: PTH123 - as fsspec names it
            yield file
        return
    with tempfile.TemporaryFile() as file, fs.open(path, "rb", block_size=_COPY) as remote:
        shutil.copyfileobj(remote, file, _COPY)
        file.flush()
        yield file
