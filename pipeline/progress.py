"""Progress of long work: a live bar on a terminal, one plain line every few seconds elsewhere."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

console = Console(stderr=True, highlight=False)
PLAIN_INTERVAL_S = 5.0


class Track:
    """Progress of one piece of work, used as a context manager.

    Everything goes to standard error, so that standard output stays free for results.
    """

    def __init__(self, description: str, total: int, unit: str = "") -> None:
        self.description, self.total, self.unit = description, total, unit
        self.done = 0
        self._start = time.monotonic()
        self._last_line = 0.0
        self._bar: Progress | None = None

    def __enter__(self) -> Self:
        self._start = time.monotonic()
        if console.is_terminal:
            self._bar = Progress(
                TextColumn("[bold]{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn(self.unit),
                TimeElapsedColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.fields[note]}"),
                console=console,
            )
            self._bar.start()
            self._bar.add_task(self.description, total=self.total, note="")
        return self

    def advance(self, amount: int = 1, note: str = "") -> None:
        """Count ``amount`` more units as done; ``note`` is shown behind them."""
        self.done += amount
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], advance=amount, note=note)
            return
        now = time.monotonic()
        if now - self._last_line >= PLAIN_INTERVAL_S or self.done >= self.total:
            self._last_line = now
            sys.stderr.write(self._line(now, note) + "\n")
            sys.stderr.flush()

    def _line(self, now: float, note: str) -> str:
        spent = now - self._start
        left = spent / self.done * (self.total - self.done) if self.done else float("nan")
        share = 100 * self.done / self.total if self.total else 100
        head = f"{self.description} {self.done}/{self.total}{' ' + self.unit if self.unit else ''} ({share:.0f} %)"
        return f"{head}, {spent:.0f} s spent, {left:.0f} s left{', ' + note if note else ''}"

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()


def say(message: str) -> None:
    """Print one line for the person who watches."""
    console.print(message, soft_wrap=True)
