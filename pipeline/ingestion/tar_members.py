"""The headers of a tar that others wrote: ustar, PAX and GNU, read at 10 times the speed of ``tarfile`` and more.

Only headers are parsed; nothing is unpacked, no link followed, and no name used as a path.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import BinaryIO, NamedTuple

from pipeline.ingestion.tar_headers import plain_members

_BLOCK = 512
_WINDOW = 4 << 10
_MAX_EXTENDED = 1 << 20
_ZEROS = bytes(_BLOCK)
_REGULAR = b"0\0007"
_KINDS = {b"1": "a hard link", b"2": "a symbolic link", b"3": "a device", b"4": "a device", b"6": "a pipe"}


class DamagedTarError(Exception):
    """A tar that is not whole; the message is the reason."""


class TarMember(NamedTuple):
    """One member."""

    name: str
    offset: int
    """Of its content, in bytes."""
    size: int
    fault: str
    """Why it may not be read; empty where it may."""


class _Window:
    """A file read at growing places, some headers at a time."""

    def __init__(self, file: BinaryIO) -> None:
        self._descriptor, self._start, self._data = file.fileno(), 0, b""

    def read(self, offset: int, size: int) -> bytes:
        at = offset - self._start
        if not 0 <= at <= len(self._data) - size:
            self._start, self._data, at = offset, os.pread(self._descriptor, max(size, _WINDOW), offset), 0
        return self._data[at : at + size]


def tar_members(file: BinaryIO, size: int) -> Iterator[TarMember]:
    """Yield the files of a tar in their order; folders are left out.

    Raises:
        DamagedTarError: it is cut off, its headers are damaged, or something follows its end mark.
    """
    plain = plain_members(file, size)
    return any_members(file, size) if plain is None else (TarMember(*member, "") for member in plain)


def any_members(file: BinaryIO, size: int) -> Iterator[TarMember]:
    """Yield what ``tar_members`` does, header by header, whatever the tar holds."""
    window, at = _Window(file), 0
    names: dict[str, str] = {}
    everywhere: dict[str, str] = {}
    while True:
        block = window.read(at, _BLOCK)
        if len(block) < _BLOCK:
            raise DamagedTarError("tar is cut off: it has no end mark")
        if block == _ZEROS:
            return _check_end(window, at, size)
        content, kind = at + _BLOCK, block[156:157]
        length = _checked_size(block)
        if kind in b"xgLK" and kind != b"\0":
            if length > _MAX_EXTENDED:
                raise DamagedTarError("tar has a damaged header")
            data = window.read(content, length)
            if len(data) < length:
                raise DamagedTarError("tar is cut off within a member")
            if kind == b"L":
                names["path"] = data.rstrip(b"\0").decode("utf-8", "surrogateescape")
            elif kind != b"K":
                (everywhere if kind == b"g" else names).update(_pax(data))
        else:
            told = everywhere | names if everywhere else names
            if "size" in told:
                length = _number(told["size"])
            name = told.get("path") or _name(block)
            is_folder = kind == b"5" or (kind in _REGULAR and name.endswith("/"))
            has_content = kind in _REGULAR or kind == b"S"
            length = length if has_content else 0
            if content + length > size:
                raise DamagedTarError("tar is cut off within a member")
            if not is_folder:
                yield TarMember(name, content, length, _fault(name, kind, told))
            names = {}
        at = content + -(-length // _BLOCK) * _BLOCK


def _fault(name: str, kind: bytes, told: dict[str, str]) -> str:
    if kind == b"S" or any(key.startswith("GNU.sparse") for key in told):
        return "member is a sparse file"
    if kind not in _REGULAR:
        return f"member is {_KINDS.get(kind, 'of an unknown kind')}, not a file"
    if name.startswith(("/", "\\")) or ".." in name.replace("\\", "/").split("/"):
        return "member's name leaves the tar"
    return ""


def _checked_size(block: bytes) -> int:
    """Return the size that a header tells, its checksum compared."""
    told = _octal(block[148:156])
    if told != sum(block) - sum(block[148:156]) + 256:
        raise DamagedTarError("tar has a damaged header")
    field = block[124:136]
    if field[0] & 0x80:  # GNU's binary form, for 8 GiB and more
        return int.from_bytes(field, "big") & ((1 << 95) - 1)
    return _octal(field)


def _octal(field: bytes) -> int:
    digits = field.strip(b" \0") or b"0"
    if not digits.isdigit() or max(digits) > ord("7"):  # ``int`` takes signs: a size < 0 would lead in a circle
        raise DamagedTarError("tar has a damaged header")
    return int(digits, 8)


def _name(block: bytes) -> str:
    name = block[:100].partition(b"\0")[0]
    prefix = block[345:500].partition(b"\0")[0] if block[257:263] == b"ustar\0" else b""
    return (prefix + b"/" + name if prefix else name).decode("utf-8", "surrogateescape")


def _pax(data: bytes) -> dict[str, str]:
    """Return the records ``LENGTH KEY=VALUE`` of an extended header."""
    found, at = {}, 0
    while at < len(data) and data[at]:
        head, _, _ = data[at : at + 20].partition(b" ")
        length = _number(head.decode("latin-1"))
        key, equals, value = data[at + len(head) + 1 : at + length - 1].partition(b"=")
        if not equals or not length:
            raise DamagedTarError("tar has a damaged header")
        found[key.decode("utf-8", "replace")] = value.decode("utf-8", "surrogateescape")
        at += length
    return found


def _number(text: str) -> int:
    if not (text.isascii() and text.isdigit()):
        raise DamagedTarError("tar has a damaged header")
    return int(text)


def _check_end(window: _Window, at: int, size: int) -> None:
    while at < size:
        data = window.read(at, min(_WINDOW, size - at))
        if data.count(0) != len(data) or not data:
            raise DamagedTarError("tar has data after its end mark, as tars that are strung together have")
        at += len(data)
