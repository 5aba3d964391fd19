"""Raw records to registry: the main job once, or the loop that retrains on each new window of daily partitions."""

from __future__ import annotations

import contextlib
import datetime as dt
import hashlib
import json
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from jobs import release, stages, tables
from jobs.config import RetrainingConfig, RunConfig, load_config
from jobs.notices import Event, notify
from jobs.run_folder import DECISION, EXPORT, tracker_of
from pipeline.contracts import PromotionDecision, write_atomic
from pipeline.errors import HeldBack, InputError
from pipeline.ingestion.config import ANY_TASK, Replay
from pipeline.ingestion.partitions import (
    Partition,
    Window,
    check_clock,
    digest_partitions,
    find_partitions,
    plan_window,
)
from pipeline.ingestion.sources import SUFFIXES
from pipeline.modeling.base_model import fingerprint
from pipeline.progress import say
from pipeline.promotion.registry import Registry, Version

RESULT = "result.json"
"""Written last into a run's folder: the retraining of its key is finished."""
NOTICES = "notices.jsonl"
_OPERATION = ("complete_file", "lease_ttl_s", "every_days")
"""Keys of ``retraining`` that decide nothing about its outcome."""


def retrain(config: RunConfig, as_of: dt.date | None = None, dry_run: bool = False) -> dict[str, Any]:
    """Run every stage, raw records to registry, and show what came out.

    With ``retraining`` configured: on the daily partitions that are newer than the champion's.

    Args:
        config: of the run, or of the loop.
        as_of: partitions after this day are not looked at; today where none is given.
        dry_run: say what would be read, trained and compared, and do nothing.

    Raises:
        HeldBack: the gates did not let the candidate pass, everything else being done; or another process retrains.
        InputError: what is there cannot be retrained on.
    """
    if config.retraining is None:
        if as_of is not None or dry_run:
            raise InputError("--as-of and --dry-run are for daily partitions; configure retraining: {}, or use plan")
        return run_stages(config)
    registry = Registry(config.promotion.model_name, config.tracking.uri)
    if dry_run:
        plan = _plan(config, config.retraining, registry, as_of)
        return plan.summary() if isinstance(plan, _Plan) else {"verdict": "NOTHING_NEW", "reasons": [plan]}
    with _failures_noticed(config), registry.lease(config.retraining.lease_ttl_s) as lease:
        result = _retrain_window(config, config.retraining, registry, as_of, lease.check)
    return passed(result)


def passed(result: dict[str, Any]) -> dict[str, Any]:
    """Return a result.

    Raises:
        HeldBack: its verdict is to hold or reject.
    """
    if result["verdict"] in ("HOLD", "REJECT"):
        raise HeldBack(f"{result['verdict']}: {'; '.join(result['reasons'])}", result)
    return result


def nothing_to_do(config: RunConfig, as_of: dt.date | None = None) -> dict[str, Any] | None:
    """Return the result of a retraining for which no cluster is needed: nothing is new, or its key is finished.

    Raises:
        InputError: what is there cannot be retrained on.
    """
    if config.retraining is None:
        return None
    registry = Registry(config.promotion.model_name, config.tracking.uri)
    with _failures_noticed(config):
        if _interrupted(config, registry) is not None:
            return None
        plan = _plan(config, config.retraining, registry, as_of)
        return _finished(plan.run) if isinstance(plan, _Plan) else _nothing_new(config, plan)


def backfill(config: RunConfig, first: dt.date, last: dt.date) -> list[dict[str, Any]]:
    """Retrain as of each day from first to last, ``retraining.every_days`` apart, as if each had been its time.

    Raises:
        HeldBack: one of them was held back, all having been run; or another process retrains.
        InputError: no daily partitions are configured.
    """
    if config.retraining is None:
        raise InputError("--backfill is for daily partitions; configure retraining: {}")
    results = []
    for offset in range(0, (last - first).days + 1, config.retraining.every_days):
        day = first + dt.timedelta(days=offset)
        say(f"as of {day}:")
        try:
            results.append({"as_of": day.isoformat(), **retrain(config, day)})
        except HeldBack as held:
            if held.result is None:  # no verdict: another process holds the lease
                raise
            results.append({"as_of": day.isoformat(), **held.result})
    if held_back := [r["as_of"] for r in results if r["verdict"] in ("HOLD", "REJECT")]:
        raise HeldBack(f"held as of {', '.join(held_back)}", results)
    return results


