"""Tars as others write them."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import webdataset as wds

from pipeline.contracts import TaskSpec
from pipeline.ingestion import DataConfig
from tests.pipeline.made_images import image_bytes

SPAM = TaskSpec(name="spam", template="{txt}\nSpam:", label_words=(" no", " yes"), label_field="cls")
PNG, JPEG = image_bytes("PNG"), image_bytes("JPEG") + bytes(8)  # what follows an image's end is nobody's
_ENCODED = ("__key__", "txt", "json", "cls", "jpg")
Member = tuple[str, bytes]


def members_of(samples: Iterable[dict[str, Any]]) -> list[Member]:
    """Return the members of samples of ``__key__`` and contents by extension."""
    found = []
    for sample in samples:
        for extension, value in sample.items():
            if extension != "__key__":
                data = json.dumps(value) if isinstance(value, dict) else value
                data = data if isinstance(data, bytes) else str(data).encode()
                found.append((f"{sample['__key__']}.{extension}", data))
    return found


def write_tar(path: Path, members: Sequence[Member | tarfile.TarInfo], format_: int = tarfile.PAX_FORMAT) -> Path:
    """Write members as ``tar`` would, in the order given."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=format_) as tar:
        for member in members:
            if isinstance(member, tarfile.TarInfo):
                tar.addfile(member)
                continue
            info = tarfile.TarInfo(member[0])
            info.size, info.mtime, info.uname, info.uid = len(member[1]), 1.25, "somebody", 4711  # type: ignore[assignment]
            tar.addfile(info, io.BytesIO(member[1]))
    return path


def write_shards(pattern: Path, samples: Iterable[dict[str, Any]], maxcount: int) -> None:
    """Write samples by webdataset's own writer."""
    pattern.parent.mkdir(parents=True, exist_ok=True)
    with wds.ShardWriter(str(pattern), maxcount=maxcount, verbose=0) as writer:
        for sample in samples:
            # The writer encodes what it knows; fields of other names it takes as bytes.
            writer.write({k: v if k in _ENCODED else str(v).encode() for k, v in sample.items()})


def texts(count: int, start: int = 0) -> list[dict[str, Any]]:
    """Return samples of a text and a class."""
    return [{"__key__": f"{i:06d}", "txt": f"text number {i}", "cls": i % 2} for i in range(start, start + count)]


def tar_config(root: Path | str, files: dict[str, dict[str, str]] | None = None, **more: Any) -> DataConfig:
    """Return a configuration that adopts tars."""
    files = files or {"spam": {"train": "*.tar"}}
    return DataConfig.model_validate({"source": "webdataset", "root": str(root), "files": files, **more})
