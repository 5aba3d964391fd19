"""Records out of a tar that others wrote: the members of each sample, gathered wherever they stand in the tar."""

from __future__ import annotations

import os
import shutil
import tempfile
import zlib
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, BinaryIO, NamedTuple

from pipeline.ingestion.tar_members import DamagedTarError, tar_members
from pipeline.members import IMAGES, PICKLES, record_of, split_name
from pipeline.record import Rejected
from pipeline.shard_index import MAX_MEMBER_BYTES
from pipeline.storage import filesystem, is_remote

_COPY = 8 << 20


class TarSample(NamedTuple):
    """Where one sample stands in its tar."""

    key: str
    """As the tar has it."""
    members: Mapping[str, tuple[int, int]]
    """Extension → place and size of each member that is read, in bytes; of a rejected sample, of all."""
    checksum: int = 0
    """CRC-32 of their contents, in the order of the extensions."""

    def reference(self) -> dict[str, Any]:
        """Return what quarantine keeps of a sample: its members' names and places, not their contents."""
        return {"key": self.key, "members": {f"{self.key}.{e}": list(at) for e, at in self.members.items()}}

    def entry(self, key: str, day: str | None) -> dict[str, Any]:
        """Return what the shard's index is made of."""
        found: dict[str, Any] = {"key": key, "members": self.members, "checksum": self.checksum}
        return found | {"time": day} if day else found


class TarRecord(NamedTuple):
    """One sample as found; ``error`` where it could not be read."""

    record: dict[str, Any]
    error: str | None
    sample: TarSample


def tar_records(location: str, columns: Collection[str]) -> Iterator[TarRecord]:
    """Yield the samples of a tar in the order of their first members.

    Of a damaged tar every sample that can be told comes with the damage as its error, or one nameless sample.

    Args:
        location: path or URL.
        columns: fields that are needed; members of other names are not read.
    """
    with _opened(location) as file:
        samples: dict[str, dict[str, tuple[int, int]]] = {}
        faults: dict[str, str] = {}
        damage = None
        try:
            for member in tar_members(file, os.fstat(file.fileno()).st_size):
                named = split_name(member.name)
                if named is None:
                    continue
                key, extension = named
                members = samples.setdefault(key, {})
                wrong = member.fault
                if extension in members:
                    wrong = "sample has a member twice in its tar"
                elif extension.rpartition(".")[2] in PICKLES:
                    wrong = f"member {extension!r} would have to be unpickled, which is never done"
                if wrong:
                    faults.setdefault(key, wrong)
                members[extension] = (member.offset, member.size)
        except DamagedTarError as error:
            damage = str(error)
        if not samples:
            yield TarRecord({}, damage or "tar holds no sample", TarSample("", {}))
        for key, members in samples.items():
            fault = damage or faults.get(key)
            yield TarRecord({}, fault, TarSample(key, members)) if fault else _read(file, key, members, columns)


def _read(file: BinaryIO, key: str, members: dict[str, tuple[int, int]], columns: Collection[str]) -> TarRecord:
    needed = {extension: members[extension] for extension in sorted(members) if _is_needed(extension, columns)}
    if any(size > MAX_MEMBER_BYTES for _, size in needed.values()):
        return TarRecord({}, f"member is larger than {MAX_MEMBER_BYTES} bytes", TarSample(key, members))
    contents = {extension: os.pread(file.fileno(), size, at) for extension, (at, size) in needed.items()}
    checksum = 0
    for content in contents.values():
        checksum = zlib.crc32(content, checksum)
    sample = TarSample(key, needed, checksum)
    try:
        return TarRecord(record_of(contents), None, sample)
    except Rejected as reason:
        return TarRecord({}, str(reason), sample)


def _is_needed(extension: str, columns: Collection[str]) -> bool:
    if extension == "json" or extension in columns or extension in IMAGES:
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
