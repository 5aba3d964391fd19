"""Where data may lie: the schemes of URLs, what each needs to be installed, and what it can do."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Scheme:
    """One way in which storage is reached.

    Args:
        package: that fsspec's file system imports.
        extra: of this project that brings the package.
        credentials: where the package takes them from, in words that end an error.
        is_writable: shards and scores can be written there, each file whole or not at all.
        is_listed: the storage says what a folder holds.
    """

    package: str
    extra: str
    credentials: str
    is_writable: bool = True
    is_listed: bool = True


_AZURE = Scheme(
    "adlfs",
    "azure",
    "AZURE_STORAGE_CONNECTION_STRING, or AZURE_STORAGE_ACCOUNT_NAME with AZURE_STORAGE_ACCOUNT_KEY or "
    "AZURE_STORAGE_SAS_TOKEN, and the container's policy",
)
SCHEMES: Mapping[str, Scheme] = {
    "s3": Scheme("s3fs", "s3", "AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and the bucket's policy"),
    "gs": Scheme("gcsfs", "gcs", "GOOGLE_APPLICATION_CREDENTIALS and the bucket's policy"),
    "az": _AZURE,
    "abfs": _AZURE,
    "abfss": _AZURE,
    "hf": Scheme("huggingface_hub", "pipeline", "HF_TOKEN and the repository's gate", is_writable=False),
    "https": Scheme(
        "aiohttp", "pipeline", "the machine's netrc file and the server", is_writable=False, is_listed=False
    ),
}
"""Scheme → what is known of it. Local paths have none."""
REMOTE = ", ".join(f"{name}://" for name in SCHEMES)
WRITABLE = ", ".join(f"{name}://" for name, scheme in SCHEMES.items() if scheme.is_writable)


def scheme_of(url: str | Path) -> Scheme | None:
    """Return what is known of a location's scheme, None of a local path and of a scheme that is not opened."""
    name, mark, _ = str(url).partition("://")
    return SCHEMES.get(name) if mark else None
