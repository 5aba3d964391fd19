"""A scheduler for one machine: retrains by a cron line, catches a missed run up once, stops gracefully.

A cluster has its own: see :mod:`jobs.cluster.manifests`.
"""

from __future__ import annotations

import datetime as dt
import json
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

from apscheduler.events import EVENT_JOB_MAX_INSTANCES, JobSubmissionEvent
from apscheduler.executors.pool import ThreadPoolExecutor
from apscheduler.jobstores.sqlalchemy import SQLAlchemyJobStore
from apscheduler.schedulers.background import BackgroundScheduler
from apscheduler.triggers.cron import CronTrigger

from jobs.config import RunConfig, ScheduleConfig, load_config
from jobs.notices import Event, notify
from jobs.weekly.loop import NOTICES
from pipeline.errors import InputError
from pipeline.progress import say

_LATE = dt.timedelta(minutes=1)
_GRACE_S = 180
"""Seconds that a retraining gets to save its work when the scheduler is stopped; its own job gets 120 of them."""
_running: set[subprocess.Popen[bytes]] = set()
_starting, _stopping = threading.Lock(), threading.Event()
_RUNNING = "schedule.running"


def trigger_of(config: ScheduleConfig) -> CronTrigger:
    """Return the times of a schedule.

    Raises:
        InputError: the cron line or the time zone is none, or the line never fires.
    """
    try:
        zone = ZoneInfo(config.timezone)
    except (ZoneInfoNotFoundError, ValueError, OSError) as error:
        raise InputError(
            f"schedule.timezone must be a name such as Europe/Paris, got {config.timezone!r}; fix it"
        ) from error
    try:
        *fields, weekday = config.cron.split()
        named = _weekdays(weekday)
        trigger = CronTrigger.from_crontab(" ".join([*fields, named]), timezone=zone)
    except ValueError as error:
        raise InputError(
            f"schedule.cron must be five fields such as '0 3 * * 1', got {config.cron!r}: {error}; fix it"
        ) from error
    if named != "*" and not re.fullmatch(r"(\*|1-31)(/1)?", fields[2]):
        raise InputError(
            f"schedule.cron must restrict the day of the month or the day of the week, not both, got {config.cron!r}: "
            "cron fires on either, this scheduler where both are met; put * for one of them"
        )
    if trigger.get_next_fire_time(None, dt.datetime.now(zone)) is None:
        raise InputError(f"schedule.cron must name a time that comes, {config.cron!r} never fires; fix it")
    return trigger


def _weekdays(field: str) -> str:
    """Return the names of the days of the week that a field of cron means: the trigger counts them otherwise.

    Raises:
        ValueError: the field means none.
    """
    days: set[int] = set()
    for part in field.lower().split(","):
        found = re.fullmatch(rf"(?:\*|({_DAY})(?:-({_DAY}))?)(?:/(\d+))?", part)
        first, last, step = found.groups() if found else (None, None, None)
        if found is None or step == "0" or (step and first and not last):
            raise ValueError(f"{part!r} names no days of the week; write 0 to 7, sun to sat, or ranges of them")
        begin, end = _day(first or "0"), _day(last or first or "6")
        if last == "sun" and begin:
            end = 7
        if begin > end:
            raise ValueError(f"{part!r} runs backwards; write two ranges, with a comma between them")
        days.update(day % 7 for day in range(begin, end + 1, int(step or 1)))
    return "*" if len(days) == 7 else ",".join(_WEEKDAYS[day] for day in sorted(days))


def _day(text: str) -> int:
    return int(text) if text.isdigit() else _WEEKDAYS.index(text)


def schedule(config: RunConfig) -> None:
    """Retrain at every time of the schedule until the process is told to stop.

    Times at which no scheduler ran are caught up once, however many they are, and a notice is sent. Two schedulers
    may run: the lease lets one retraining go on.

    Raises:
        InputError: the schedule is none, or there is nothing to retrain on.
    """
    if config.retraining is None:
        raise InputError("schedule retrains on daily partitions; configure retraining: {}")
    if config.store_root is not None:
        raise InputError(
            f"schedule keeps its times in a database on a disk, which run_root {config.store_root!r} is not; name a "
            "run_root on a disk, or let a clock that the cluster has, such as a CronJob, call retrain"
        )
    trigger = trigger_of(config.schedule)
    path = config.write()
    store = SQLAlchemyJobStore(url=f"sqlite:///{config.folder / 'schedule.db'}")
    scheduler = BackgroundScheduler(
        jobstores={"default": store},
        executors={"default": ThreadPoolExecutor(1)},
        job_defaults={"coalesce": True, "max_instances": 1, "misfire_grace_time": None},
        timezone=trigger.timezone,
    )
    command = [sys.executable, "-m", "jobs.cli", "retrain", "--config", str(path)]

    def skipped(event: JobSubmissionEvent) -> None:
        for time in event.scheduled_run_times:
            words = f"the run of {time:%Y-%m-%d %H:%M %Z} was left out: the one before it still runs"
            _notice(config, "MISSED", words)

    scheduler.add_listener(skipped, EVENT_JOB_MAX_INSTANCES)
    first = _remember(scheduler, store, config, trigger, command)
    try:
        # In a thread of its own: it swallows what a signal raises, SystemExit too, while it calls a listener.
        scheduler.start()
        say(f"retraining {config.promotion.model_name} at '{config.schedule.cron}' {trigger.timezone}, next {first}")
        threading.Event().wait()
    finally:
        if scheduler.running:
            scheduler.shutdown(wait=False)
        stop_running()


