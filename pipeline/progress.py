"""Progress of long work: a live bar on a terminal, a plain line every few seconds elsewhere, a message within a job.

A process whose output another one follows, such as the driver of a Ray job and its workers, hands over what it says,
how far it is and its result as messages: lines of a mark, a token and JSON. The token is drawn for each job and given
to its processes by :data:`TOKEN`; a line without it is foreign, whatever it looks like: a library's, another job's.
Where lines are records (:mod:`pipeline.log_lines`), a message is a record with the token.
"""

from __future__ import annotations

import io
import json
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from statistics import fmean
from types import TracebackType
from typing import Any, Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from pipeline.json_text import parse_json
from pipeline.log_lines import as_record, is_json, parsed, record, without_secrets

INTERVAL_S = 5.0
"""Least time between two lines of a piece of work."""
TOKEN = "MTL_LORA_MESSAGE_TOKEN"
"""Variable with the token of the messages; where it is unset, nobody reads messages and plain lines are written."""
_MARK = "@mtl-lora"
_RESULT = "result: "


@dataclass(frozen=True)
class WorkDone:
    """How far a piece of work is."""

    what: str
    done: int
    total: int
    unit: str = ""
    seconds_spent: float = 0.0
    seconds_left: float | None = None
    """Seconds until the end at the speed so far; None where nothing is done yet."""
    note: str = ""

    def __str__(self) -> str:
        share = 100 * self.done / self.total if self.total else 100
        head = f"{self.what} {self.done}/{self.total}{' ' + self.unit if self.unit else ''} ({share:.0f} %)"
        left = "" if self.seconds_left is None else f", {self.seconds_left:.0f} s left"
        return f"{head}, {self.seconds_spent:.0f} s spent{left}{', ' + self.note if self.note else ''}"


@dataclass(frozen=True)
class Result:
    """What a verb has found out, for the process that waits for it."""

    value: Any
    """Any JSON value; what JSON has no form for comes as text."""

    def __str__(self) -> str:
        return f"{_RESULT}{json.dumps(self.value, default=str)}"


@dataclass(frozen=True)
class Said:
    """A line of this project's own, for the person who watches."""

    text: str

    def __str__(self) -> str:
        return self.text


Message = WorkDone | Result | Said
_KINDS: dict[str, type[WorkDone] | type[Result] | type[Said]] = {"progress": WorkDone, "result": Result, "said": Said}


def is_followed() -> bool:
    """Whether another process reads this one's messages."""
    return bool(os.environ.get(TOKEN))


def send(message: Message) -> None:
    """Write a message for the process that follows this one, or its text where none does; on standard error."""
    line = f"{message}"
    if is_json():
        line = _as_record(message, os.environ.get(TOKEN, ""))
    elif is_followed():
        kind = next(name for name, type_ in _KINDS.items() if isinstance(message, type_))
        fields = json.dumps({"kind": kind, **asdict(message)}, default=str)
        line = f"{_MARK} {os.environ[TOKEN]} {fields}"
    sys.stderr.write(line + "\n")
    sys.stderr.flush()


def _as_record(message: Message, token: str = "") -> str:
    if isinstance(message, Said):
        return record(message.text, token=token, fields={"kind": "said"})
    if isinstance(message, Result):  # its texts are masked one by one: the message must stay JSON
        shown = Result(without_secrets(parse_json(json.dumps(message.value, default=str))))
        return record("", token=token, fields={"kind": "result", "message": str(shown)})
    return record(str(message), token=token, fields={"kind": "progress", **without_secrets(asdict(message))})


def pass_on(text: str, message: Message | None) -> None:
    """Write a line of another process, and the message that it is, as this one writes its own."""
    if is_json():
        sys.stderr.write(relayed(text, message) + "\n")
        sys.stderr.flush()
    else:
        tell(text if message is None else str(message))


def relayed(text: str, message: Message | None) -> str:
    """Return a line of another process, and the message that it is, as a record."""
    return as_record(text) if message is None or parsed(text) else _as_record(message)


class _SaidLines(io.StringIO):
    """Standard error of a followed process: each line that is written to it leaves as a message."""

    def __init__(self) -> None:
        super().__init__()
        self._begun = ""

    def write(self, text: str) -> int:
        *lines, self._begun = (self._begun + text).split("\n")
        for line in lines:
            if line or not is_json():
                send(Said(line))
        return len(text)


_messages: Any = _SaidLines()
console = (
    Console(file=_messages, highlight=False) if is_followed() or is_json() else Console(stderr=True, highlight=False)
)


def received(line: str, token: str) -> Message | None:
    """Return the message that a line of another process's output is; None where it is text.

    Args:
        line: without its end and without what a log has set before it.
        token: of the job; with an empty one every line is text.
    """
    head = f"{_MARK} {token} "
    if token and (known := parsed(line)) is not None and known.get("token") == token:
        return _of_record(known)
    if not token or not line.startswith(head):
        return None
    try:
        return _made(parse_json(line.removeprefix(head)))
    except ValueError:
        return None  # cut off, or run into another line: whoever reads the log sees it as it is


def _of_record(found: dict[str, Any]) -> Message | None:
    kind = found.get("kind")
    if kind == "progress":
        return _made({name: found.get(name) for name in ("kind", *WorkDone.__dataclass_fields__)})
    if kind != "result":
        return _made({"kind": kind, "text": found["message"]})
    try:
        return Result(parse_json(found["message"].removeprefix(_RESULT)))
    except (ValueError, AttributeError):
        return None


def _made(fields: Any) -> Message | None:
    try:
        message = _KINDS[fields.pop("kind")](**fields)
        str(message)  # as it will be shown
        return message
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError):
        return None


class Track:
    """Progress of one piece of work, used as a context manager.

    Everything goes to standard error, so that standard output stays free for results.
    """

    def __init__(self, description: str, total: int, unit: str = "") -> None:
        self.description, self.total, self.unit = description, total, unit
        self.done = 0
        self._start = self._last_line = time.monotonic()
        self._bar: Progress | None = None

    def __enter__(self) -> Self:
        self._start = self._last_line = time.monotonic()
        if console.is_terminal and not is_followed():
            self._bar = bars(self.unit)
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
        if now - self._last_line >= INTERVAL_S or self.done >= self.total:
            self._last_line = now
            spent = now - self._start
            left = spent / self.done * (self.total - self.done) if self.done else None
            send(WorkDone(self.description, self.done, self.total, self.unit, spent, left, note))

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()


def bars(unit: str = "") -> Progress:
    """Return live bars for a terminal, each with a ``note`` behind it."""
    return Progress(
        TextColumn("[bold]{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn(unit),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
        console=console,
    )


def say(message: str) -> None:
    """Print one line for the person who watches; it may have Rich's markup."""
    console.print(message, soft_wrap=True)


def tell(text: str) -> None:
    """Print text as it stands, such as an error's."""
    if is_json():  # its lines belong together
        send(Said(text))
        return
    console.print(text, markup=False, emoji=False, soft_wrap=True)


def sparkline(values: Sequence[float], width: int = 40) -> str:
    """Return values as a line of at most ``width`` block characters, the lowest value the lowest block."""
    count = min(width, len(values))
    means = [fmean(values[len(values) * i // count : len(values) * (i + 1) // count]) for i in range(count)]
    low, high = min(means), max(means)
    # The share before the number of blocks: one over the smallest differences is more than a float holds.
    span = high - low or 1.0
    return "".join(_BLOCKS[round((value - low) / span * (len(_BLOCKS) - 1))] for value in means)


_BLOCKS = "▁▂▃▄▅▆▇█"
