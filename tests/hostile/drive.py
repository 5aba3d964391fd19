"""Gives a surface its inputs, one by one, and counts what comes of them."""

from __future__ import annotations

import contextlib
import gc
import io
import os
import random
import resource
import shutil
import signal
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from mtl_lora import MTLLoRAError
from pipeline.errors import InputError
from pipeline.images import UnreadableImage
from pipeline.record import Rejected
from tests.hostile.guard import watch

LONGEST_S = 5.0
"""Of processor time: by the clock, a machine that others use would break the law."""
HANGS_S = 60.0
"""By the clock: nothing is waited for so long."""
MOST_BYTES = 1 << 30
"""What one input may make a process hold, beyond what it holds before."""
TYPED = (InputError, MTLLoRAError, Rejected, UnreadableImage)
"""What a refusal may be: the product's, its library's, and those of single records and images."""
Put = Callable[[random.Random], bool | None]
"""Makes an input and gives it to its door: False where the door itself says no; a typed error is a refusal too."""


@dataclass
class Found:
    """What came of the inputs of a surface so far."""

    inputs: int = 0
    refused: int = 0
    accepted: int = 0
    longest_s: float = 0.0
    peak_bytes: int = 0
    """Most that the process held over what it held before, looked at every :data:`_LOOK` inputs."""
    faults: list[str] = field(default_factory=list)
    kinds: Counter[str] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        self.kinds = Counter(self.kinds)

    def plain(self) -> dict[str, Any]:
        """Return it as plain values."""
        return asdict(self) | {"kinds": dict(self.kinds)}


class _TooLongError(BaseException):
    """Not an Exception: no door may swallow it."""


_LOOK = 50


def drive(surface: str, put: Put, folder: Path, seed: int, numbers: range, found: Found) -> Iterator[int]:
    """Give a surface the inputs of these numbers; yields each number before it is tried.

    Args:
        surface: its name.
        put: see :data:`Put`.
        folder: the only one that may be touched.
        seed: of the inputs.
        numbers: of the inputs.
        found: what is counted into.
    """
    before = {kind: signal.signal(kind, _too_long) for kind in (signal.SIGALRM, signal.SIGPROF)}
    limits = resource.getrlimit(resource.RLIMIT_DATA)
    temporary = tempfile.tempdir
    tempfile.tempdir = str(folder)
    gc.collect()
    gc.freeze()  # what the libraries hold is looked through once
    held = _held("VmRSS")
    resource.setrlimit(resource.RLIMIT_DATA, (_held("VmData") + MOST_BYTES + (64 << 20), limits[1]))
    try:
        for number in numbers:
            yield number
            _one(surface, put, folder, seed, number, found)
            if found.inputs % _LOOK == 0:
                found.peak_bytes = max(found.peak_bytes, _held("VmHWM") - held)
                gc.collect()
                held = _held("VmRSS")
                Path("/proc/self/clear_refs").write_text("5")
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, limits)
        tempfile.tempdir = temporary
        for kind, handler in before.items():
            signal.signal(kind, handler)
        gc.unfreeze()


def _one(surface: str, put: Put, folder: Path, seed: int, number: int, found: Found) -> None:
    rng = random.Random(f"{surface} {seed} {number}")
    fault = ""
    begun = time.process_time()
    signal.setitimer(signal.ITIMER_PROF, LONGEST_S)
    signal.setitimer(signal.ITIMER_REAL, HANGS_S)
    with watch.over(folder) as touched:
        try:
            with contextlib.redirect_stderr(io.StringIO()):
                is_accepted = put(rng) is not False
        except TYPED as error:
            is_accepted = False
            found.kinds[type(error).__name__] += 1
            if not str(error):
                fault = f"{type(error).__name__} says nothing"
        except _TooLongError:
            fault = f"longer than {LONGEST_S:g} s, or nothing for {HANGS_S:g} s"
        except Exception as error:  # noqa: BLE001 - this is what is looked for
            fault = f"{type(error).__name__}: {error}"[:300] + _where(error)
        finally:
            signal.setitimer(signal.ITIMER_PROF, 0)
            signal.setitimer(signal.ITIMER_REAL, 0)
    if touched and not fault:
        fault = "; ".join(touched[:3])
    found.inputs += 1
    found.longest_s = max(found.longest_s, time.process_time() - begun)
    if fault:
        found.faults.append(f"{surface} {seed} {number}: {fault}")
    elif is_accepted:
        found.accepted += 1
    else:
        found.refused += 1


def _where(error: Exception) -> str:
    frames = [f"{Path(f.filename).name}:{f.lineno}" for f in traceback.extract_tb(error.__traceback__)]
    return f" at {' < '.join(reversed(frames[-6:]))}"


def _too_long(*_: object) -> None:
    raise _TooLongError


def _held(name: str) -> int:
    with Path("/proc/self/status").open() as lines:
        return next(int(line.split()[1]) << 10 for line in lines if line.startswith(f"{name}:"))


@contextlib.contextmanager
def own_folder() -> Iterator[Path]:
    """Within it a folder stands that is this process's current one too."""
    before = Path.cwd()
    folder = Path(tempfile.mkdtemp(prefix="hostile-"))
    os.chdir(folder)
    try:
        yield folder
    finally:
        os.chdir(before)
        shutil.rmtree(folder, ignore_errors=True)
