"""What a folder's files were when they were written: ``SHA256SUMS``, which ``sha256sum -c`` reads too.

A folder without it is an older one, and is taken as it is. Needs no torch.
"""

import hashlib
import os
import re
from pathlib import Path

from mtl_lora.errors import AdapterFileError

__all__ = ["HASHES_FILE", "check_hashes", "write_hashes"]

HASHES_FILE = "SHA256SUMS"
_LINE = re.compile(r"([0-9a-f]{64})  ([^/\\\x00-\x1f]+)")
_REMEDY = "copy the folder anew from where it was written, or write it again"


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # a name that no file can have
        return False


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _read(folder: Path) -> dict[str, str] | None:
    """Return the digests by file name, or None where the folder has none.

    Raises:
        AdapterFileError: the list cannot be read.
    """
    path = folder / HASHES_FILE
    try:
        lines = path.read_bytes().decode("ascii").split("\n")
    except FileNotFoundError:
        return None
    except (OSError, UnicodeDecodeError) as error:
        raise AdapterFileError(f"{path} must be readable text, got {error}; {_REMEDY}") from error
    found = [_LINE.fullmatch(line) for line in lines[:-1]]
    if lines[-1] or None in found or not found:
        raise AdapterFileError(f"{path} must hold lines of a sha256 and a file's name, got others; {_REMEDY}")
    return {match[2]: match[1] for match in found if match is not None}


def write_hashes(folder: str | os.PathLike[str], *names: str, written_in: Path | None = None) -> None:
    """List these files of a folder with their digests, in one step; those listed before stay, unless they are gone.

    Args:
        folder: whose files are listed.
        *names: of the files, written to the end.
        written_in: where files lie that are yet to be moved into the folder; the folder itself comes second.
    """
    target = Path(folder)
    try:
        before = _read(target) or {}
    except AdapterFileError:  # a damaged list is replaced; files that only it knew of become unlisted
        before = {}
    listed = {name: digest for name, digest in before.items() if _is_file(target / name)}
    for name in names:
        staged = None if written_in is None else written_in / name
        listed[name] = _digest(target / name if staged is None or not staged.is_file() else staged)
    text = "".join(f"{digest}  {name}\n" for name, digest in sorted(listed.items()))
    new = target / f".{HASHES_FILE}"
    new.write_text(text, encoding="ascii")
    new.replace(target / HASHES_FILE)


def check_hashes(folder: str | os.PathLike[str], *names: str) -> None:
    """Check that files are what they were when they were written.

    Args:
        folder: that holds the files; where it lists no digests, nothing is checked.
        *names: of the files that are about to be read; none: every file listed.

    Raises:
        AdapterFileError: the list is damaged, a listed file is gone, or one of these files differs.
    """
    source = Path(folder)
    listed = _read(source)
    if listed is None:
        return
    gone = sorted(name for name in listed if not _is_file(source / name))
    if gone:
        raise AdapterFileError(f"{source / gone[0]} must be there, for {HASHES_FILE} lists it; {_REMEDY}")
    for name in names or listed:
        if name in listed and (found := _digest(source / name)) != listed[name]:
            raise AdapterFileError(
                f"{source / name} must be as it was written, got sha256 {found[:12]}, expected {listed[name][:12]} "
                f"by {HASHES_FILE}; {_REMEDY}"
            )
