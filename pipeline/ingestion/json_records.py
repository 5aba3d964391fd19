"""Records out of JSON: one object a line, or the elements of one array, in bounded memory."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from pipeline.ingestion.source_file import MAX_LINE_BYTES, Line
from pipeline.json_text import parse_json

_CHUNK = 1 << 20
_OUTSIDE, _INSIDE = re.compile(rb'["{}\[\],]'), re.compile(rb'["\\]')
"""What counts outside of a string and within one."""
_BOM = b"\xef\xbb\xbf"
_BEFORE_VALUES = (b'":', b" :", b"\t:", b"\r:")
"""One of these stands between each key of a line of JSON and its value, and perhaps elsewhere."""


def is_array(stream: Any) -> bool:
    """Whether a JSON file is one array, by its first sign; the stream is then back at its start."""
    head = b""
    while not head.removeprefix(_BOM).strip() and (more := stream.read(1024)):
        head += more
    stream.seek(0)
    return head.removeprefix(_BOM).lstrip().startswith(b"[")


def json_array(stream: Any) -> Iterator[Line]:
    """Yield the elements of a JSON array; ones that are no objects, or too long, come with their error.

    Raises:
        EOFError, OSError: the array has no end, or something follows it.
    """
    for number, element in enumerate(_elements(stream), 1):
        if element is None:
            yield Line(number, number, {}, f"record is longer than {MAX_LINE_BYTES} bytes")
        else:
            yield json_line(number, number, element, "record")


def _elements(stream: Any) -> Iterator[bytes | None]:
    """Yield the bytes of each element of an array, cut at its commas without being read; None for a longer one."""
    depth, in_string, skip = 0, False, 0
    kept, is_long, found = bytearray(), False, 0
    while chunk := stream.read(_CHUNK):
        begin, at = 0, skip
        skip = 0
        while match := (_INSIDE if in_string else _OUTSIDE).search(chunk, at):
            at, sign = match.end(), match[0]
            if in_string:
                in_string = sign == b"\\"
                at += in_string  # whatever follows a backslash ends no string
            elif sign == b'"':
                in_string = True
            elif sign in b"{[":
                depth += 1
                if depth == 1:  # what comes before the array is none of its elements
                    kept, begin = bytearray(), at
            elif sign in b"}]":
                depth -= 1
            if not in_string and ((sign == b"," and depth == 1) or (sign in b"}]" and depth == 0)):
                kept += chunk[begin : at - 1]
                if depth or found or kept.strip():
                    found += 1
                    yield None if is_long or len(kept) > MAX_LINE_BYTES else bytes(kept)
                kept, is_long, begin = bytearray(), False, at
                if not depth:
                    return _check_end(chunk[at:], stream)
        skip = max(at - len(chunk), 0)
        kept += b"" if is_long else chunk[begin:]
        if len(kept) > MAX_LINE_BYTES:
            kept, is_long = bytearray(), True
    raise EOFError("the array has no end")


def _check_end(rest: bytes, stream: Any) -> None:
    while not rest.strip() and (rest := stream.read(_CHUNK)):
        pass
    if rest.strip():
        raise OSError("something follows the end of the array")


def json_line(number: int, place: int, line: bytes, what: str = "line") -> Line:
    """Return the record that some bytes hold, or what is wrong with them; ``what`` names them."""
    try:
        record = parse_json(line)
    except ValueError:
        return Line(number, place, {"raw": line[:200].decode("utf-8", "replace")}, f"{what} is not JSON")
    if not isinstance(record, dict):
        return Line(number, place, {"raw": line[:200].decode("utf-8", "replace")}, f"{what} is not a JSON object")
    if line.count(b":") != len(record) and sum(map(line.count, _BEFORE_VALUES)) != len(record):
        try:  # more colons than keys: they stand in texts, or a key came twice
            parse_json(line, object_pairs_hook=_without_doubles)
        except _DoubleKeyError:
            return Line(number, place, {"raw": line[:200].decode("utf-8", "replace")}, f"{what} has a key twice")
    return Line(number, place, record)


class _DoubleKeyError(Exception):
    pass


def _without_doubles(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    record = dict(pairs)
    if len(record) != len(pairs):
        raise _DoubleKeyError
    return record
