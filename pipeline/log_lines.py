"""Lines for a collector of logs: one JSON object a line where :data:`LOG_FORMAT` is ``json``, plain text else.

A record has ``time`` (ISO, UTC), ``level`` and ``message``; ``run``, ``job`` and ``rank`` where the process knows them;
and what a message of :mod:`pipeline.progress` adds, such as ``done`` and ``total``. No text in it has a secret.
"""

from __future__ import annotations

import contextlib
import datetime as dt
import io
import json
import logging
import os
import re
import sys
import threading
from collections.abc import Iterator, Mapping
from typing import Any, TextIO

from pipeline.errors import InputError, masked
from pipeline.json_text import parse_json

LOG_FORMAT = "MTL_LORA_LOG_FORMAT"
"""Variable: ``json`` or ``text``; one that is not set means text."""
_OF = {"run": "MTL_LORA_LOG_RUN", "job": "MTL_LORA_LOG_JOB", "rank": "MTL_LORA_LOG_RANK"}
_EVERY = {"time", "level", "message"}
_LEVEL = re.compile(r"(DEBUG|INFO|WARNING|ERROR|CRITICAL)\b", re.IGNORECASE)
WORKER_PREFIX = re.compile(r"^(\x1b\[\d+m)*\((?P<who>[^()]*\bpid=\d+[^()]*)\)(\x1b\[\d+m)* ")
"""What Ray sets before each line of a worker."""


def is_json() -> bool:
    """Whether this process writes records."""
    return os.environ.get(LOG_FORMAT) == "json"


def check_format() -> None:
    """Refuse a format that is none.

    Raises:
        InputError: it is.
    """
    if (found := os.environ.get(LOG_FORMAT, "text")) not in ("", "text", "json"):
        raise InputError(f"{LOG_FORMAT} must be text or json, got {found!r}; set one of them, or unset it")


def name_process(*, run: str | None = None, job: str | None = None, rank: int | None = None) -> None:
    """Say whose lines this process and those that it starts write; None leaves what was said before."""
    for name, value in (("run", run), ("job", job), ("rank", rank)):
        if value is not None:
            os.environ[_OF[name]] = str(value)


def variables() -> dict[str, str]:
    """Return what a worker on another machine needs to write as this process does; nothing for plain text."""
    names = (LOG_FORMAT, _OF["run"], _OF["job"])
    return {name: os.environ[name] for name in names if os.environ.get(name)} if is_json() else {}


def record(text: str, level: str = "", token: str = "", fields: Mapping[str, Any] | None = None) -> str:
    """Return a record as one line, without its end.

    Args:
        text: the message.
        level: of logging; by default the one that the text begins with, else INFO.
        token: of the job whose follower takes the record for a message.
        fields: further ones, plain values without secrets.
    """
    begin = _LEVEL.match(text)
    if not level:
        level = begin[0].upper() if begin else "ERROR" if text.startswith("Traceback ") else "INFO"
    found: dict[str, Any] = {
        "time": dt.datetime.now(dt.UTC).isoformat(timespec="milliseconds"),
        "level": level,
        "message": masked(text),
    }
    found |= {name: os.environ[variable] for name, variable in _OF.items() if os.environ.get(variable)}
    if "rank" in found:
        found["rank"] = int(found["rank"])
    return json.dumps(found | dict(fields or {}) | ({"token": token} if token else {}))


def without_secrets(value: Any) -> Any:
    """Return a plain value, each text in it masked."""
    if isinstance(value, dict):
        return {name: without_secrets(each) for name, each in value.items()}
    if isinstance(value, list):
        return [without_secrets(each) for each in value]
    return masked(value) if isinstance(value, str) else value


def parsed(line: str) -> dict[str, Any] | None:
    """Return the record that a line is; None where it is something else."""
    if not line.startswith('{"time"'):
        return None
    try:
        found = parse_json(line)
    except ValueError:
        return None  # cut off, or run into another line
    return found if isinstance(found, dict) and found.keys() >= _EVERY else None


def as_record(line: str) -> str:
    """Return a line as a record that is nobody's message: itself without its token where it is one."""
    found = parsed(line)
    if found is None:
        return record(line)
    found.pop("token", None)
    return json.dumps(found)


class _RecordLines(io.TextIOBase):
    """A stream of this process: what is no record becomes one; what Ray sets before a worker's record goes."""

    encoding = "utf-8"

    def __init__(self, under: TextIO) -> None:
        self._under = under
        self._of_thread = threading.local()  # print() writes a line and its end apart

    def write(self, text: str) -> int:
        *lines, self._of_thread.begun = (getattr(self._of_thread, "begun", "") + text).split("\n")
        for line in lines:
            found = WORKER_PREFIX.match(line)
            bare = line if found is None else line[found.end() :]
            known = parsed(bare)
            if known is None and bare.strip():
                bare = record(bare, fields={} if found is None else {"worker": found["who"]})
            elif known is not None and found is not None and known.get("kind") == "result":
                bare = as_record(bare)  # a worker hands no result over
            if bare.strip():
                self._under.write(bare + "\n")
        self._under.flush()
        return len(text)

    def flush(self) -> None:
        self._under.flush()

    def fileno(self) -> int:
        return self._under.fileno()

    def end(self) -> None:
        """Write what has no end yet."""
        if getattr(self._of_thread, "begun", ""):
            self.write("\n")


@contextlib.contextmanager
def record_lines(also_output: bool) -> Iterator[None]:
    """Within it all that is written to standard error in this process leaves as records, if they are wanted.

    Args:
        also_output: standard output too, where a job's log has both.
    """
    if not is_json():
        yield
        return
    before = sys.stdout, sys.stderr
    error = sys.stderr = _RecordLines(before[1])
    output = _RecordLines(before[0]) if also_output else None
    if output is not None:
        sys.stdout = output
    try:
        yield
    finally:
        for stream in filter(None, (output, error)):
            stream.end()
        sys.stdout, sys.stderr = before


class _Records(logging.Handler):
    def emit(self, entry: logging.LogRecord) -> None:
        sys.stderr.write(record(self.format(entry), entry.levelname, fields={"logger": entry.name}) + "\n")
        sys.stderr.flush()


# Here, for each process that says anything imports this: workers and replicas have no other beginning of ours.
if is_json():
    logging.getLogger().addHandler(_Records())
    logging.captureWarnings(True)
