"""A folder on object storage and a process's working copy of it, for machines that share no disk.

Objects appear whole. A file's object is sent after those of everything it may speak of: JSON after tensors and tables,
what lies deeper first, and the file that says that a folder is whole behind the others in it; so whoever finds the last
finds all. What is gone here is deleted there after that. Names that begin with a dot stay where they are unless they
are asked for by name.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar

from filelock import FileLock
from platformdirs import user_cache_path

from pipeline.contracts import write_atomic
from pipeline.json_text import parse_json
from pipeline.retry import PATIENCE_S, persistently
from pipeline.storage import exists, filesystem, stamp_of

T = TypeVar("T")
_INDEX = ".mirror.json"
"""In the working copy: name → version of the object, and size and time of the file, when both were last alike."""
_AT_ONCE = 8
"""Objects that are sent or fetched side by side."""
_LAST = ("manifest.json", "predictor.json", "adapter_config.json", "serving.json")
"""Names of the files that say that their folder is whole."""


def working_folder(url: str) -> Path:
    """Return where this machine keeps its copy of a folder: in ``MTL_LORA_CACHE`` or the user's cache folder."""
    name = f"{PurePosixPath(url).name}-{hashlib.sha256(url.encode()).hexdigest()[:12]}"
    return (Path(os.environ.get("MTL_LORA_CACHE") or user_cache_path("mtl-lora")) / "runs" / name).resolve()


