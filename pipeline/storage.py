"""Where data lies: local paths and ``s3://`` URLs, through fsspec. Nothing else is opened.

Command URLs (``pipe:``), chained URLs (``zip::…``) and every other protocol are refused, so that no name that comes
from outside can run a command or reach another machine.
"""

from __future__ import annotations

import os
import posixpath
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipeline.errors import InputError

PROTOCOLS = ("file", "s3")


def is_remote(url: str | Path) -> bool:
    """Whether a location lies on S3."""
    return str(url).startswith("s3://")


def check_location(url: str | Path) -> str:
    """Return a local path or ``s3://`` URL as text, with ``file://`` and ``~`` taken off.

    Raises:
        InputError: another protocol, a command or a chained URL.
    """
    text = str(url)
    head = text.split(":", 1)[0]
    protocol = head if ":" in text and "/" not in head and len(head) > 1 else ""
    if "::" in text or text.lstrip().startswith(("|", "!")) or protocol not in ("", *PROTOCOLS):
        raise InputError(
            f"a data location must be a local path or an s3:// URL, got {text!r}; commands, chained URLs and other "
            "protocols are never opened: copy the data to a folder or a bucket"
        )
    if protocol == "file":
        return text.removeprefix("file://")
    return text if protocol == "s3" else str(Path(text).expanduser())


def filesystem(url: str | Path) -> tuple[Any, str]:
    """Return the fsspec filesystem of a checked location and the path within it.

    S3 takes its endpoint and credentials from the usual ``AWS_*`` environment variables, else from the machine's role.

    Raises:
        InputError: the location is none of :data:`PROTOCOLS`, or S3's package is not installed.
    """
    import fsspec

    text = check_location(url)
    if is_remote(text):
        # Named here too, since fsspec gives out one instance for equal arguments, whatever the environment says now.
        options = {
            "endpoint_url": os.environ.get("AWS_ENDPOINT_URL"),
            "key": os.environ.get("AWS_ACCESS_KEY_ID"),
            "secret": os.environ.get("AWS_SECRET_ACCESS_KEY"),
            "token": os.environ.get("AWS_SESSION_TOKEN"),
        }
        try:
            return fsspec.filesystem("s3", use_listings_cache=False, **options), text.removeprefix("s3://")
        except ImportError as error:
            raise InputError(
                f"s3:// locations need the package s3fs, which does not load ({error}); got {text!r}; "
                "run: pip install 'mtl-lora[s3]'"
            ) from error
    return fsspec.filesystem("file"), text


def stamp_of(info: Mapping[str, Any]) -> str:
    """Return what storage says of a file's version: its ETag, else the time of its last change, else its size."""
    etag = str(info.get("ETag") or "").strip('"')
    return etag or str(info.get("mtime") or info.get("LastModified") or info["size"])


def join(root: str | Path, *parts: str) -> str:
    """Return a location under another one.

    Raises:
        InputError: a part is absolute or climbs out of the root.
    """
    for part in parts:
        if part.startswith(("/", "\\")) or ".." in part.replace("\\", "/").split("/") or ":" in part:
            raise InputError(f"a path within {str(root)!r} must stay inside it, got {part!r}; use a relative path")
    return posixpath.join(str(root), *parts)
