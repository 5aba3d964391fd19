"""The shard format both sides agree on: which members a tar may hold, and the index that tells where they lie.

A shard may hold only plain files ``KEY.json`` with at most one image ``KEY.png`` or ``KEY.jpg`` beside each. Links,
folders, devices, names that leave the tar, pickles and every other kind of member are refused; nothing is unpacked.

Beside ``NAME.tar`` stands ``NAME.index.npz`` (NumPy arrays, read with pickles off) with the place, checksum, length and
text digest of each sample. A tar without one is indexed by reading its headers.
"""

from __future__ import annotations

import io
import re
import tarfile
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, BinaryIO, overload

import numpy as np

from pipeline.errors import InputError

MEMBER = re.compile(r"([A-Za-z0-9_-]{1,200})\.(json|png|jpg)")
MAX_MEMBER_BYTES = 32 << 20
_CLOSE_BYTES = 16 << 10
MAX_INDEX_BYTES = 512 << 20
"""Largest index in memory: some 5 million samples; shards are far smaller."""


class KeyList(Sequence[str]):
    """Keys out of one buffer, made into text only when asked for: a third of the memory of a list."""

    def __init__(self, joined: np.ndarray, count: int) -> None:
        ends = np.append(np.flatnonzero(joined == ord("\n")), len(joined))
        self._joined = joined
        self._ends = ends.astype(np.int32) if count else ends[:0]

    def __len__(self) -> int:
        return len(self._ends)

    @overload
    def __getitem__(self, place: int) -> str: ...

    @overload
    def __getitem__(self, place: slice) -> list[str]: ...

    def __getitem__(self, place: int | slice) -> str | list[str]:
        if isinstance(place, slice):
            return [self[i] for i in range(*place.indices(len(self)))]
        if place < 0:
            place += len(self)
        end = self._ends[place]  # IndexError ends an iteration
        start = self._ends[place - 1] + 1 if place else 0
        return self._joined[start:end].tobytes().decode("ascii")


@dataclass(frozen=True)
class ShardIndex:
    """The samples of one shard in their order; arrays have one entry a sample."""

    keys: Sequence[str]
    offsets: np.ndarray
    """Place of ``KEY.json`` in the tar, in bytes."""
    sizes: np.ndarray
    checksums: np.ndarray
    """CRC-32 of ``KEY.json`` followed by the image."""
    image_offsets: np.ndarray
    """Place of the image, or 0 where there is none."""
    image_sizes: np.ndarray
    lengths: np.ndarray
    """Of the prompt, in tokens or characters, as counted when prepared: what length grouping sorts by."""
    digests: np.ndarray
    """128-bit digest of the texts as 16 bytes, or empty: what duplicates are found by."""
    extensions: tuple[str, ...] = ()
    """Of an adopted tar: the members of a sample; ``offsets`` and ``sizes`` then have a column each, with the offset 0
    where a sample lacks one, images among them, and the checksum is that of all in this order."""

    def __len__(self) -> int:
        return len(self.keys)

    def to_bytes(self) -> bytes:
        """Return the index file's content; equal indexes give equal bytes."""
        buffer = io.BytesIO()
        keys = np.frombuffer("\n".join(self.keys).encode(), dtype=np.uint8)
        extensions: dict[str, Any] = {}
        if self.extensions:
            extensions["extensions"] = np.frombuffer("\n".join(self.extensions).encode(), dtype=np.uint8)
        np.savez(
            buffer,
            keys=keys,
            offsets=self.offsets,
            sizes=self.sizes,
            checksums=self.checksums,
            image_offsets=self.image_offsets,
            image_sizes=self.image_sizes,
            lengths=self.lengths,
            digests=self.digests,
            **extensions,
        )
        return buffer.getvalue()

    @classmethod
    def from_bytes(cls, data: bytes, name: str) -> ShardIndex:
        """Read an index file.

        Raises:
            InputError: it is damaged, or its arrays do not fit each other.
        """
        try:
            with np.load(io.BytesIO(data), allow_pickle=False, max_header_size=10_000) as arrays:
                _check_expanded_size(arrays, name)
                found = {key: arrays[key] for key in arrays.files}
            keys = KeyList(_flat_bytes(found.pop("keys")), len(found["offsets"]))
            joined = found.pop("extensions", np.zeros(0, np.uint8)).tobytes().decode()
            index = cls(keys=keys, extensions=tuple(joined.split("\n")) if joined else (), **found)
        except InputError:
            raise
        except Exception as error:  # numpy and zipfile raise many kinds on damaged files
            raise InputError(f"{name} must be a whole index, it is damaged: {error}; prepare the data anew") from error
        per_sample = (
            index.offsets,
            index.sizes,
            index.checksums,
            index.image_offsets,
            index.image_sizes,
            index.lengths,
        )
        shapes = [(len(keys), len(index.extensions)) if index.extensions else (len(keys),)] * 2 + [(len(keys),)] * 4
        if any(a.shape != shape or a.dtype.kind not in "iu" for a, shape in zip(per_sample, shapes, strict=True)):
            raise InputError(f"{name} must have one whole number a sample in every array; prepare the data anew")
        digests = index.digests
        if digests.dtype != np.uint8 or digests.shape not in ((len(keys), 16), (0, 16)) or (index.lengths < 0).any():
            raise InputError(f"{name} must have lengths >= 0 and digests of 16 bytes; prepare the data anew")
        index.check_places(name)
        return index

    def check_places(self, name: str, shard_bytes: int | None = None) -> None:
        """Refuse places that no member can have: no read may ask for more memory than a sample takes.

        Args:
            name: of the index, for errors.
            shard_bytes: size of the tar, where it is known.

        Raises:
            InputError: an offset or size is negative, a sample is too large, or lies beyond the end of the tar.
        """
        end = np.iinfo(np.int64).max - MAX_MEMBER_BYTES if shard_bytes is None else shard_bytes
        for offsets, sizes in ((self.offsets, self.sizes), (self.image_offsets, self.image_sizes)):
            bad = (offsets < 0) | (sizes < 0) | (sizes > MAX_MEMBER_BYTES) | (offsets > end)
            bad |= offsets.astype(np.uint64) + np.where(bad, 0, sizes).astype(np.uint64) > np.uint64(end)
            if bad.any():
                at = int(np.argwhere(bad)[0, 0])
                raise InputError(
                    f"a sample must lie within its shard and have at most {MAX_MEMBER_BYTES} bytes, {name} says of row "
                    f"{at}: {sizes[at].tolist()} bytes at {offsets[at].tolist()}; prepare the data anew"
                )


