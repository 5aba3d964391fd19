"""A job's log as the person who waits for it wants it: bars, results and words, without Ray's own lines."""

from __future__ import annotations

import re
from types import TracebackType
from typing import Any, Self

from rich.progress import Progress

from pipeline.progress import Message, Result, WorkDone, bars, console, received

_PREFIX = re.compile(r"^(\x1b\[\d+m)*\((?P<who>[^()]* pid=\d+[^()]*)\)(\x1b\[\d+m)* ")
"""What Ray sets before each line of a worker."""
_NOISE = re.compile(
    r" (INFO|WARNING) (job_manager|worker|sdk|packaging|authentication_token_setup)\.py|^Running entrypoint for job "
    r"|core_worker\.cc|real_accelerator\.py|FutureWarning|^  return func\(|^Setting up process group"
    r"|^Checkpoint successfully created|^Found multiple active Ray"
    r"|mlflow\.(store\.db|pyfunc)|^  warnings\.warn\("
    r"|^Reporting training result|^Requesting resources|^Attempting to start|^Started training worker group|^- \(ip="
)
"""Lines of Ray, torch and DeepSpeed that tell the person who waits nothing; the job's own log keeps them."""
_TRACEBACK = re.compile(r"^Exception in thread PlacementGroupCleanerMonitor")
"""Begins a traceback of Ray's own housekeeping on a busy machine; its last line is the first that is not indented."""


def parted(line: str, token: str) -> tuple[str, Message | None]:
    """Return a line of a job's log without what Ray set before it, and the message that it is, if it is one.

    A result is one only where the job's driver gave it, not a worker.
    """
    text = _PREFIX.sub("", line.rstrip())
    message = received(text, token)
    if isinstance(message, Result) and text != line.rstrip():
        return text, None
    return text, message


def plain(line: str, token: str) -> str:
    """Return a line of a job's log for reading: a message in words, anything else as it stands."""
    message = parted(line, token)[1]
    return line if message is None else str(message)


class LogView:
    """Shows a job's log: progress as live bars on a terminal, as plain lines elsewhere, other lines as they come.

    Args:
        token: of the job's messages.
    """

    def __init__(self, token: str) -> None:
        self.token = token
        self.result: Any = None
        """What the job has handed over, None until then."""
        self._bars: Progress | None = None
        self._rows: dict[str, Any] = {}
        self._in_traceback = False

    def __enter__(self) -> Self:
        if console.is_terminal:
            self._bars = bars()
            self._bars.start()
        return self

    def show(self, line: str) -> None:
        """Take one line of the log."""
        text, message = parted(line, self.token)
        if isinstance(message, Result):
            self.result = message.value
        elif isinstance(message, WorkDone):
            self._progress(message)
        elif _TRACEBACK.match(text):
            self._in_traceback = True
        elif self._in_traceback:
            self._in_traceback = text.startswith((" ", "Traceback"))
        elif text and not _NOISE.search(text):
            console.print(text, markup=False, soft_wrap=True)

    def _progress(self, message: WorkDone) -> None:
        if self._bars is None:
            console.print(str(message), markup=False, soft_wrap=True)
            return
        if message.what not in self._rows:
            self._rows[message.what] = self._bars.add_task(message.what, total=message.total, note="")
        self._bars.update(self._rows[message.what], completed=message.done, note=message.note)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bars is not None:
            self._bars.stop()