def run_stages(config: RunConfig, may_go_on: Callable[[], None] | None = None) -> dict[str, Any]:
    """Run every stage of one run in order; each finds what it has done already.

    Args:
        config: of the run.
        may_go_on: asked between the stages and before the alias moves; what it raises ends the run there.

    Raises:
        HeldBack: the gates did not let the candidate pass; everything else is done.
    """
    ask = may_go_on or (lambda: None)
    stages.train(config)
    ask()
    trained, base = stages.evaluate(config)
    ask()
    folders = stages.export(config)
    decision = release.promote(config, ask)
    page = release.report(config)
    tracker_of(config).end()
    tables.show_evaluation(trained, base)
    tables.show_decision(decision)
    say(f"model   models:/{config.promotion.model_name}@champion in {config.tracking.shown}")
    say(f"exports {config.folder / EXPORT}: {', '.join(folder.name for folder in folders)}")
    say(f"report  {page}")
    links = {"version": decision.candidate, "report": str(page)}
    return passed({"verdict": decision.verdict, "reasons": list(decision.reasons), **links})


class _Plan:
    """What one retraining would read, train and compare."""

    def __init__(self, run: RunConfig, window: Window, champion: Version | None, read: list[Partition]) -> None:
        self.run, self.window, self.champion = run, window, champion
        self.size = sum(partition.size for partition in read)

    def summary(self) -> dict[str, Any]:
        """Return it as plain values, and say it."""
        summary = {
            "run": self.run.name,
            "train": [day.isoformat() for day in self.window.train],
            "holdout": [day.isoformat() for day in self.window.holdout],
            "replay": [day.isoformat() for day in self.window.replay] if self.window.replay else None,
            "bytes": self.size,
            "champion": self.champion.number if self.champion else None,
            "warm_start": self.run.training.warm_start is not None,
            "new_tasks": self.run.training.only_tasks or _new_tasks(self.run, self.champion),
            "unchanged_tasks": self._unchanged(),
            "retired_tasks": list(self.run.promotion.gates.retired),
            "seconds": _cost(self.run, self.size),
        }
        for name, value in summary.items():
            say(f"{name:>15}  {value}")
        return summary

    def _unchanged(self) -> list[str]:
        """Return the tasks that learn nothing from these days, nor will from them later."""
        trained = self.run.training.only_tasks
        return [task.name for task in self.run.tasks if task.name not in trained] if trained else []


def _plan(config: RunConfig, settings: RetrainingConfig, registry: Registry, as_of: dt.date | None) -> _Plan | str:
    """Return what is to be done, or in words why there is nothing to do.

    Raises:
        InputError: the partitions have a gap, also of one task; the champion is one of another base or has tasks that
            are not configured.
    """
    partitions = find_partitions(str(config.data.root), settings.complete_file)
    today = dt.datetime.now(dt.UTC).date()
    check_clock(partitions, today)
    champion = registry.champion()
    until = _trained_until(registry, champion)
    window = plan_window(
        partitions,
        until,
        as_of=as_of or today,
        holdout_days=settings.holdout_days,
        window_days=settings.window_days,
        replay_days=settings.replay_days,
        known_gaps=settings.known_gaps,
    )
    if window is None:
        return _why_nothing(config, settings, [p for p in partitions if p.day <= (as_of or today)], until)
    base = fingerprint(config.model)
    order, warm, drift = list(config.tasks), None, config.drift
    if champion is not None:
        _check_champion(config, settings, champion, base)
        known = _tasks_of(champion)
        _check_files(config, settings, [p for p in partitions if window.train[0] <= p.day <= window.train[1]], known)
        order = sorted(order, key=lambda task: known.index(task.name) if task.name in known else len(known))
        earlier = config.run_root / champion.tags.get("run", "") / "shards" / "manifest.json"
        if drift.against is None and earlier.is_file():
            drift = drift.model_copy(update={"against": str(earlier)})
        name = f"{config.promotion.model_name}-{registry.place}-{champion.number}"
        warm = config.run_root / "champions" / name
    read = [p for p in partitions if window.train[0] <= p.day <= window.holdout[1]]
    replayed = [p for p in partitions if window.replay and window.replay[0] <= p.day <= window.replay[1]]
    key = {
        "partitions": digest_partitions(str(config.data.root), read),
        "replay": digest_partitions(str(config.data.root), replayed),
        "config": config.digest(),
        "base": base,
        "champion": champion.number if champion else None,
        "gates": config.model_dump(mode="json", include={"promotion", "drift", "evaluation"}),
        "retraining": settings.model_dump(mode="json", exclude=set(_OPERATION)),
    }
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()
    windows = {"train": window.train, "test": window.holdout}
    replay = Replay(window=window.replay, share=settings.replay_share) if window.replay else None
    new = _new_tasks(config, champion)
    run = config.model_copy(
        update={
            "name": f"{config.name}-{window.holdout[1]}-{digest[:8]}",
            "tasks": tuple(order),
            "retraining": None,
            "drift": drift,
            "data": config.data.model_copy(
                update={"windows": windows, "replay": replay, "gaps": tuple(sorted(settings.known_gaps))}
            ),
            "training": config.training.model_copy(
                update={
                    "warm_start": warm if settings.warm_start else None,
                    "only_tasks": tuple(new) if settings.only_new_tasks and warm is not None else (),
                }
            ),
        }
    )
    return _Plan(run, window, champion, read)


