"""Why a file gives no records as it stands: looked into only after it was refused."""

from __future__ import annotations

import codecs
import csv
import gzip
import io
import json
from collections.abc import Iterable, Sequence

from pipeline.ingestion.encodings import HEAD_BYTES, codec_of, readings, text_encoding
from pipeline.ingestion.source_file import SourceFile
from pipeline.json_text import parse_json
from pipeline.record import fields_found
from pipeline.storage import filesystem

_MARKS = (
    ((b"PAR1",), "a Parquet file; name it .parquet"),
    ((b"\x1f\x8b",), "compressed with gzip; name it .gz"),
    ((b"\x28\xb5\x2f\xfd",), "compressed with zstd; unpack it with zstd -d, or compress it with gzip"),
    ((b"BZh",), "compressed with bzip2; unpack it with bunzip2, or compress it with gzip"),
    ((b"\xfd7zXZ\0",), "compressed with xz; unpack it with unxz, or compress it with gzip"),
    ((b"PK\x03\x04",), "a zip archive or a spreadsheet; unpack it, or save it as CSV"),
)
_SEPARATORS = ";\t|"


def cause(source: SourceFile, wanted: Sequence[str] = ()) -> str:
    """Return in words what is wrong with a file as a whole, to follow an error; empty where nothing is to be seen.

    Args:
        source: the file.
        wanted: fields that records lack.
    """
    if source.is_synthetic or source.is_tar:
        return ""
    try:
        head = _in_utf8(head_of(source.location))
        seen = _kind(source.location, head)
        if seen:
            return f" (the file is {seen})"
        fields = field_names(source.location, head) if wanted else []
    except Exception:  # noqa: BLE001 - the file has been refused already, storage and parsers raise many kinds
        return ""
    if not fields or not set(wanted) - set(fields):
        return _encoding_asked(source.location, head)
    found = fields_found(fields, wanted)
    separator = next((c for c in _SEPARATORS if len(fields) == 1 and c in fields[0]), None)
    if separator is not None:
        found += (
            f"; its fields are separated by {separator!r}: write them with commas, or say data.csv.delimiter: "
            f"{json.dumps(separator)}"
        )
    return f" ({source.name}: {found})"


def missing_fields(reasons: Iterable[str], fields: Iterable[str]) -> list[str]:
    """Return which of a task's fields the reasons of rejection say to be missing."""
    reasons = list(reasons)
    return [field for field in fields if any(f"{field!r} is " in reason for reason in reasons)]


def field_names(location: str, head: bytes) -> list[str]:
    """Return the names of the fields that a file's head shows.

    Raises:
        OSError, ValueError, csv.Error: it shows none.
    """
    name = location.removesuffix(".gz")
    if name.endswith(".parquet"):
        import pyarrow.parquet as pq

        fs, path = filesystem(location)
        with fs.open(path, "rb") as raw:
            return list(pq.read_schema(raw).names)
    if name.endswith(".csv"):
        return next(csv.reader(io.StringIO(head.decode("utf-8-sig", "replace"))), [])
    for line in head.splitlines():
        if line.strip():
            record = parse_json(line)
            return list(record) if isinstance(record, dict) else []
    return []


def head_of(location: str) -> bytes:
    """Return the beginning of a file, unpacked."""
    fs, path = filesystem(location)
    with fs.open(path, "rb") as raw:
        is_packed = location.endswith(".gz") and raw.read(2) == b"\x1f\x8b"  # else it is only named so
        raw.seek(0)
        return bytes((gzip.GzipFile(fileobj=raw) if is_packed else raw).read(HEAD_BYTES))


def _in_utf8(head: bytes) -> bytes:
    encoding = text_encoding(head, "utf-8", "", "")
    if encoding == "utf-8":
        return head
    return codecs.getincrementaldecoder(codec_of(encoding))("replace").decode(head).encode()


def _encoding_asked(location: str, head: bytes) -> str:
    """Return in words how the text of a file that is no UTF-8 can be read, to follow an error."""
    name = location.removesuffix(".gz")
    key = {"csv": "data.csv.encoding", "json": "data.json_encoding", "jsonl": "data.json_encoding"}
    try:
        codecs.getincrementaldecoder("utf-8")().decode(head)
    except UnicodeDecodeError:
        ending = name.rpartition(".")[2]
        return f" (the file is not UTF-8{readings(head)}; name its encoding: {key[ending]})" if ending in key else ""
    return ""


def _kind(location: str, head: bytes) -> str:
    name = location.removesuffix(".gz")
    if name.endswith(".parquet"):
        return "" if head.startswith(b"PAR1") or not head else "not Parquet, by its first bytes"
    for marks, what in _MARKS:
        if head.startswith(marks):
            return what
    if head.count(b"\0") > len(head) // 4:
        return "no text: it is full of NUL bytes"
    if name.endswith(".csv") and head.removeprefix(b"\xef\xbb\xbf")[:4].lower() == b"sep=":
        return "CSV with a line sep= before its header; take that line out, and say data.csv.delimiter"
    if name.endswith((".jsonl", ".json")):
        text = head.lstrip(b"\xef\xbb\xbf \t\r\n")
        if text.startswith(b"[") and name.endswith(".json"):
            return ""
        if text.startswith(b"["):
            return "one JSON array; write one JSON object a line: jq -c '.[]', or name it .json"
        if text.split(b"\n", 1)[0].strip() == b"{":
            return "JSON over several lines; write one JSON object a line: jq -c ."
        if text and not text.startswith(b"{"):
            return "not JSON; a file with a header and commas is named .csv"
    return ""
