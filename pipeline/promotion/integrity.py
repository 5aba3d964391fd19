"""Whether files are those that were registered, byte for byte.

Stands alone: a packaged model carries this file and asks it before it loads.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

from pipeline.errors import InputError


def digests(folder: Path) -> dict[str, str]:
    """Return the sha256 of each file under a folder, by its path there."""
    return {path.relative_to(folder).as_posix(): _sha256(path) for path in sorted(folder.rglob("*")) if path.is_file()}


def check_files(folder: Path, expected: Mapping[str, str], whose: str) -> None:
    """Make sure that a folder's files are those that were registered.

    Args:
        folder: that is about to be loaded.
        expected: sha256 of each file by its path there; others beside them are not looked at.
        whose: the model in words.

    Raises:
        InputError: one is missing or another one.
    """
    for name, sha256 in expected.items():
        path = folder / name
        if not path.is_file():
            raise InputError(f"{whose} must have the files it was registered with, {name} is gone; restore it")
        if (found := _sha256(path)) != sha256:
            raise InputError(
                f"{whose} must have the files it was registered with, {name} was changed: its sha256 is {found[:12]}…, "
                f"{sha256[:12]}… was registered and evaluated; restore it, or name another version"
            )


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
