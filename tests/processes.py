"""Real processes of tests: a free port, one process a rank, and killing all that a process has started."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil


def free_port() -> int:
    """Return a port that nothing listens on at the moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def launch_ranks(
    script: Path, arguments: Sequence[object], ranks: int, timeout_s: float = 240, accelerator: str = "cpu"
) -> tuple[list[int], str]:
    """Run a script once a rank, the rank variables set; return the exit codes and the end of each one's output."""
    shared = {**os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(ranks)}
    shared |= {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": accelerator}
    processes = [
        subprocess.Popen(
            [sys.executable, str(script), *map(str, arguments)],
            env=shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(ranks)
    ]
    try:
        outputs = [process.communicate(timeout=timeout_s)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [process.returncode for process in processes], "\n".join(output[-3000:] for output in outputs)


def run_ranks(
    script: Path, arguments: Sequence[object], ranks: int, timeout_s: float = 240, accelerator: str = "cpu"
) -> None:
    """Run a script once a rank and see every one end well."""
    codes, told = launch_ranks(script, arguments, ranks, timeout_s, accelerator)
    assert codes == [0] * ranks, told


def kill_tree(process: subprocess.Popen[Any]) -> None:
    """Kill -9 a process with everything under it: driver, job, a local cluster, its workers."""
    with contextlib.suppress(psutil.NoSuchProcess):
        family = [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]
        for member in family:
            with contextlib.suppress(psutil.NoSuchProcess):
                member.kill()
        psutil.wait_procs(family, timeout=30)
    process.wait()
