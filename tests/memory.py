"""What a process holds itself, now and at most."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path


def anonymous_bytes(process: int | str = "self") -> int:
    """Return what a process holds itself: neither libraries nor mapped files; this one, or the one of a number."""
    with Path(f"/proc/{process}/status").open() as lines:
        return next(int(line.split()[1]) << 10 for line in lines if line.startswith("RssAnon:"))


class Peak:
    """The most anonymous memory between two moments, looked at every two milliseconds by a thread of its own.

    Args:
        look: returns what is looked at instead.
    """

    def __init__(self, look: Callable[[], int] = anonymous_bytes) -> None:
        self._look, self._most, self._ended = look, 0, threading.Event()
        threading.Thread(target=self._watch, daemon=True).start()

    def _watch(self) -> None:
        while not self._ended.wait(0.002):
            self._most = max(self._most, self._look())

    def take(self) -> int:
        """Return the most since the last call."""
        most, self._most = max(self._most, self._look()), 0
        return most
