"""A verb as a Ray job: submitted, followed line by line, its result and exit code brought back."""

from __future__ import annotations

import json
import os
import re
import shlex
import sys
from types import TracebackType
from typing import Any, Self

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from jobs import RESULT_MARK
from jobs.config import RunConfig
from pipeline import orchestration
from pipeline.progress import console

_PREFIX = re.compile(r"^(\x1b\[\d+m)*\((?P<who>[^()]* pid=\d+[^()]*)\)(\x1b\[\d+m)* ")
_PROGRESS = re.compile(r"^(?P<what>.+?) (?P<done>\d+)/(?P<total>\d+)[^(]*\(\d+ %\), .*? left(?:, (?P<note>.*))?$")
_NOISE = re.compile(
    r" (INFO|WARNING) (job_manager|worker|sdk|packaging|authentication_token_setup)\.py|^Running entrypoint for job "
    r"|core_worker\.cc|real_accelerator\.py|FutureWarning|^  return func\(|^Setting up process group"
    r"|^Reporting training result|^Requesting resources|^Attempting to start|^Started training worker group|^- \(ip="
)
"""Lines of Ray, torch and DeepSpeed that tell the person who waits nothing; the job's own log keeps them."""


def run_as_job(verb: str, config: RunConfig) -> tuple[int, Any]:
    """Run a verb of this configuration as a Ray job; return its exit code and its result, if it handed one over."""
    from jobs import stages

    if config.ray.address or os.environ.get("RAY_ADDRESS"):
        stages.check(config)
        path = config.write()
    else:  # the cluster will be this machine: what is wrong with the input shows before it is started
        stages.prepare(config)
        path = config.write()
    command = [sys.executable, "-m", "jobs.cli", verb, "--config", str(path)]
    with _Viewer() as viewer:
        code = orchestration.run_job(
            config.ray, shlex.join(command), {"MTL_LORA_SUBMITTED": "1", "PYTHONUNBUFFERED": "1"}, viewer.show
        )
    return code, viewer.result


class _Viewer:
    """Shows a job's log: progress lines as live bars on a terminal, everything else as it comes."""

    def __init__(self) -> None:
        self.result: Any = None
        self._bars: Progress | None = None
        self._rows: dict[str, Any] = {}

    def __enter__(self) -> Self:
        if console.is_terminal:
            self._bars = Progress(
                TextColumn("[bold]{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.fields[note]}"),
                console=console,
            )
            self._bars.start()
        return self

    def show(self, line: str) -> None:
        """Take one line of the log."""
        line = _PREFIX.sub("", line.rstrip())
        if line.startswith(RESULT_MARK):
            self.result = json.loads(line.removeprefix(RESULT_MARK))
        elif self._bars is not None and (match := _PROGRESS.match(line)):
            self._bar(self._bars, match)
        elif line and not _NOISE.search(line):
            console.print(line, markup=False, soft_wrap=True)

    def _bar(self, bars: Progress, match: re.Match[str]) -> None:
        what, total = match["what"], int(match["total"])
        if what not in self._rows:
            self._rows[what] = bars.add_task(what, total=total, note="")
        bars.update(self._rows[what], completed=int(match["done"]), note=match["note"] or "")

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bars is not None:
            self._bars.stop()