def _retrain_window(
    config: RunConfig, settings: RetrainingConfig, registry: Registry, as_of: dt.date | None, holds_lease: Any
) -> dict[str, Any]:
    began = time.monotonic()
    if (path := _interrupted(config, registry)) is not None:
        say(f"{path.parent.name} was cut off after its promotion; finishing it")
        cut_off = load_config(path)
        run_stages(cut_off, holds_lease)
        _finish(config, cut_off, PromotionDecision.read(cut_off.folder / DECISION), {})
    plan = _plan(config, settings, registry, as_of)
    if not isinstance(plan, _Plan):
        return _nothing_new(config, plan)
    run = plan.run
    if (known := _finished(run)) is not None:
        return known
    plan.summary()
    if plan.champion is not None and run.training.warm_start is not None:
        _fetch(registry, plan.champion.number, run.training.warm_start)
    decision = _held_by_data(run, plan.champion, settings)
    if decision is not None:
        decision.write(run.folder / DECISION)
        tables.show_decision(decision)
    else:
        try:
            run_stages(run, partial(_may_go_on, registry, plan.champion, holds_lease))
        except HeldBack as held:
            if held.result is None:  # no verdict: another champion came
                _notice(config, "HOLD", [str(held)], run=run.name)
                raise
        decision = PromotionDecision.read(run.folder / DECISION)
    return _finish(config, run, decision, {"bytes": plan.size, "seconds": round(time.monotonic() - began, 1)})


def _may_go_on(registry: Registry, began_with: Version | None, holds_lease: Callable[[], None]) -> None:
    """Make sure that nobody else retrains, and that the champion is the one that this retraining began with.

    Raises:
        HeldBack: another version was made champion meanwhile, by hand or by a rollback.
    """
    holds_lease()
    before, now = (version.number if version else None for version in (began_with, registry.champion()))
    if now != before:
        raise HeldBack(
            f"the champion must stay the one that a retraining began with, version {before or 'none'}; version "
            f"{now} was made champion meanwhile: retrain again, from that one on"
        )


def _held_by_data(run: RunConfig, champion: Version | None, settings: RetrainingConfig) -> PromotionDecision | None:
    """Prepare the run's data; return the decision to hold where it has drifted too far or the champion fails on it."""
    try:
        stages.prepare(run)
    except HeldBack as held:
        number = str(champion.number) if champion else None
        return PromotionDecision(
            verdict="HOLD", reasons=(str(held),), candidate="none trained", champion=number, tasks={}
        )
    if champion is None or settings.max_champion_drop is None:
        return None
    return release.check_champion(run, champion, settings.max_champion_drop)


def _finish(config: RunConfig, run: RunConfig, decision: PromotionDecision, cost: dict[str, Any]) -> dict[str, Any]:
    """Send the notice and write the run's result."""
    page = run.folder / "report.html"
    links = {"version": decision.candidate, "run": run.name, "report": str(page) if page.is_file() else None}
    found = {"verdict": decision.verdict, "reasons": list(decision.reasons), **links, **cost}
    _notice(config, decision.verdict, list(decision.reasons), **links)
    write_atomic(run.folder / RESULT, json.dumps(found, indent=2) + "\n")
    return found


def _why_nothing(
    config: RunConfig, settings: RetrainingConfig, partitions: list[Partition], until: dt.date | None
) -> str:
    """Say why no day is left to train on, and which days only lack their marker."""
    new = [p for p in partitions if until is None or p.day > until]
    whole, half = ([p.day.isoformat() for p in new if p.whole is each] for each in (True, False))
    since = f"since {until}, the champion's last day," if until else "(no champion yet)"
    reason = f"no partition in {config.data.root} {since} has come whole"
    if whole:
        reason = (
            f"{whole} in {config.data.root} {'are' if len(whole) > 1 else 'is'} new, of which the newest "
            f"{settings.holdout_days} are for scoring: no day is left to train on"
        )
    if half:
        reason += (
            f"; {half[:7]} lack {settings.complete_file}: still being written, or their producer does not mark them"
        )
    return reason


def _nothing_new(config: RunConfig, reason: str) -> dict[str, Any]:
    _notice(config, "NOTHING_NEW", [reason])
    return {"verdict": "NOTHING_NEW", "reasons": [reason]}


