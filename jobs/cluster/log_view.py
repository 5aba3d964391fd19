"""A job's log as the person who waits for it wants it: what the job itself says, as live bars, results and words.

Ray, MLflow, DeepSpeed and torch write into the same log. Their lines are kept with all others in a file, and the last
of them are shown where the job has failed; while all goes well they tell the one who waits nothing.
"""

from __future__ import annotations

import signal
from collections import deque
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TextIO

from rich.progress import Progress

from pipeline.log_lines import WORKER_PREFIX, is_json
from pipeline.progress import Message, Result, WorkDone, bars, console, pass_on, received, relayed, tell

_FOREIGN_LINES = 40
"""Lines of libraries that are shown of a job that has failed."""
_EXPECTED = (0, 2, 3, 128 + signal.SIGTERM)
"""Exit codes of which the job itself has said why: done, bad input, held back, told to stop."""


def parted(line: str, token: str) -> tuple[str, Message | None]:
    """Return a line of a job's log without what Ray set before it, and the message that it is, if it is one.

    A result is one only where the job's driver gave it, not a worker.
    """
    text = WORKER_PREFIX.sub("", line.rstrip())
    message = received(text, token)
    if isinstance(message, Result) and text != line.rstrip():
        return text, None
    return text, message


def plain(line: str, token: str) -> str:
    """Return a line of a job's log for reading: a message in words, anything else as it stands; or all as records."""
    text, message = parted(line, token)
    if is_json():
        return relayed(text, message)
    return line if message is None else str(message)


class LogView:
    """Shows a job's log: progress as live bars on a terminal, as plain lines elsewhere, the job's words as they come.

    Args:
        token: of the job's messages.
        file: that the whole log is written to as well; None: the cluster keeps it.
        whole_log: how the one who waits comes by the whole log, in words.
    """

    def __init__(self, token: str, file: Path | None, whole_log: str) -> None:
        self.token, self.whole_log = token, whole_log
        self.result: Any = None
        """What the job has handed over, None until then."""
        self._path = file
        self._file: TextIO | None = None
        self._bars: Progress | None = None
        self._rows: dict[str, Any] = {}
        self._foreign: deque[str] = deque(maxlen=_FOREIGN_LINES)

    def __enter__(self) -> Self:
        if self._path is not None:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._file = self._path.open("w", buffering=1)
        if console.is_terminal:
            self._bars = bars()
            self._bars.start()
        return self

    def show(self, line: str) -> None:
        """Take one line of the log."""
        if self._file is not None:
            self._file.write(plain(line, self.token).rstrip() + "\n")
        text, message = parted(line, self.token)
        if isinstance(message, Result):
            self.result = message.value
        elif isinstance(message, WorkDone) and self._bars is not None:
            self._progress(message, self._bars)
        elif message is not None:
            pass_on(text, message)
        elif text:
            self._foreign.append(text)

    def ended(self, code: int) -> None:
        """Take the job's exit code: where the job itself cannot have said why, what was written last is shown."""
        if code in _EXPECTED:
            return
        for text in self._foreign:
            pass_on(text, None)
        tell(f"the job ended with exit code {code}; its whole log: {self.whole_log}")

    def _progress(self, message: WorkDone, bars: Progress) -> None:
        if message.what not in self._rows:
            self._rows[message.what] = bars.add_task(message.what, total=message.total, note="")
        bars.update(self._rows[message.what], completed=message.done, note=message.note)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bars is not None:
            self._bars.stop()
        if self._file is not None:
            self._file.close()
