"""Timing that survives a shared machine: candidates take turns in one process, and ratios are taken a round.

One thread's work is timed by the processor time it takes, which does not count what others run meanwhile; the work of
several threads, which wait for each other, by the clock on the wall.
"""

import os
import platform
import random
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch


def hardware() -> dict[str, Any]:
    """Return what the machine is: processor, cores, memory in GiB, load before the run."""
    model = platform.processor() or platform.machine()
    with Path("/proc/cpuinfo").open(encoding="utf-8") as lines:
        model = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), model)
    memory_gib = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    load = round(os.getloadavg()[0], 2)
    return {"processor": model, "cores": os.cpu_count(), "memory_gib": round(memory_gib, 1), "load_before": load}


def versions(*packages: str) -> dict[str, str]:
    """Return the versions of Python and of some packages."""
    found = {"python": platform.python_version()}
    for package in packages:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Compute with this many threads inside."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def interleaved(
    candidates: Mapping[str, Callable[[], Any]],
    rounds: int = 20,
    warm_up: int = 2,
    clock: Callable[[], float] | None = None,
) -> dict[str, list[float]]:
    """Return seconds of each candidate in each round; within a round they take turns, in another order each round.

    Without a ``clock``, by the processor time where there is one thread.
    """
    for _ in range(warm_up):
        for run in candidates.values():
            run()
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    order, shuffle = list(candidates), random.Random(0).shuffle
    clock = clock or (time.process_time if torch.get_num_threads() == 1 else time.perf_counter)
    for _ in range(rounds):
        shuffle(order)
        for name in order:
            start = clock()
            candidates[name]()
            seconds[name].append(clock() - start)
    return seconds


def ratio(seconds: Mapping[str, list[float]], over: str, under: str) -> float:
    """Return the median over the rounds of one candidate's time over another's."""
    return statistics.median(a / b for a, b in zip(seconds[over], seconds[under], strict=True))


def milliseconds(seconds: Mapping[str, list[float]]) -> dict[str, float]:
    """Return each candidate's median in milliseconds."""
    return {name: round(1000 * statistics.median(values), 3) for name, values in seconds.items()}


def side_by_side(parts: Sequence[tuple[Any, ...]]) -> list[dict[str, Any]]:
    """Call functions with their arguments, a process of one thread a core, and return their rows in order."""
    os.environ["OMP_NUM_THREADS"] = "1"
    with ProcessPoolExecutor(os.cpu_count(), get_context("spawn")) as pool:
        found = [future.result() for future in [pool.submit(*part) for part in parts]]
    return [line for lines in found for line in (lines if isinstance(lines, list) else [lines])]


def row(measure: str, goal: str, value: float, is_met: bool | None, **details: Any) -> dict[str, Any]:
    """Return one line of a benchmark's table."""
    return {"measure": measure, "goal": goal, "value": round(value, 4), "met": is_met, **details}
