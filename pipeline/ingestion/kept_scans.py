"""What adopted tars held when they were read, kept beside the manifest: only new and changed ones are read again.

A tar is known by where it lies, its size, its stamp and all settings that its reading depends on. The disk is not
waited for: the note of a tar, written last, has the CRC-32 of its files, and a tar without whole ones is read anew.
"""

from __future__ import annotations

import hashlib
import json
import zlib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pipeline.contracts import TaskSpec
from pipeline.ingestion.config import DataConfig
from pipeline.ingestion.shards import replace_file
from pipeline.ingestion.source_file import SourceFile
from pipeline.json_text import parse_json

FOLDER = ".scans"
FORMAT = 1
"""Raised when equal tars would give other files."""
TAR_FILES = ("rows", "places", "rejects", "known")
_SETTINGS = {"task_field", "id_field", "time_field", "columns", "windows"}


def place_of(
    folder: Path, source: SourceFile, config: DataConfig, tasks: Sequence[TaskSpec], *others: str | None
) -> Path:
    """Return where a tar's files are kept, without their suffixes; ``others`` is what else they depend on."""
    settings = config.model_dump(mode="json", include=_SETTINGS)
    specs = [task.model_dump(mode="json") for task in tasks]
    told = json.dumps([FORMAT, asdict(source), settings, specs, others], sort_keys=True)
    return folder / FOLDER / hashlib.sha256(told.encode()).hexdigest()[:32]


def take(kept: Path, files: Mapping[str, Path]) -> dict[str, Any] | None:
    """Copy what is kept of a tar to its files and return what was noted of it; None where it is not there, or torn."""
    try:
        note: dict[str, Any] = parse_json(kept.with_suffix(".json").read_bytes())
        contents = {name: kept.with_suffix(f".{name}").read_bytes() for name in files}
        checksums = note.pop("crc32")
    except (OSError, ValueError, KeyError):
        return None
    if checksums != {name: zlib.crc32(data) for name, data in contents.items()}:
        return None
    for name, path in files.items():
        path.write_bytes(contents[name])
    return note


def keep(kept: Path, files: Mapping[str, Path], note: Mapping[str, Any]) -> None:
    """Keep the files of a tar, and what is to be noted of it."""
    kept.parent.mkdir(exist_ok=True)
    contents = {name: path.read_bytes() for name, path in files.items()}
    for name, data in contents.items():
        replace_file(kept.with_suffix(f".{name}"), data)
    checksums = {name: zlib.crc32(data) for name, data in contents.items()}
    replace_file(kept.with_suffix(".json"), json.dumps({**note, "crc32": checksums}).encode())


def drop_others(folder: Path, kept: Collection[Path]) -> None:
    """Delete what is kept of other tars than these."""
    names = {path.name for path in kept}
    for path in (folder / FOLDER).iterdir() if (folder / FOLDER).is_dir() else ():
        if path.stem not in names:
            path.unlink(missing_ok=True)
