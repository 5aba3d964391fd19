"""Which encoding a text file is in: told, or certain by its bytes. None is guessed.

UTF-8, UTF-16 and UTF-32 are known by their bytes. In one byte a sign any file can be read in many encodings, and none
of them fails: statistical detectors were right for about half of short Western and Eastern European samples. So such a
file is refused until its encoding is told, with the ways in which it can be read.
"""

from __future__ import annotations

import codecs
import io
import re
from typing import Any

from pipeline.errors import InputError

HEAD_BYTES = 64 << 10
"""Beginning of a file by which its encoding is found."""
_MARKS = {
    codecs.BOM_UTF8: "utf-8",
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}
_WIDE = ("utf-16-le", "utf-16-be", "utf-32-le", "utf-32-be")
_SIGNS = frozenset("\n\r,;\t|{")
"""One of these stands in every table and in every line of JSON."""
_READINGS = ("cp1252", "cp1250", "cp1251", "iso8859-2", "koi8-r", "cp850", "mac-roman", "gb18030", "shift_jis")
"""Encodings in use in which a refused file's words are shown, the most frequent ones first."""
_BEYOND_ASCII = re.compile(rb"[A-Za-z]{0,12}[\x80-\xff][A-Za-z\x80-\xff]{0,15}")
_CHUNK = 1 << 16


def text_encoding(head: bytes, told: str, name: str, key: str) -> str:
    """Return the encoding of a file.

    Args:
        head: its first ``HEAD_BYTES``, or what it has.
        told: a name of Python's; ``utf-8`` for one that is known by its bytes, else UTF-8, whatever its bytes;
            ``auto`` the same, but what is no UTF-8 is refused.
        name: of the file, for errors.
        key: of the configuration that tells the encoding.

    Raises:
        InputError: it can be read in several encodings.
    """
    if told != "auto" and codecs.lookup(told).name != "utf-8":
        return told
    known = next((encoding for mark, encoding in _MARKS.items() if head.startswith(mark)), None) or _wide(head)
    if known is not None or told != "auto":
        return known or "utf-8"
    try:
        codecs.getincrementaldecoder("utf-8")().decode(head)
    except UnicodeDecodeError:
        raise InputError(
            f"{key} auto must find UTF-8, UTF-16 or UTF-32 in {name}, found none of them{readings(head)}; name the "
            f"encoding: {key}"
        ) from None
    return "utf-8"


def _wide(head: bytes) -> str | None:
    """Return which UTF-16 or UTF-32 a text without a mark is in, None where it is in none or in more than one."""
    if b"\0" not in head:  # no table and no JSON has it in another encoding
        return None
    fitting = []
    for encoding in _WIDE:
        try:
            text = codecs.getincrementaldecoder(encoding)().decode(head, final=len(head) < HEAD_BYTES)
        except UnicodeDecodeError:
            continue
        if "\0" not in text and not _SIGNS.isdisjoint(text):
            fitting.append(encoding)
    return fitting[0] if len(fitting) == 1 else None


def readings(head: bytes) -> str:
    """Return in words how the first words beyond ASCII read in several encodings, to follow an error."""
    found = _BEYOND_ASCII.search(head)
    if found is None:
        return ""
    shown: dict[str, list[str]] = {}
    for encoding in _READINGS:
        try:
            text = found[0].decode(encoding)
        except UnicodeDecodeError:
            continue
        if text.isprintable():
            shown.setdefault(text, []).append(encoding)
    words = ", ".join(f"{text!r} in {' and '.join(names)}" for text, names in list(shown.items())[:5])
    return f": {found[0]!r} is {words}" if words else ""


def is_wide(encoding: str) -> bool:
    """Whether a sign takes two bytes at least: there is no telling where the next one begins after a bad one."""
    return codecs.lookup(encoding).name.startswith(("utf-16", "utf-32"))


def codec_of(encoding: str) -> str:
    """Return the codec that reads an encoding, a byte order mark being no part of the text."""
    return "utf-8-sig" if codecs.lookup(encoding).name == "utf-8" else encoding


def undecodable(name: str, encoding: str, key: str, error: Exception) -> InputError:
    """Return the error for a file that is not in the encoding that it was taken for."""
    return InputError(f"{name} must be text in {key} {encoding}, it is not: {error}; name its own encoding: {key}")


class AsUtf8(io.RawIOBase):
    """A text file in another encoding, read as UTF-8; what a narrow encoding cannot read stays as it is, no UTF-8.

    Args:
        file: in binary; read from its start on, wherever it stands.
        encoding: that it is in.

    Raises:
        UnicodeDecodeError: on reading, what is no text in a wide encoding.
    """

    def __init__(self, file: Any, encoding: str) -> None:
        self._file, self._encoding = file, encoding
        self.seek(0)

    def readable(self) -> bool:
        """Whether it can be read."""
        return True

    def seekable(self) -> bool:
        """Whether it can be read again."""
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Go to the start; there is no other place that is known."""
        if offset or whence:
            raise io.UnsupportedOperation("only the start of a decoded file can be sought")
        self._file.seek(0)
        self._decoder = codecs.getincrementaldecoder(codec_of(self._encoding))(
            "strict" if is_wide(self._encoding) else "surrogateescape"
        )
        self._left = b""
        return 0

    def readinto(self, buffer: Any) -> int:
        """Fill a buffer; fewer bytes only at the end."""
        while not self._left:
            data = self._file.read(_CHUNK)
            self._left = self._decoder.decode(data, final=not data).encode("utf-8", "surrogateescape")
            if not data and not self._left:
                return 0
        taken = self._left[: len(buffer)]
        self._left = self._left[len(taken) :]
        buffer[: len(taken)] = taken
        return len(taken)