def _finished(run: RunConfig) -> dict[str, Any] | None:
    """Return the result of a run that is finished, None of one that is not."""
    path = run.folder / RESULT
    if not path.is_file():
        return None
    known: dict[str, Any] = json.loads(path.read_text())
    say(f"{run.name} is finished: {known['verdict']}; nothing to do")
    return known


@contextlib.contextmanager
def _failures_noticed(config: RunConfig) -> Iterator[None]:
    try:
        yield
    except HeldBack:
        raise
    except Exception as error:  # a stop that was asked for, SystemExit or KeyboardInterrupt, is no failure
        first = next(iter(str(error).splitlines()), "stopped")
        _notice(config, "FAILED", [f"{type(error).__name__}: {first}"])
        raise


def _notice(config: RunConfig, event: Event, reasons: list[str], **links: Any) -> None:
    notify(config.notices, config.run_root / NOTICES, event, reasons, model=config.promotion.model_name, **links)


def _check_champion(config: RunConfig, settings: RetrainingConfig, champion: Version, base: str) -> None:
    theirs = champion.tags.get("base_fingerprint")
    if theirs != base and settings.warm_start:
        raise InputError(
            f"the champion must stand on the configured base to begin with it, version {champion.number} has base "
            f"{str(theirs)[:12]}, model.base is {base[:12]}; set retraining.warm_start=false to train from scratch"
        )
    names = {task.name for task in config.tasks}
    gone = [name for name in _tasks_of(champion) if name not in names and name not in config.promotion.gates.retired]
    if gone:
        raise InputError(
            f"every task of the champion must be configured or named as retired, version {champion.number} answers "
            f"{gone} too; configure them or add them to promotion.gates.retired"
        )


def _check_files(config: RunConfig, settings: RetrainingConfig, days: list[Partition], known: list[str]) -> None:
    """Refuse days that lack a task of the champion: their records would never be read when they come later."""
    if ANY_TASK in config.data.files:
        return
    missing = [
        f"{partition.day}/{task.name}"
        for partition in days
        if partition.whole and partition.day not in settings.known_gaps
        for task in config.tasks
        if task.name in known
        and task.name not in config.data.files
        and not any(f"{task.name}{suffix}" in partition.files for suffix in SUFFIXES)
    ]
    if missing:
        raise InputError(
            f"every day must have records of every task that the champion knows, {config.data.root} lacks "
            f"{missing[:5]} ({len(missing)} in all); bring them, name the task in promotion.gates.retired, or the day "
            "in retraining.known_gaps"
        )


def _trained_until(registry: Registry, champion: Version | None) -> dt.date | None:
    """Return the last day that the champion was trained on; None without a champion.

    Raises:
        InputError: there is one that does not say.
    """
    if champion is None:
        say(f"model {registry.name!r} has no champion yet: the first window is read")
        return None
    day = champion.tags.get("trained_until", "")
    if not day:
        raise InputError(
            f"the champion must say until which day it was trained, version {champion.number} of {registry.name!r} "
            "does not; it was made without daily partitions: choose another promotion.model_name"
        )
    return dt.date.fromisoformat(day)


def _tasks_of(champion: Version) -> list[str]:
    names: list[str] = json.loads(champion.tags.get("tasks", "[]"))
    return names


def _new_tasks(config: RunConfig, champion: Version | None) -> list[str]:
    known = _tasks_of(champion) if champion else []
    return [task.name for task in config.tasks if task.name not in known] if champion else []


def _fetch(registry: Registry, number: int, folder: Path) -> None:
    """Fetch a version's adapter into a folder, whole or not at all."""
    if folder.is_dir():
        return
    staged = folder.with_name(f".{folder.name}")
    predictor = registry.download(number, staged)
    folder.parent.mkdir(parents=True, exist_ok=True)
    predictor.rename(folder)


def _interrupted(config: RunConfig, registry: Registry) -> Path | None:
    """Return the configuration of the run that made the champion, where it was killed after the promotion."""
    champion = registry.champion()
    name = champion.tags.get("run", "") if champion else ""
    path = config.run_root / name / "config.yaml"
    return path if name and path.is_file() and not (path.parent / RESULT).is_file() else None


def _cost(run: RunConfig, size: int) -> float | None:
    """Return the seconds that the newest finished run took, in proportion to the bytes read; None if unknown."""
    head = run.name.rsplit("-", 4)[0]
    for path in sorted(run.run_root.glob(f"{head}-*/{RESULT}"), reverse=True):
        known = json.loads(path.read_text())
        if known.get("seconds") and known.get("bytes"):
            return round(known["seconds"] * size / known["bytes"])
    return None
