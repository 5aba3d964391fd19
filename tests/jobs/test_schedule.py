from __future__ import annotations

import datetime as dt
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from apscheduler.jobstores.sqlalchemy import SQLAlchemyJobStore
from apscheduler.triggers.interval import IntervalTrigger

from jobs.config import ScheduleConfig, load_config
from jobs.weekly.schedule import fire, schedule, trigger_of
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


def test_days_of_the_week_are_counted_as_cron_and_kubernetes_count_them() -> None:
    for cron in ("0 3 * * 1", "0 3 * * mon", "0 3 1-31/1 * 1-1"):
        at = trigger_of(ScheduleConfig(cron=cron)).get_next_fire_time(None, dt.datetime(2026, 11, 24, tzinfo=dt.UTC))
        assert at.isoformat() == "2026-11-30T03:00:00+00:00"  # a Monday
    sundays = [trigger_of(ScheduleConfig(cron=f"0 3 * * {n}")) for n in ("0", "7", "sun")]
    assert {t.get_next_fire_time(None, dt.datetime(2026, 11, 24, tzinfo=dt.UTC)).day for t in sundays} == {29}


@pytest.mark.parametrize(
    ("field", "days"),
    [
        ("*", "mon tue wed thu fri sat sun"),
        ("*/2", "tue thu sat sun"),
        ("1-5/2", "mon wed fri"),
        ("0-4", "mon tue wed thu sun"),
        ("0-6", "mon tue wed thu fri sat sun"),
        ("5-7", "fri sat sun"),
        ("Fri-Sun", "fri sat sun"),
        ("MON-wed,6", "mon tue wed sat"),
        ("0,7", "sun"),
        ("sun-sun", "sun"),
    ],
)
def test_the_field_of_the_weekday_means_what_it_means_to_cron(field: str, days: str) -> None:
    trigger = trigger_of(ScheduleConfig(cron=f"0 3 * * {field}"))
    at, found = dt.datetime(2026, 11, 23, tzinfo=dt.UTC), []  # a Monday
    while (at := trigger.get_next_fire_time(None, at)) < dt.datetime(2026, 11, 30, tzinfo=dt.UTC):
        found.append(f"{at:%a}".lower())
        at += dt.timedelta(hours=1)
    assert found == days.split()


@pytest.mark.parametrize("field", ["8", "10", "0-8", "1-", "*/0", "1/2", "5-1", "sat-mon", "someday", ","])
def test_a_weekday_that_cron_does_not_know_is_refused(field: str) -> None:
    with pytest.raises(InputError, match=r"names no days|runs backwards"):
        trigger_of(ScheduleConfig(cron=f"0 3 * * {field}"))


def test_a_day_of_the_month_and_of_the_week_at_once_are_refused() -> None:
    for cron in ("0 3 1 * 1", "0 3 */2 * fri", "0 3 1-7 * 0-4"):
        with pytest.raises(InputError, match=r"not both, got .* put \* for one of them"):
            trigger_of(ScheduleConfig(cron=cron))
    trigger_of(ScheduleConfig(cron="0 3 1 * 0-6"))


def _settings(folder: Path, cron: str, **retraining: float) -> Path:
    task = {"template": "{text}\nSpam:", "label_words": [" no", " yes"]}
    settings = {
        "name": "loop",
        "run_root": str(folder / "runs"),
        "data": {"source": "records", "root": str(folder / "partitions")},
        "tasks": {"spam": task},
        "retraining": retraining,
        "schedule": {"cron": cron},
    }
    path = folder / "loop.yaml"
    path.write_text(yaml.safe_dump(settings))
    return path


def _start(folder: Path, cron: str, **retraining: float) -> subprocess.Popen[str]:
    path = _settings(folder, cron, **retraining)
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


@pytest.mark.slow
def test_a_missed_run_is_caught_up_once_with_a_notice_and_the_stop_is_graceful(tmp_path: Path) -> None:
    (tmp_path / "partitions").mkdir()
    hourly = f"{(dt.datetime.now().minute + 30) % 60} * * * *"  # no time of it comes while this runs
    first = _start(tmp_path, hourly)
    try:
        _until(first, "retraining ads-relevance at")
    finally:
        first.send_signal(signal.SIGTERM)
        assert first.wait(60) == 128 + signal.SIGTERM
    # As if no scheduler had run for an hour: the stored next time lies in the past.
    store = SQLAlchemyJobStore(url=f"sqlite:///{tmp_path / 'runs' / 'loop' / 'schedule.db'}")
    store.start(None, "default")
    (job,) = store.get_all_jobs()
    job.next_run_time -= dt.timedelta(hours=5)
    store.update_job(job)
    store.shutdown()
    second = _start(tmp_path, hourly)
    try:
        seen = _until(second, "retraining ended with exit code 2")  # the folder holds no partition: bad input
        assert "was missed" in seen
        time.sleep(5)
    finally:
        second.send_signal(signal.SIGTERM)
        _, rest = second.communicate(timeout=60)
    assert "retraining ended" not in rest  # five missed hours, one run
    events = [json.loads(line)["event"] for line in (tmp_path / "runs" / "notices.jsonl").read_text().splitlines()]
    assert events == ["MISSED", "FAILED"]


