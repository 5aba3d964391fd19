from __future__ import annotations

import datetime as dt
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from jobs.config import ScheduleConfig
from jobs.schedule import trigger_of
from pipeline.errors import InputError

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize(
    ("cron", "timezone", "words"),
    [
        ("0 3 * *", "UTC", "five fields"),
        ("61 3 * * 1", "UTC", "five fields"),
        ("0 0 30 2 *", "UTC", "never fires"),
        ("0 3 * * 1", "Mars/Base", "Europe/Paris"),
    ],
)
def test_a_schedule_that_is_none_is_refused(cron: str, timezone: str, words: str) -> None:
    with pytest.raises(InputError, match=words):
        trigger_of(ScheduleConfig(cron=cron, timezone=timezone))


def test_times_follow_the_time_zone_through_the_change_of_the_clocks() -> None:
    trigger = trigger_of(ScheduleConfig(cron="30 6 * * mon", timezone="Europe/Paris"))
    first = trigger.get_next_fire_time(None, dt.datetime(2026, 3, 24, tzinfo=dt.UTC))
    assert first.isoformat() == "2026-03-30T06:30:00+02:00"  # summer time began the day before
    before = trigger.get_next_fire_time(None, dt.datetime(2026, 3, 20, tzinfo=dt.UTC))
    assert before.isoformat() == "2026-03-23T06:30:00+01:00"


def _start(folder: Path, cron: str) -> subprocess.Popen[str]:
    task = {"template": "{text}\nSpam:", "label_words": [" no", " yes"]}
    settings = {
        "name": "loop",
        "run_root": str(folder / "runs"),
        "data": {"source": "records", "root": str(folder / "partitions")},
        "tasks": {"spam": task},
        "retraining": {},
        "schedule": {"cron": cron},
    }
    path = folder / "loop.yaml"
    path.write_text(yaml.safe_dump(settings))
    command = [sys.executable, "-m", "jobs.cli", "schedule", "--config", str(path)]
    return subprocess.Popen(
        command, cwd=ROOT, stderr=subprocess.PIPE, text=True, env={**os.environ, "PYTHONUNBUFFERED": "1"}
    )


def _until(process: subprocess.Popen[str], words: str, limit_s: float = 240) -> str:
    assert process.stderr is not None
    seen, end = "", time.monotonic() + limit_s
    for line in process.stderr:
        seen += line
        if words in line:
            return seen
        assert time.monotonic() < end, seen
    raise AssertionError(f"ended without {words!r}: {seen}")


def test_a_missed_run_is_caught_up_once_with_a_notice_and_the_stop_is_graceful(tmp_path: Path) -> None:
    (tmp_path / "partitions").mkdir()
    first = _start(tmp_path, "* * * * *")
    try:
        _until(first, "retraining ads-relevance at")
    finally:
        first.send_signal(signal.SIGTERM)
        assert first.wait(60) == 128 + signal.SIGTERM
    # As if no scheduler had run for an hour: the stored next time lies in the past.
    import sqlite3

    store = sqlite3.connect(tmp_path / "runs" / "loop" / "schedule.db")
    store.execute("update apscheduler_jobs set next_run_time = next_run_time - 3600")
    store.commit()
    store.close()
    second = _start(tmp_path, "* * * * *")
    try:
        seen = _until(second, "retraining ended with exit code 2")  # the folder holds no partition: bad input
        assert "was missed" in seen
        assert seen.count("daily partitions") == 1
    finally:
        second.send_signal(signal.SIGTERM)
        second.wait(60)
    events = [json.loads(line)["event"] for line in (tmp_path / "runs" / "notices.jsonl").read_text().splitlines()]
    assert events == ["MISSED", "FAILED"]
