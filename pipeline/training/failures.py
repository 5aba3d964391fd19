"""Which failure of a rank no restart can fix: the same error at the same step for the second time."""

from __future__ import annotations

import json
import re
import traceback
from pathlib import Path

from pipeline.contracts import write_atomic
from pipeline.json_text import parse_json

_OUTSIDE = re.compile(r"/torch/distributed/|/deepspeed/comm/|/ray/")
"""Files whose errors tell of other ranks and machines."""
_OUTSIDE_WORDS = re.compile(r"gloo|nccl|processgroup|connection|timed? ?out|out of memory|cuda error", re.IGNORECASE)


def is_of_the_outside(error: BaseException) -> bool:
    """Whether an error comes of a disk, a network, a machine or another rank, so that another attempt may do better."""
    if isinstance(error, (OSError, MemoryError)):
        return True
    at = [frame.filename for frame in traceback.extract_tb(error.__traceback__)]
    return any(map(_OUTSIDE.search, at)) or bool(_OUTSIDE_WORDS.search(f"{type(error).__name__}: {error}"))


def failure_file(folder: Path, rank: int) -> Path:
    """Return the file in which a rank notes its last failure."""
    return folder / f".failure-{rank}.json"


def repeated(folder: Path, rank: int, step: int | None, error: BaseException) -> str | None:
    """Note a rank's failure; return why the run must end if its last one was the same.

    Args:
        folder: shared by the attempts of a run.
        rank: that failed.
        step: that it was in; None while it was loading.
        error: what it raised.
    """
    if is_of_the_outside(error):
        return None
    frames = traceback.extract_tb(error.__traceback__)
    at = f"{Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else ""
    found = {"step": step, "error": f"{type(error).__name__}: {error}", "at": at}
    path = failure_file(folder, rank)
    before = parse_json(path.read_text()) if path.is_file() else None
    write_atomic(path, json.dumps(found))
    if found != before:
        return None
    where = "while loading" if step is None else f"in step {step}"
    return (
        f"training must get beyond a step in two attempts, rank {rank} failed twice {where} with {found['error']} "
        f"({at}); no restart can fix that: its traceback stands above"
    )


def forget(folder: Path) -> None:
    """Take away what earlier commands noted: a user may have fixed it."""
    for path in folder.glob(".failure-*.json"):
        path.unlink(missing_ok=True)
