"""A holder that is stopped between its last check and its entry promotes nothing when it wakes: real processes."""

from __future__ import annotations

import contextlib
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipeline.promotion.registry import Registry
from tests.pipeline.promotion.conftest import promote

ROOT = Path(__file__).resolve().parents[3]
TTL_S = 2.0
HOLDER = """
import os, signal, sys
from pipeline.promotion.registry import Registry
from pipeline.contracts import PromotionDecision
registry = Registry(sys.argv[1], sys.argv[2])
lease = registry.lease(float(sys.argv[3]))

def before():
    held = lease.check()  # it holds the lease still, and is stopped right after
    os.kill(os.getpid(), signal.SIGSTOP)
    return held

try:
    with lease:
        decision = PromotionDecision(verdict="PROMOTE", reasons=("better",), candidate="2", champion="1", tasks={})
        registry.promote(2, decision, before)
    print("promoted")
except Exception as error:
    print(type(error).__name__, error)
"""


@contextlib.contextmanager
def stopped_holder(registry: Registry) -> Iterator[subprocess.Popen[str]]:
    """A process that holds the lease and has stopped itself right before the ledger's entry."""
    command = [sys.executable, "-c", HOLDER, registry.name, registry.uri, str(TTL_S)]
    holder = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT)
    try:
        deadline = time.monotonic() + 400
        while (state := Path(f"/proc/{holder.pid}/stat").read_text().rpartition(")")[2].split()[0]) != "T":
            assert state != "Z", holder.communicate()
            assert time.monotonic() < deadline
            time.sleep(0.05)
        yield holder
    finally:
        holder.kill()
        holder.wait(10)


@pytest.mark.slow
@pytest.mark.parametrize("rival", [None, 3])
def test_a_holder_that_slept_through_a_takeover_promotes_nothing(registry: Registry, rival: int | None) -> None:
    promote(registry, 1)
    with stopped_holder(registry) as holder:
        time.sleep(TTL_S)
        with registry.lease(30) as mine:
            if rival is not None:
                promote(registry, rival)
            holder.send_signal(signal.SIGCONT)
            out, _ = holder.communicate(timeout=60)
            assert out.startswith("LeaseLost the lease must be held until the end"), out
            late = [entry for entry in registry.ledger.entries() if entry.version == 2]
            assert [entry.lease for entry in late] == [1]  # written, and void
            assert registry.champion().number == (rival or 1)
            assert registry.version("champion").number == (rival or 1)
            assert mine.check() == 2
    assert registry.champion().number == (rival or 1)


@pytest.mark.slow
def test_a_holder_that_slept_and_still_holds_the_lease_promotes(registry: Registry) -> None:
    promote(registry, 1)
    with stopped_holder(registry) as holder:
        time.sleep(TTL_S)
        holder.send_signal(signal.SIGCONT)  # nobody took it over meanwhile
        assert holder.communicate(timeout=60)[0] == "promoted\n"
    assert registry.champion().number == 2
    with registry.lease(30):  # given back: nothing to fence off
        assert [entry.action for entry in registry.ledger.standing()] == ["promote", "promote"]
