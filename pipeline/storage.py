"""Where data lies: local paths and URLs of the schemes in :mod:`pipeline.schemes`, through fsspec; nothing else opens.

Command URLs (``pipe:``), chained URLs (``zip::…``) and every other protocol are refused, so that no name that comes
from outside can run a command.
"""

from __future__ import annotations

import os
import posixpath
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipeline.errors import InputError, masked
from pipeline.schemes import REMOTE, SCHEMES, WRITABLE, scheme_of

_ENVIRONMENT = {
    "s3": {
        "endpoint_url": "AWS_ENDPOINT_URL",
        "key": "AWS_ACCESS_KEY_ID",
        "secret": "AWS_SECRET_ACCESS_KEY",
        "token": "AWS_SESSION_TOKEN",
    },
    "gs": {"endpoint_url": "STORAGE_EMULATOR_HOST", "project": "GOOGLE_CLOUD_PROJECT"},
    "az": {
        "connection_string": "AZURE_STORAGE_CONNECTION_STRING",
        "account_name": "AZURE_STORAGE_ACCOUNT_NAME",
        "account_key": "AZURE_STORAGE_ACCOUNT_KEY",
        "sas_token": "AZURE_STORAGE_SAS_TOKEN",
    },
    "hf": {"endpoint": "HF_ENDPOINT", "token": "HF_TOKEN"},
}
"""Scheme → option of its file system → variable. Named here, though the packages know most of them, since fsspec gives
out one instance for equal options, whatever the environment says now."""
_VERSIONS = ("ETag", "etag", "blob_id", "mtime", "LastModified", "last_modified", "Last-Modified", "size")
"""What storage may call a file's version, the surest first."""


def is_remote(url: str | Path) -> bool:
    """Whether a location is a URL, not a local path."""
    return scheme_of(url) is not None


def check_location(url: str | Path) -> str:
    """Return a local path or URL as text, with ``file://`` and ``~`` taken off.

    Raises:
        InputError: another protocol, a command or a chained URL.
    """
    text = str(url)
    head = text.split(":", 1)[0]
    protocol = head if ":" in text and "/" not in head and len(head) > 1 else ""
    if "::" in text or text.lstrip().startswith(("|", "!")) or protocol not in ("", "file", *SCHEMES):
        raise InputError(
            f"a data location must be a local path or a URL of {REMOTE}, got {masked(text)!r}; commands, chained URLs "
            "and other protocols are never opened: copy the data to a folder or a bucket"
        )
    if protocol == "https" and (any(sign in text for sign in "?#") or "@" in text.split("/")[2]):
        raise InputError(
            "an https:// location must be an address alone, without a query and without credentials, which would be "
            f"kept with the data, got {masked(text.split('?')[0])!r}; put credentials into ~/.netrc, or copy the file"
        )
    if protocol == "file":
        return text.removeprefix("file://")
    return text if protocol else str(Path(text).expanduser())


def check_target(url: str | Path, what: str) -> str:
    """Return a location that can be written to, as text.

    Args:
        url: location.
        what: is to be written there, for the error.

    Raises:
        InputError: it is read-only.
    """
    text = check_location(url)
    scheme = scheme_of(text)
    if scheme is not None and not scheme.is_writable:
        raise InputError(
            f"{what} must go to a folder or to a URL of {WRITABLE}, {text!r} can only be read; name one of those"
        )
    return text


def filesystem(url: str | Path) -> tuple[Any, str]:
    """Return the fsspec filesystem of a checked location and the path within it.

    Endpoints and credentials come from the environment's usual variables, else from the machine's role or login.

    Raises:
        InputError: the location is not one that is opened, its package is not installed, there is no account, or it
            lies on the Hugging Face Hub while that is refused.
    """
    import fsspec

    text = check_location(url)
    scheme = scheme_of(text)
    if scheme is None:
        return fsspec.filesystem("file"), text
    name = text.partition("://")[0]
    try:
        return _remote(name, text)
    except InputError:
        raise
    except ValueError as error:  # as adlfs says that it knows no account
        raise InputError(
            f"{name}:// locations need credentials that open them, those at hand do not: {masked(str(error))}; got "
            f"{text!r}; check {scheme.credentials}"
        ) from error
    except ImportError as error:
        raise InputError(
            f"{name}:// locations need the package {scheme.package}, which does not load ({error}); got {text!r}; "
            f"run: pip install 'mtl-lora[{scheme.extra}]'"
        ) from error


def _remote(name: str, text: str) -> tuple[Any, str]:
    import fsspec

    if name == "https":
        from pipeline.https_files import HttpsFiles

        # Sizes and ranges are those of the bytes as they lie there; proxies and netrc are the environment's.
        return HttpsFiles(client_kwargs={"trust_env": True, "headers": {"Accept-Encoding": "identity"}}), text
    known = _ENVIRONMENT["az" if name.startswith("abfs") else name]
    options = {option: value for option, variable in known.items() if (value := os.environ.get(variable))}
    if name == "s3":  # as always: also what is not set is named
        options = {option: os.environ.get(variable) for option, variable in known.items()}  # type: ignore[misc]
        return fsspec.filesystem("s3", use_listings_cache=False, **options), text.removeprefix("s3://")
    if name == "hf":
        _check_online(text)
    kind = fsspec.get_filesystem_class(name)
    fs = kind(use_listings_cache=False, **{**options, **kind._get_kwargs_from_urls(text)})
    return fs, str(kind._strip_protocol(text))


def _check_online(text: str) -> None:
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        raise InputError(
            f"hf:// locations need the Hugging Face Hub, which HF_HUB_OFFLINE refuses; got {text!r}; unset it, or "
            "download the files and name their folder"
        )


def url_of(location: str, path: str) -> str:
    """Return the location of a path that a filesystem found, written as the location it was found by."""
    if scheme_of(location) is None or "://" in path:
        return path
    scheme, _, rest = location.partition("://")
    return f"{scheme}://{rest.partition('/')[0]}/{path.partition('/')[2]}"


def exists(fs: Any, path: str) -> bool:
    """Whether there is a file or folder; storage that does not answer is no answer, and its error comes through."""
    try:
        fs.info(path)
    except FileNotFoundError:
        return False
    return True


def stamp_of(info: Mapping[str, Any]) -> str:
    """Return what storage says of a file's version: its ETag, else the time of its last change, else its size."""
    return next((found for name in _VERSIONS if (found := str(info.get(name) or "").strip('"'))), "0")


def join(root: str | Path, *parts: str) -> str:
    """Return a location under another one.

    Raises:
        InputError: a part is absolute or climbs out of the root.
    """
    for part in parts:
        if part.startswith(("/", "\\")) or ".." in part.replace("\\", "/").split("/") or ":" in part:
            raise InputError(f"a path within {str(root)!r} must stay inside it, got {part!r}; use a relative path")
    return posixpath.join(str(root), *parts)