class Mirror:
    """A folder on object storage and one working copy of it; one process at a time uses a copy.

    What was changed here alone goes there with :meth:`push`, what was changed there comes here with :meth:`pull`;
    where both were, what is there wins.

    Args:
        url: of the folder, which need not be there yet.
        folder: the working copy, likewise.
        patience_s: how long storage that does not answer is asked again.
    """

    def __init__(self, url: str, folder: Path, patience_s: float = PATIENCE_S) -> None:
        self.url, self.folder, self.patience_s = url.rstrip("/"), Path(folder), patience_s

    def pull(self, under: str = "") -> None:
        """Fetch what is new or changed there, and delete what is gone there and was not changed here.

        Args:
            under: a file or folder in the folder; all of it by default.

        Raises:
            InputError: storage does not answer for ``patience_s``, or refuses.
        """
        known, there = self._index(), self._there(under)
        new = [name for name, stamp in there.items() if not self._is_alike(known.get(name), name, stamp)]
        for name, entry in self._in_order(self._fetched, new):
            known[name] = entry
        for name in [name for name in known if _is_under(name, under) and name not in there]:
            if (path := self.folder / name).is_file() and self._state(path) == known[name][1:]:
                path.unlink()
            del known[name]
        self._write_index(known)

    def push(self, under: str = "") -> None:
        """Send what is new or changed here, and delete there what was here and is no more.

        Args:
            under: as of :meth:`pull`.

        Raises:
            InputError: storage does not answer for ``patience_s``, or refuses.
        """
        known, here = self._index(), self._here(under)
        new = [name for name in here if known.get(name, [None])[1:] != self._state(self.folder / name)]
        gone = [name for name in known if _is_under(name, under) and not (self.folder / name).is_file()]
        try:
            for name, entry in self._in_order(self._sent, new):
                known[name] = entry
            for name in sorted(gone, key=_order, reverse=True):  # first what speaks of the others
                self.remove(name)
                del known[name]
        finally:
            self._write_index(known)

    def put(self, name: str) -> None:
        """Send one file, whatever its name."""
        self._sent(name)

    def fetch(self, name: str) -> bool:
        """Fetch one file, whatever its name; return whether it is there. Where it is not, it is not here either."""
        fs, root = filesystem(self.url)
        if self._patiently(name, lambda: exists(fs, f"{root}/{name}")):
            self._fetched(name)
            return True
        (self.folder / name).unlink(missing_ok=True)
        return False

    def remove(self, name: str) -> None:
        """Delete one object, there or not."""
        fs, root = filesystem(self.url)
        path = f"{root}/{name}"
        self._patiently(name, lambda: fs.rm_file(path) if exists(fs, path) else None)

    def names(self, under: str) -> list[str]:
        """Return the names of the objects under a folder, in order, those with dots too."""
        fs, root = filesystem(self.url)
        found = self._patiently(under, lambda: fs.find(f"{root}/{under}"))
        return sorted(str(path)[len(root) + 1 :] for path in found)

    def _there(self, under: str) -> dict[str, str]:
        fs, root = filesystem(self.url)
        asked = f"{root}/{under}".rstrip("/")
        found = self._patiently(under, lambda: fs.find(asked, detail=True))
        stamps = {path[len(root) + 1 :]: stamp_of(info) for path, info in found.items()}
        return {name: stamp for name, stamp in stamps.items() if not _is_hidden(name, under)}

    def _here(self, under: str) -> set[str]:
        place = self.folder / under
        paths = [place] if place.is_file() else place.rglob("*")
        names = {path.relative_to(self.folder).as_posix() for path in paths if path.is_file()}
        return {name for name in names if not _is_hidden(name, under)}

    def _is_alike(self, known: list[Any] | None, name: str, stamp: str) -> bool:
        return known is not None and known[0] == stamp and (self.folder / name).is_file()

    def _fetched(self, name: str) -> list[Any]:
        fs, root = filesystem(self.url)
        path = self.folder / name
        part = path.with_name(f".{path.name}.part")
        path.parent.mkdir(parents=True, exist_ok=True)

        def fetch() -> str:
            info = fs.info(f"{root}/{name}")
            fs.get_file(f"{root}/{name}", str(part))
            if part.stat().st_size != info["size"]:
                raise OSError(f"{info['size']} bytes were announced, {part.stat().st_size} came")
            return stamp_of(info)

        stamp = self._patiently(name, fetch)
        part.replace(path)
        return [stamp, *self._state(path)]

    def _sent(self, name: str) -> list[Any]:
        fs, root = filesystem(self.url)
        path, state = f"{root}/{name}", self._state(self.folder / name)

        def send() -> str:
            if fs.protocol == "file" or "file" in fs.protocol:
                fs.makedirs(str(PurePosixPath(path).parent), exist_ok=True)
            fs.put_file(str(self.folder / name), path)
            return stamp_of(fs.info(path))

        return [self._patiently(name, send), *state]

    def _in_order(self, act: Callable[[str], list[Any]], names: Iterable[str]) -> Iterable[tuple[str, list[Any]]]:
        with ThreadPoolExecutor(_AT_ONCE) as pool:
            for _, alike in itertools.groupby(sorted(names, key=_order), key=lambda name: _order(name)[:3]):
                group = list(alike)
                yield from zip(group, pool.map(act, group), strict=True)

    def _patiently(self, name: str, action: Callable[[], T]) -> T:
        return persistently(action, f"{self.url}/{name}", self.patience_s)

    @staticmethod
    def _state(path: Path) -> list[int]:
        found = path.stat()
        return [found.st_size, found.st_mtime_ns]

    def _index(self) -> dict[str, list[Any]]:
        path = self.folder / _INDEX
        known: dict[str, list[Any]] = parse_json(path.read_text()) if path.is_file() else {}
        return known

    def _write_index(self, known: dict[str, list[Any]]) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        write_atomic(self.folder / _INDEX, json.dumps(known))


@dataclass(frozen=True)
class SharedFolder:
    """A folder within a mirrored one, named so that a process on any machine finds it.

    Args:
        url: of the mirrored folder.
        under: the folder's place in it.
    """

    url: str
    under: str

    def here(self) -> Path:
        """Return this machine's copy, fetched anew where it is not whole; processes of a machine take turns."""
        folder = working_folder(self.url) / "shared"
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder.with_name(".shared.lock")):
            Mirror(self.url, folder).pull(self.under)
        return folder / self.under


def here(folder: Path | SharedFolder) -> Path:
    """Return a folder on this machine."""
    return folder.here() if isinstance(folder, SharedFolder) else folder


def _order(name: str) -> tuple[bool, int, bool, str]:
    path = PurePosixPath(name)
    return path.suffix in ("", ".json"), -len(path.parts), path.name in _LAST, name


def _is_under(name: str, under: str) -> bool:
    return not under or name == under or name.startswith(f"{under.rstrip('/')}/")


def _is_hidden(name: str, under: str) -> bool:
    """Whether a part of a name behind the one that was asked for begins with a dot."""
    rest = PurePosixPath(name).relative_to(under) if under else PurePosixPath(name)
    return any(part.startswith(".") for part in rest.parts)
