from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pipeline.errors import HeldBack
from pipeline.promotion.lease import LeaseLost
from pipeline.promotion.registry import Registry

ROOT = Path(__file__).resolve().parents[3]
HOLD = (
    "import sys, time; from pipeline.promotion.registry import Registry;"
    "lease = Registry(sys.argv[1], sys.argv[2]).lease(float(sys.argv[3])); lease.__enter__();"
    "print('held', flush=True); time.sleep(60)"
)


def test_a_second_taker_is_refused_with_the_holder_named(registry: Registry) -> None:
    with registry.lease(30) as lease, pytest.raises(HeldBack, match="one retraining at a time") as refused:
        registry.lease(30).__enter__()
    assert lease.who in str(refused.value)
    with registry.lease(30):  # given back, it can be taken again
        pass


@pytest.mark.slow
def test_a_killed_holder_in_another_process_expires(registry: Registry) -> None:
    command = [sys.executable, "-c", HOLD, registry.name, registry.uri, "3"]
    holder = subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, cwd=ROOT, env={**os.environ, "LOGNAME": "other"}
    )
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        time.sleep(4)  # longer than the time-to-live: its beats keep it alive
        with pytest.raises(HeldBack, match=f"other@.*process {holder.pid}"):
            registry.lease(3).__enter__()
        holder.send_signal(signal.SIGKILL)
        holder.wait(10)
        with pytest.raises(HeldBack):
            registry.lease(3).__enter__()
        time.sleep(3.5)
        with registry.lease(3) as mine:
            mine.check()
    finally:
        holder.kill()


@pytest.mark.slow
def test_of_two_takers_at_once_one_wins(registry: Registry) -> None:
    command = [
        sys.executable,
        "-c",
        HOLD.replace("time.sleep(60)", "time.sleep(15)"),
        registry.name,
        registry.uri,
        "60",
    ]
    takers = [
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT) for _ in range(2)
    ]
    try:
        lines = [taker.communicate(timeout=120) for taker in takers]
    finally:
        for taker in takers:
            taker.kill()
    assert sorted(out for out, _ in lines) == ["", "held\n"]
    assert any("one retraining at a time" in err for _, err in lines)


def test_a_holder_that_slept_too_long_notices(registry: Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    sleeper = registry.lease(0.5)
    monkeypatch.setattr(sleeper, "_beat", lambda: None)  # a process that is stopped does not beat
    with sleeper:
        time.sleep(1.2)
        with registry.lease(30), pytest.raises(LeaseLost, match="must be held"):
            sleeper.check()


def test_a_beat_in_the_future_is_not_taken_for_life(registry: Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    ahead = registry.lease(1)
    monkeypatch.setattr(ahead, "_beat", lambda: None)
    monkeypatch.setattr("pipeline.promotion.lease.time.time", lambda: 4e9)  # the holder's clock had jumped
    ahead.__enter__()
    monkeypatch.undo()
    with registry.lease(1) as mine:
        mine.check()


def test_a_lease_that_is_not_given_back_says_no_password(
    registry: Registry, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def away(*_: object) -> None:
        raise ConnectionError("API request to http://ads:hunter2@host/api failed")

    with registry.lease(30) as lease:
        monkeypatch.setattr(lease._client, "set_model_version_tag", away)
    said = capsys.readouterr().err
    assert "could not be given back" in said
    assert "hunter2" not in said
