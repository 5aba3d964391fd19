"""One retraining of the loop, from what is new to the notice; and several, for days that have passed.

lease → finish what was cut off → plan → fetch the champion → prepare and look at the data → the main job → notice
"""

from __future__ import annotations

import contextlib
import datetime as dt
import json
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from jobs import tables
from jobs.config import RetrainingConfig, RunConfig, load_config
from jobs.main_job import main_job, passed, run_stage
from jobs.notices import Event, notify
from jobs.run import Run, root_file
from jobs.run_folder import DECISION, RunFolder
from jobs.weekly import champion as champions
from jobs.weekly.plan import NothingNew, RetrainingPlan, gather_digests, gather_facts, plan_retraining
from pipeline.contracts import PromotionDecision, write_atomic
from pipeline.errors import HeldBack, InputError
from pipeline.json_text import parse_json
from pipeline.orchestration.environment import is_on_lasting_cluster
from pipeline.progress import say
from pipeline.promotion.policy import hold_untrained
from pipeline.promotion.registry import Registry

NOTICES = "notices.jsonl"


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
        return main_job(Run(config))
    registry = Registry(config.promotion.model_name, config.tracking.uri)
    if dry_run:
        planned = _planned(config, config.retraining, registry, as_of)
        return _show(*planned) if isinstance(planned, tuple) else _nothing(planned)
    with _failures_noticed(config), registry.lease(config.retraining.lease_ttl_s) as lease:
        result = _retrain_once(config, config.retraining, registry, as_of, lease.check)
    return passed(result)


def nothing_to_do(config: RunConfig, as_of: dt.date | None = None) -> dict[str, Any] | None:
    """Return the result of a retraining for which no cluster is needed: nothing is new, or its key is finished.

    Raises:
        InputError: what is there cannot be retrained on.
    """
    if config.retraining is None:
        return None
    registry = Registry(config.promotion.model_name, config.tracking.uri)
    with _failures_noticed(config):
        if _cut_off(config, registry) is not None:
            return None
        planned = _planned(config, config.retraining, registry, as_of)
        if isinstance(planned, NothingNew):
            _notice(config, "NOTHING_NEW", [planned.reason])
            return _nothing(planned)
        return _finished(planned[1])


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


Planned = tuple[RetrainingPlan, RunConfig]


def _planned(
    config: RunConfig, settings: RetrainingConfig, registry: Registry, as_of: dt.date | None
) -> Planned | NothingNew:
    """Return the plan with the configuration of its run."""
    plan = plan_retraining(config, settings, gather_facts(config, settings, registry, as_of))
    if isinstance(plan, NothingNew):
        return plan
    if plan.champion is None:
        say(f"model {registry.name!r} has no champion yet: the first window is read")
    warm = champions.adapter_folder(config, registry, plan.champion) if plan.champion else None
    return plan, plan.run_config(settings, gather_digests(plan), warm)


def _retrain_once(
    config: RunConfig,
    settings: RetrainingConfig,
    registry: Registry,
    as_of: dt.date | None,
    holds_lease: Callable[[], int],
) -> dict[str, Any]:
    began = time.monotonic()
    if (path := _cut_off(config, registry)) is not None:
        say(f"{path.parent.name} was cut off after its promotion; finishing it")
        run = Run(load_config(path), holds_lease)
        main_job(run)
        _finish(config, run, run.folder.read(DECISION), {})
    planned = _planned(config, settings, registry, as_of)
    if isinstance(planned, NothingNew):
        _notice(config, "NOTHING_NEW", [planned.reason])
        return _nothing(planned)
    plan, run_config = planned
    if (known := _finished(run_config)) is not None:
        return known
    _show(plan, run_config)
    if plan.champion is not None and run_config.training.warm_start is not None:
        champions.fetch(registry, plan.champion, run_config.training.warm_start)
    run = Run(run_config, partial(champions.check_unchanged, registry, plan.champion, holds_lease))
    decision = _held_by_data(run, plan, settings) or _trained(config, run)
    return _finish(config, run, decision, {"bytes": plan.bytes, "seconds": round(time.monotonic() - began, 1)})


