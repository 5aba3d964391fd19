"""What a device would do differently is tried in a process of its own, since torch has one device at a time."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
def test_nothing_stays_on_the_host_and_the_host_waits_for_nothing() -> None:
    cases = Path(__file__).with_name("device_cases.py")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", str(cases)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280, cwd=Path(__file__).parents[3])
    assert done.returncode == 0, done.stdout[-6000:]
    assert " passed" in done.stdout