def _remember(
    scheduler: BackgroundScheduler,
    store: SQLAlchemyJobStore,
    config: RunConfig,
    trigger: CronTrigger,
    command: Sequence[str],
) -> dt.datetime | None:
    """Add the job, or keep the one that was stored under the same schedule; return its next time, past or to come."""
    store.start(scheduler, "default")  # so that it can be asked before the scheduler runs
    known = store.lookup_job(_JOB)
    now = dt.datetime.now(trigger.timezone)
    upcoming = trigger.get_next_fire_time(None, now)
    due = known.next_run_time if known is not None and str(known.trigger) == str(trigger) else None
    if due is not None and due < now - _LATE:
        words = f"the run of {due:%Y-%m-%d %H:%M %Z} was missed: no scheduler ran; catching up now"
        _notice(config, "MISSED", words)
    first = due if due is not None and due < now else upcoming
    mark = config.folder / _RUNNING
    if mark.exists() and config.retraining is not None:
        first = now + dt.timedelta(seconds=config.retraining.lease_ttl_s + 1)
        say(
            "the last retraining was cut off with its scheduler; "
            f"going on with it at {first:%Y-%m-%d %H:%M:%S %Z}, when a dead one's lease has expired"
        )
    add: Callable[..., Any] = scheduler.add_job
    add(fire, trigger, args=[list(command), str(mark)], id=_JOB, replace_existing=True, next_run_time=first)
    return first


def fire(command: Sequence[str], mark: str) -> int:
    """Run one retraining as a process of its own and return its exit code.

    A notice is sent where it failed and sent none itself: it was killed, or its job was.

    Args:
        command: to run; it names its configuration's file after ``--config``.
        mark: file that is there as long as the command has not ended by itself.
    """
    Path(mark).touch()
    config = load_config(Path(command[command.index("--config") + 1]))
    before = _outcomes(config)
    with _starting:
        process = subprocess.Popen(list(command))
        _running.add(process)
    try:
        code = process.wait()
    finally:
        _running.discard(process)
    if not _stopping.is_set():
        Path(mark).unlink(missing_ok=True)  # a second scheduler may have been here
    words = f"retraining ended with exit code {code} ({_MEANING.get(code, 'failed')})"
    say(words)
    failed = code < 0 or (code not in (0, 3, *_STOPPED) and _outcomes(config) == before)
    if failed and not _stopping.is_set():
        _notice(config, "FAILED", f"{words}; see the scheduler's log")
    return code


def _notice(config: RunConfig, event: Event, words: str) -> None:
    notify(config.notices, config.run_root / NOTICES, event, [words], model=config.promotion.model_name)


def _outcomes(config: RunConfig) -> int:
    """Count the notices that this model's retrainings have sent themselves."""
    path, model = config.run_root / NOTICES, json.dumps({"model": config.promotion.model_name})[1:-1]
    lines = path.read_text().splitlines() if path.is_file() else []
    return sum(model in line and '"event": "MISSED"' not in line for line in lines)  # one may be cut off


def stop_running() -> None:
    """Ask a running retraining to stop, and wait until it has saved its work."""
    _stopping.set()
    with _starting:
        running = list(_running)
    for process in running:
        process.terminate()
        try:
            process.wait(timeout=_GRACE_S)
        except subprocess.TimeoutExpired:
            process.kill()


_WEEKDAYS = ("sun", "mon", "tue", "wed", "thu", "fri", "sat")
_DAY = "|".join(["[0-7]", *_WEEKDAYS])
_JOB = "retrain"
_STOPPED = (128 + signal.SIGINT, 128 + signal.SIGTERM)
_MEANING = {0: "done", 2: "bad input", 3: "held back"}