def _held_by_data(run: Run, plan: RetrainingPlan, settings: RetrainingConfig) -> PromotionDecision | None:
    """Prepare the run's data; return the decision to hold where it has drifted too far or the champion fails on it."""
    champion, decision = plan.champion, None
    try:
        run_stage(run, "prepare")
    except HeldBack as held:
        decision = hold_untrained([str(held)], champion.number if champion else None)
    if decision is None and champion is not None and settings.max_champion_drop is not None:
        decision = champions.check_fall(run, champion, settings.max_champion_drop)
    if decision is not None:
        run.folder.write(DECISION, decision)
        tables.show_decision(decision)
    return decision


def _trained(config: RunConfig, run: Run) -> PromotionDecision:
    """Run the main job and return its decision."""
    try:
        main_job(run)
    except HeldBack as held:
        if held.result is None:  # no verdict: another champion came
            _notice(config, "HOLD", [str(held)], run=run.config.name)
            raise
    return run.folder.read(DECISION)


def _finish(config: RunConfig, run: Run, decision: PromotionDecision, cost: dict[str, Any]) -> dict[str, Any]:
    """Send the notice and write the run's result."""
    page = run.folder.page
    links = {
        "version": decision.candidate,
        "run": run.config.name,
        "report": str(page) if page.is_file() else None,
    }
    found = {"verdict": decision.verdict, "reasons": list(decision.reasons), **links, **cost}
    _notice(config, decision.verdict, list(decision.reasons), **links)
    write_atomic(run.folder.result, json.dumps(found, indent=2) + "\n")
    run.keep()
    return found


def _show(plan: RetrainingPlan, run: RunConfig) -> dict[str, Any]:
    summary = plan.summary(run, _seconds_expected(run, plan.bytes))
    for name, value in summary.items():
        say(f"{name:>15}  {value}")
    return summary


def _seconds_expected(run: RunConfig, size: int) -> float | None:
    """Return the seconds that the newest finished run took, in proportion to the bytes read; None if unknown."""
    head = run.name.rsplit("-", 4)[0]
    for path in sorted(run.run_root.glob(f"{head}-*/{RunFolder(Path()).result.name}"), reverse=True):
        known = parse_json(path.read_text())
        if known.get("seconds") and known.get("bytes"):
            return round(known["seconds"] * size / known["bytes"])
    return None


def _nothing(found: NothingNew) -> dict[str, Any]:
    return {"verdict": "NOTHING_NEW", "reasons": [found.reason]}


def _finished(run: RunConfig) -> dict[str, Any] | None:
    """Return the result of a run that is finished, None of one that is not."""
    path = Run(run).fetch(RunFolder(run.folder).result)
    if not path.is_file():
        return None
    known: dict[str, Any] = parse_json(path.read_text())
    say(f"{run.name} is finished: {known['verdict']}; nothing to do")
    return known


def _cut_off(config: RunConfig, registry: Registry) -> Path | None:
    """Return the configuration of the run that made the champion, where it was killed after the promotion."""
    champion = registry.champion()
    if champion is None:
        return None
    run = Run(config).other(champion.provenance.run)
    files = RunFolder(run.config.folder)
    cut_off = run.fetch(files.config).is_file() and not run.fetch(files.result).is_file()
    return files.config if cut_off else None


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
    with root_file(config, NOTICES) as log:
        notify(config.notices, log, event, reasons, model=config.promotion.model_name, **links)
    if is_on_lasting_cluster(config.ray.address):
        from pipeline.orchestration.metrics import tell_of_model  # imports Ray

        tell_of_model(config.ray, config.promotion.model_name, outcome=event)
