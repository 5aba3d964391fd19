"""Where each sample lies in its shard, and the checks that make a tar safe to read.

A shard may hold only plain files ``KEY.json`` with at most one image ``KEY.png`` or ``KEY.jpg`` beside each. Links,
folders, devices, names that leave the tar, pickles and every other kind of member are refused; nothing is unpacked.
"""

from __future__ import annotations

import re
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, BinaryIO

from pipeline.errors import InputError

MEMBER = re.compile(r"([A-Za-z0-9_-]{1,200})\.(json|png|jpg)")
MAX_MEMBER_BYTES = 32 << 20


@dataclass(frozen=True)
class Member:
    """A stretch of bytes in the tar."""

    offset: int
    size: int


@dataclass(frozen=True)
class ShardIndex:
    """The samples of one shard in their order."""

    keys: tuple[str, ...]
    records: tuple[Member, ...]
    images: tuple[Member | None, ...]


def read_index(file: BinaryIO, name: str) -> ShardIndex:
    """Index a whole tar.

    Raises:
        InputError: it is damaged, or holds anything but samples.
    """
    rows: dict[str, dict[str, Member]] = {}
    try:
        with tarfile.open(fileobj=file, mode="r:") as tar:
            for member in _members(tar):
                key, kind = check_member(member, name)
                row = rows.setdefault(key, {})
                kind = "json" if kind == "json" else "image"
                if kind in row:
                    raise InputError(f"a shard must hold each member once, {name} has {member.name!r} twice")
                row[kind] = Member(member.offset_data, member.size)
    except tarfile.TarError as error:
        raise InputError(f"a shard must be a whole tar, {name} is damaged: {error}; prepare it anew") from error
    for key, row in rows.items():
        if "json" not in row:
            raise InputError(f"a shard must hold {key}.json beside its image, {name} does not; prepare it anew")
    return ShardIndex(
        tuple(rows), tuple(r["json"] for r in rows.values()), tuple(r.get("image") for r in rows.values())
    )


def _members(tar: tarfile.TarFile) -> Iterator[Any]:
    while (member := tar.next()) is not None:
        yield member
        tar.members = []  # type: ignore[attr-defined]  # tarfile keeps every header otherwise


def check_member(member: tarfile.TarInfo, name: str) -> tuple[str, str]:
    """Return the key and kind of a member.

    Raises:
        InputError: it is not a plain file of a known kind, or too large.
    """
    if not member.isreg():
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
