from __future__ import annotations

import os
import shutil
import signal
import socket
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from pathlib import Path

import pytest

from infra.mlflow import services
from infra.mlflow.settings import Settings, make_settings
from pipeline.errors import InputError

PORTS = 10


@pytest.fixture(scope="module")
def made() -> Iterator[Callable[[], Settings]]:
    """Make stacks on free ports, in folders that PostgreSQL's own user reaches; all is killed and gone at the end."""
    with ExitStack() as ends:

        def make() -> Settings:
            folder = Path(tempfile.mkdtemp(prefix="stack-"))  # pytest's own folders are closed to other users
            folder.chmod(0o711)
            ends.callback(shutil.rmtree, folder)
            settings = make_settings(folder / "data", port=free_ports())
            ends.callback(destroy, settings)
            try:
                services.start_postgres(settings)
            except InputError as refusal:
                pytest.skip(f"PostgreSQL cannot be started here: {refusal}")
            return settings

        yield make


def free_ports() -> int:
    """Return the first of ten neighbouring ports on which nothing listens at the moment."""
    for first in range(21000 + os.getpid() % 1000 * PORTS, 32000, PORTS):  # apart from those of another process
        with ExitStack() as held:
            try:
                for port in range(first, first + PORTS):
                    held.enter_context(socket.socket()).bind(("127.0.0.1", port))
            except OSError:
                continue
            return first
    raise AssertionError("no ten free ports")


def destroy(settings: Settings) -> None:
    """Kill all processes of a stack as a lost machine would, and delete its data."""
    for path in settings.data.glob("*.pid"):
        with suppress(ProcessLookupError):
            os.killpg(int(path.read_text()), signal.SIGKILL)
    with suppress(FileNotFoundError, ProcessLookupError):
        os.kill(int((settings.data / "postgres/data/postmaster.pid").read_text().split()[0]), signal.SIGQUIT)
    shutil.rmtree(settings.data, ignore_errors=True)