def _flat_bytes(array: np.ndarray) -> np.ndarray:
    if array.ndim != 1 or array.dtype != np.uint8 or (array > 127).any():
        raise ValueError(f"keys must be ASCII bytes in one dimension, got {array.dtype} of shape {array.shape}")
    return array


def _check_expanded_size(arrays: Any, name: str) -> None:
    total = sum(member.file_size for member in arrays.zip.infolist())
    if total > MAX_INDEX_BYTES:
        raise InputError(f"an index may have {MAX_INDEX_BYTES} bytes, {name} unpacks to {total}; use smaller shards")


def read_members(read: Callable[[int, int], bytes], members: Mapping[str, tuple[int, int]]) -> dict[str, bytes]:
    """Return the contents of a sample's members, read at one go where they stand close together.

    Args:
        read: gives so many bytes (second) from a place (first).
        members: extension → place and size.
    """
    start = min((offset for offset, _ in members.values()), default=0)
    stretch = max((offset + size for offset, size in members.values()), default=0) - start
    if stretch > 2 * sum(size for _, size in members.values()) + _CLOSE_BYTES:
        return {extension: read(offset, size) for extension, (offset, size) in members.items()}
    data = read(start, stretch) if stretch else b""
    return {extension: data[offset - start : offset - start + size] for extension, (offset, size) in members.items()}


def index_path(shard_path: str) -> str:
    """Return the path of a shard's index."""
    return f"{shard_path.removesuffix('.tar')}.index.npz"


def image_extension(data: bytes) -> str:
    """Return the member extension of an encoded image, by its first bytes."""
    return "jpg" if data[:2] == b"\xff\xd8" else "png"


def scan_tar(file: BinaryIO, name: str) -> ShardIndex:
    """Index a tar by its headers and contents, checking every member.

    Raises:
        InputError: it is damaged, or holds anything but samples.
    """
    rows: dict[str, dict[str, tuple[int, int]]] = {}
    try:
        with tarfile.open(fileobj=file, mode="r:") as tar:
            for member in _members(tar):
                key, kind = check_member(member, name)
                kind = "json" if kind == "json" else "image"
                row = rows.setdefault(key, {})
                if kind in row:
                    raise InputError(f"a shard must hold each member once, {name} has {member.name!r} twice")
                row[kind] = (member.offset_data, member.size)
    except InputError:
        raise
    except (tarfile.TarError, EOFError, ValueError, OverflowError) as error:  # sizes that lead nowhere
        raise InputError(f"a shard must be a whole tar, {name} is damaged: {error}; prepare it anew") from error
    for key, row in rows.items():
        if "json" not in row:
            raise InputError(f"a shard must hold {key}.json beside its image, {name} does not; prepare it anew")
    records = [row["json"] for row in rows.values()]
    images = [row.get("image", (0, 0)) for row in rows.values()]
    checksums = [zlib.crc32(_read(file, *i), zlib.crc32(_read(file, *r))) for r, i in zip(records, images, strict=True)]
    return ShardIndex(
        keys=tuple(rows),
        offsets=np.array([r[0] for r in records], dtype=np.int64),
        sizes=np.array([r[1] for r in records], dtype=np.int64),
        checksums=np.array(checksums, dtype=np.uint32),
        image_offsets=np.array([r[0] for r in images], dtype=np.int64),
        image_sizes=np.array([r[1] for r in images], dtype=np.int64),
        lengths=np.array([r[1] for r in records], dtype=np.int32),
        digests=np.zeros((0, 16), dtype=np.uint8),
    )


def _read(file: BinaryIO, offset: int, size: int) -> bytes:
    file.seek(offset)
    return file.read(size)


def _members(tar: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
    while (member := tar.next()) is not None:
        yield member
        tar.members = []  # type: ignore[attr-defined]  # tarfile keeps every header otherwise


def check_member(member: tarfile.TarInfo, name: str) -> tuple[str, str]:
    """Return the key and kind of a member.

    Raises:
        InputError: it is not a plain file of a known kind, or too large.
    """
    if not member.isreg() or member.issparse():
        raise InputError(f"a shard may hold plain files only, {name} has {member.name!r} of type {member.type!r}")
    match = MEMBER.fullmatch(member.name)
    if match is None:
        raise InputError(
            f"a shard may hold KEY.json, KEY.png and KEY.jpg only (KEY of letters, digits, _ and -), "
            f"{name} has {member.name!r}; prepare it anew"
        )
    if member.size > MAX_MEMBER_BYTES:
        raise InputError(f"a member may have {MAX_MEMBER_BYTES} bytes, {member.name!r} in {name} has {member.size}")
    return match.group(1), match.group(2)