@pytest.mark.slow
def test_a_retraining_that_was_cut_off_with_its_scheduler_goes_on(tmp_path: Path) -> None:
    (tmp_path / "partitions").mkdir()
    mark = tmp_path / "runs" / "loop" / "schedule.running"
    mark.parent.mkdir(parents=True)
    mark.touch()
    process = _start(tmp_path, "0 3 1 1 *", lease_ttl_s=8)
    try:
        said = _until(process, "going on with it at")
        began = dt.datetime.now(dt.UTC)
        at = re.search(r"going on with it at (\S+ \S+) UTC", said)
        assert at is not None
        # The dead one's last beat was before this start: by then its lease has expired.
        assert dt.datetime.fromisoformat(f"{at[1]}+00:00") > began + dt.timedelta(seconds=5)
        _until(process, "retraining ended with exit code 2")
        assert not mark.exists()
    finally:
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=60)


def test_two_schedulers_of_one_folder_may_end_at_once(tmp_path: Path) -> None:
    mark = tmp_path / "schedule.running"
    removes = [sys.executable, "-c", f"import os; os.unlink({str(mark)!r})"]
    assert fire([*removes, "--config", str(_settings(tmp_path, "0 3 1 1 *"))], str(mark)) == 0


OWN = '{"event": "FAILED", "model": "ads-relevance", "reasons": ["InputError: a gap"]}'
OTHERS = '{"event": "MISSED", "model": "ads-relevance"}\n{"event": "FAILED", "model": "another"}\n{"event'


@pytest.mark.parametrize(
    ("writes", "ends", "sent"),
    [
        ("", "os.kill(os.getpid(), 9)", ["retraining ended with exit code -9 (failed); see the scheduler's log"]),
        (OTHERS, "sys.exit(1)", ["retraining ended with exit code 1 (failed); see the scheduler's log"]),
        (OWN, "sys.exit(2)", ["InputError: a gap"]),
        ("", "sys.exit(0)", []),
        ("", "sys.exit(3)", []),
        ("", "sys.exit(143)", []),  # stopped by SIGTERM
    ],
)
def test_a_retraining_that_died_without_a_word_is_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, writes: str, ends: str, sent: list[str]
) -> None:
    log = tmp_path / "runs" / "notices.jsonl"
    log.parent.mkdir()
    log.write_text(OWN + "\n")  # of an earlier one
    code = f"import os, sys; open({str(log)!r}, 'a').write({writes + chr(10)!r}); {ends}"
    monkeypatch.setattr("jobs.weekly.schedule._stopping", threading.Event())
    fire([sys.executable, "-c", code, "--config", str(_settings(tmp_path, "0 3 1 1 *"))], str(tmp_path / "mark"))
    added = [line for line in log.read_text().splitlines()[1:] if '"reasons"' in line]
    assert [reason for line in added for reason in json.loads(line)["reasons"]] == sent


def test_a_time_that_comes_while_a_retraining_runs_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log, endless = tmp_path / "runs" / "notices.jsonl", tmp_path / "endless"
    endless.write_text("#!/bin/sh\nexec sleep 60\n")
    endless.chmod(0o755)

    class Until:
        def wait(self) -> None:
            end = time.monotonic() + 30
            while not log.is_file() and time.monotonic() < end:
                time.sleep(0.1)

    monkeypatch.setattr("jobs.weekly.schedule.sys.executable", str(endless))
    monkeypatch.setattr("jobs.weekly.schedule.trigger_of", lambda _: IntervalTrigger(seconds=1, timezone="UTC"))
    monkeypatch.setattr("jobs.weekly.schedule._stopping", threading.Event())
    monkeypatch.setattr("jobs.weekly.schedule.threading", SimpleNamespace(Event=Until))
    schedule(load_config(_settings(tmp_path, "0 3 1 1 *")))
    notice = json.loads(log.read_text().splitlines()[0])
    assert notice["event"] == "MISSED"
    assert "was left out: the one before it still runs" in notice["text"]
    assert "FAILED" not in log.read_text()  # the scheduler stopped it
