"""The members of a sample in a tar that others wrote, read as one record.

A member ``KEY.EXTENSION`` holds the field EXTENSION; KEY ends at the first dot of the file's name, as in webdataset
(``tariterators.base_plus_ext``), folders included. What stands inside ``KEY.json`` are fields, too. Nothing is ever
unpickled.
"""

from __future__ import annotations

import functools
import re
import zlib
from collections.abc import Mapping
from typing import Any

from pydantic import TypeAdapter

from pipeline.contracts import TaskSpec
from pipeline.images import EXTENSIONS, MAX_BYTES
from pipeline.json_text import parse_json
from pipeline.record import Rejected

IMAGES = EXTENSIONS
PICKLES = ("pyd", "pkl", "pickle", "pth", "pt")
"""Extensions of members that can only be read by running what stands in them."""
MAX_IMAGE_BYTES = MAX_BYTES
_JSON: TypeAdapter[Any] = TypeAdapter(Any)
_NAME = re.compile(r"((?:.*/|)[^./][^./]*)[.]([^/]*)", re.DOTALL)


def split_name(name: str) -> tuple[str, str] | None:
    """Return key and lower-case extension of a member; None for what is no part of a sample (``README``, ``.hidden``,
    ``__meta__``)."""
    name = name.removeprefix("./")
    match = None if name.startswith("__") else _NAME.fullmatch(name)
    return (match[1], match[2].lower()) if match and match[2] else None


@functools.cache
def is_image(extension: str) -> bool:
    """Whether a member of this extension is an image: ``jpg``, ``left.jpg``."""
    return extension.rpartition(".")[2] in IMAGES


def image_checksums(members: Mapping[str, bytes]) -> dict[str, bytes]:
    """Return the CRC-32 of each image among a sample's members, by extension, as 4 bytes."""
    return {name: zlib.crc32(data).to_bytes(4, "little") for name, data in members.items() if is_image(name)}


def checksum_of(members: Mapping[str, bytes], checksums: Mapping[str, bytes]) -> int:
    """Return the CRC-32 of a sample's members in their order, of those in ``checksums`` by what stands there.

    What an image is told from others by is its own CRC-32, so that one of all bytes would read it a second time.
    """
    checksum = 0
    for extension, data in members.items():
        checksum = zlib.crc32(checksums.get(extension, data), checksum)
    return checksum


def record_of(members: Mapping[str, bytes]) -> dict[str, Any]:
    """Return the fields that a sample's members hold, by name.

    Text loses the line end at its end; images, and what is not UTF-8, stay bytes.

    Raises:
        Rejected: a ``json`` member is no JSON, or has a key for which there is a member, too.
    """
    record: dict[str, Any] = {}
    inside: dict[str, Any] = {}
    for extension, data in members.items():
        if extension == "json":
            value = _json(extension, data)
            if isinstance(value, dict):
                inside = value
            else:
                record[extension] = value
        elif is_image(extension):
            record[extension] = data
        elif extension.endswith(".json"):
            record[extension] = _json(extension, data)
        else:
            try:
                record[extension] = data.decode().rstrip("\r\n")
            except UnicodeDecodeError:
                record[extension] = data
    if not record or not inside:
        return record or inside
    if double := next((name for name in inside if name in record), None):
        raise Rejected(f"field {double!r} stands both inside json and in a member of its own")
    return record | inside


def _json(extension: str, data: bytes) -> Any:
    try:
        return _JSON.validate_json(data)  # several times as fast as json, and stricter
    except ValueError:
        pass
    try:
        return parse_json(data)
    except ValueError:
        raise Rejected(f"member {extension!r} is not JSON") from None


def image_of(record: Mapping[str, Any], spec: TaskSpec) -> bytes:
    """Return the image of a sample: its ``image_field``, or, where it has none of that name, its only image.

    Raises:
        Rejected: it has none or several, or the image is too large or of no known format.
    """
    data = record.get(spec.image_field or "")
    if not isinstance(data, bytes):
        found = [record[name] for name in IMAGES if isinstance(record.get(name), bytes)]
        if len(found) != 1:
            raise Rejected("sample has several images" if found else "image is missing")
        data = found[0]
    if len(data) > MAX_IMAGE_BYTES:
        raise Rejected(f"image is larger than {MAX_IMAGE_BYTES} bytes")
    if not (data.startswith((b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff")) or data[:4] + data[8:12] == b"RIFFWEBP"):
        raise Rejected("image is neither PNG, JPEG nor WebP")
    return data
