"""Python's own audit events tell what code does while an input is looked at, whoever does it."""

from __future__ import annotations

import contextlib
import os
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Any

_PROGRAMS = ("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.fork", "pty.spawn")
_PATHS = (
    "open",
    "os.mkdir",
    "os.rename",
    "os.remove",
    "os.rmdir",
    "os.symlink",
    "os.link",
    "os.chmod",
    "shutil.rmtree",
)
_CODE = tuple(
    os.path.realpath(place)
    for place in (
        *{sysconfig.get_path(name) for name in ("stdlib", "purelib", "platlib")},
        sys.base_prefix,
        str(Path(__file__).resolve().parents[2]),
    )
)
"""Where modules and their data lie, which may be read."""
_KNOWN = ("/proc/", "/sys/", "/dev/", "/usr/share/zoneinfo", "/etc/mime.types", "/etc/localtime", "/etc/ssl")


class Watch:
    """What is not allowed and happened all the same, while it is switched on."""

    def __init__(self) -> None:
        self._folder: str | None = None
        self.found: list[str] = []
        sys.addaudithook(self._heard)

    @contextlib.contextmanager
    def over(self, folder: Path) -> Iterator[list[str]]:
        """Within it nothing outside of a folder may be touched; yields what was, in words."""
        self._folder, self.found = os.path.realpath(folder), []
        try:
            yield self.found
        finally:
            self._folder = None

    def _heard(self, event: str, arguments: tuple[Any, ...]) -> None:
        if self._folder is None:
            return
        if event == "pickle.find_class":
            self.found.append(f"unpickled {arguments}")
        elif event in _PROGRAMS:
            self.found.append(f"started {arguments[:2]!r}"[:200])
        elif event == "socket.connect" and not str(arguments[1]).startswith("('127.0.0.1'"):
            self.found.append(f"connected to {arguments[1]!r}")
        elif event in _PATHS and isinstance(arguments[0], str | bytes | os.PathLike):
            self._touched(event, os.fsdecode(arguments[0]), arguments)

    def _touched(self, event: str, name: str, arguments: tuple[Any, ...]) -> None:
        folder, self._folder = self._folder, None  # realpath itself is heard too
        try:
            place = os.path.realpath(name) if "\0" not in name else name
            is_inside = place == folder or place.startswith(f"{folder}{os.sep}")
            reads = event == "open" and not (arguments[2] or 0) & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
            if not is_inside and not (reads and place.startswith((*_CODE, *_KNOWN))):
                self.found.append(f"{event} {place[:200]!r}")
        finally:
            self._folder = folder


watch = Watch()
