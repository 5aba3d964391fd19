"""What one retraining reads, trains and compares: a pure function of the facts, and the facts' gathering.

gather facts → :func:`plan_retraining` → gather digests of what is read → :meth:`RetrainingPlan.run_config`
"""

from __future__ import annotations

import datetime as dt
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jobs.config import RetrainingConfig, RunConfig
from jobs.run_folder import RunFolder
from pipeline.errors import InputError
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
from pipeline.promotion.registry import Registry, Version
from pipeline.retry import persistently
from pipeline.storage import exists, filesystem

_OPERATION = ("complete_file", "lease_ttl_s", "every_days")
"""Keys of ``retraining`` that decide nothing about its outcome."""


@dataclass(frozen=True)
class Facts:
    """What a retraining is planned from.

    Args:
        partitions: the daily partitions that are there, by day.
        today: by this machine's clock.
        as_of: later days are not looked at.
        champion: the present one; None where there is none yet.
        anchor: the best earlier champion, the champion itself where there is no better.
        earlier_manifest: of the shards that the champion was trained on, where they stand still.
    """

    partitions: tuple[Partition, ...]
    today: dt.date
    as_of: dt.date
    champion: Version | None = None
    anchor: Version | None = None
    earlier_manifest: str | None = None


@dataclass(frozen=True)
class Digests:
    """What identifies the content that a plan reads.

    Args:
        base: fingerprint of the base model.
        partitions: day → digest of what is trained and scored on.
        replay: day → digest of what is replayed.
    """

    base: str
    partitions: Mapping[str, str]
    replay: Mapping[str, str]


@dataclass(frozen=True)
class NothingNew:
    """There is nothing to retrain on.

    Args:
        reason: why, in words.
    """

    reason: str


@dataclass(frozen=True)
class RetrainingPlan:
    """What one retraining would read, train and compare.

    Args:
        config: the loop's configuration.
        window: the days.
        champion: that it begins with and is held against; None where there is none yet.
        anchor: that a candidate is held against beside the champion; the champion where there is no better.
        drift_against: manifest of the earlier data; None for no comparison.
        read: partitions trained and scored on.
        replayed: older partitions of which a share is mixed in.
    """

    config: RunConfig
    window: Window
    champion: Version | None
    anchor: Version | None
    drift_against: str | None
    read: tuple[Partition, ...]
    replayed: tuple[Partition, ...]

    @property
    def bytes(self) -> int:
        """Size of what is read, replayed days aside."""
        return sum(partition.size for partition in self.read)

    @property
    def new_tasks(self) -> tuple[str, ...]:
        """Tasks that the champion does not know, none without a champion."""
        if self.champion is None:
            return ()
        known = self.champion.provenance.tasks
        return tuple(task.name for task in self.config.tasks if task.name not in known)

    @property
    def scored(self) -> list[str]:
        """The models that are scored on the holdout, each one pass over it."""
        versions = {v.number: v for v in (self.champion, self.anchor) if v is not None}
        return ["challenger", "untrained base", *(f"version {number}" for number in versions)]

    def run_config(self, settings: RetrainingConfig, digests: Digests, warm_start: Path | None) -> RunConfig:
        """Return the configuration of the run that does it; its name holds a digest of all that decides its outcome.

        Args:
            settings: of the loop.
            digests: of what is read.
            warm_start: where the champion's adapter will lie; None without a champion.

        Raises:
            InputError: the champion stands on another base.
        """
        config = self.config
        if self.champion is not None:
            _check_base(settings, self.champion, digests.base)
        warm = warm_start if settings.warm_start else None
        order = list(config.tasks)
        if self.champion is not None:
            known = self.champion.provenance.tasks
            order.sort(key=lambda task: known.index(task.name) if task.name in known else len(known))
        replay = Replay(window=self.window.replay, share=settings.replay_share) if self.window.replay else None
        windows = {"train": self.window.train, "test": self.window.holdout}
        data = {"windows": windows, "replay": replay, "gaps": tuple(sorted(settings.known_gaps))}
        only = self.new_tasks if settings.only_new_tasks and warm is not None else ()
        return config.model_copy(
            update={
                "name": f"{config.name}-{self.window.holdout[1]}-{self._key(settings, digests)[:8]}",
                "tasks": tuple(order),
                "retraining": None,
                "drift": config.drift.model_copy(update={"against": self.drift_against}),
                "data": config.data.model_copy(update=data),
                "training": config.training.model_copy(update={"warm_start": warm, "only_tasks": only}),
            }
        )

    def _key(self, settings: RetrainingConfig, digests: Digests) -> str:
        key = {
            "partitions": dict(digests.partitions),
            "replay": dict(digests.replay),
            "config": self.config.digest(),
            "base": digests.base,
            "champion": self.champion.number if self.champion else None,
            "gates": self.config.model_dump(mode="json", include={"promotion", "drift", "evaluation"}),
            "retraining": settings.model_dump(mode="json", exclude=set(_OPERATION)),
        }
        return hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()

    def summary(self, run: RunConfig, seconds: float | None) -> dict[str, Any]:
        """Return it as plain values, in the order one would read them."""
        window, trained = self.window, run.training.only_tasks
        return {
            "run": run.name,
            "train": [day.isoformat() for day in window.train],
            "holdout": [day.isoformat() for day in window.holdout],
            "replay": [day.isoformat() for day in window.replay] if window.replay else None,
            "bytes": self.bytes,
            "champion": self.champion.number if self.champion else None,
            "anchor": self.anchor.number if self.anchor else None,
            "scored": self.scored,
            "warm_start": run.training.warm_start is not None,
            "new_tasks": list(self.new_tasks),
            "unchanged_tasks": [task.name for task in run.tasks if task.name not in trained] if trained else [],
            "retired_tasks": list(run.promotion.gates.retired),
            "seconds": seconds,
        }


def gather_facts(config: RunConfig, settings: RetrainingConfig, registry: Registry, as_of: dt.date | None) -> Facts:
    """Look at the storage and the registry.

    Raises:
        InputError: there are no partitions.
    """
    today = dt.datetime.now(dt.UTC).date()
    partitions = tuple(find_partitions(str(config.data.root), settings.complete_file))
    champion = registry.champion()
    root = config.store_root or config.run_root
    manifest = f"{root}/{champion.provenance.run}/{RunFolder(Path()).manifest}" if champion else None
    earlier = manifest if manifest is not None and _is_there(manifest) else None
    anchor = registry.anchor([task.name for task in config.tasks], config.promotion.anchor)
    return Facts(partitions, today, as_of or today, champion, anchor, earlier)


def _is_there(location: str) -> bool:
    fs, path = filesystem(location)
    return persistently(lambda: exists(fs, path), location)


def gather_digests(plan: RetrainingPlan) -> Digests:
    """Look at the content of what a plan reads, and at the base model."""
    from pipeline.modeling.base_model import fingerprint

    root = str(plan.config.data.root)
    read, replayed = (digest_partitions(root, each) for each in (plan.read, plan.replayed))
    return Digests(fingerprint(plan.config.model), read, replayed)


def plan_retraining(config: RunConfig, settings: RetrainingConfig, facts: Facts) -> RetrainingPlan | NothingNew:
    """Plan one retraining: a pure function.

    Args:
        config: of the loop.
        settings: its ``retraining``.
        facts: what there is.

    Raises:
        InputError: the partitions have a gap, also of one task, or lie in the future; the champion has tasks that are
            not configured, or does not say until when it was trained.
    """
    check_clock(facts.partitions, facts.today)
    until = _trained_until(config, facts.champion)
    window = plan_window(
        facts.partitions,
        until,
        as_of=facts.as_of,
        holdout_days=settings.holdout_days,
        window_days=settings.window_days,
        replay_days=settings.replay_days,
        known_gaps=settings.known_gaps,
    )
    if window is None:
        seen = [partition for partition in facts.partitions if partition.day <= facts.as_of]
        return NothingNew(_why_nothing(config, settings, seen, until))
    against = config.drift.against
    if facts.champion is not None:
        _check_tasks(config, facts.champion)
        trained = [p for p in facts.partitions if window.train[0] <= p.day <= window.train[1]]
        check_files(config, settings, trained, facts.champion.provenance.tasks)
        if against is None and facts.earlier_manifest is not None:
            against = facts.earlier_manifest
    read = tuple(p for p in facts.partitions if window.train[0] <= p.day <= window.holdout[1])
    replayed = tuple(p for p in facts.partitions if window.replay and window.replay[0] <= p.day <= window.replay[1])
    return RetrainingPlan(config, window, facts.champion, facts.anchor, against, read, replayed)


def check_files(config: RunConfig, settings: RetrainingConfig, days: Sequence[Partition], known: Sequence[str]) -> None:
    """Refuse days that lack a task of the champion: their records would never be read when they come later.

    Raises:
        InputError: a day does.
    """
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


def _check_base(settings: RetrainingConfig, champion: Version, base: str) -> None:
    theirs = champion.provenance.base_fingerprint
    if theirs != base and settings.warm_start:
        raise InputError(
            f"the champion must stand on the configured base to begin with it, version {champion.number} has base "
            f"{str(theirs)[:12]}, model.base is {base[:12]}; set retraining.warm_start=false to train from scratch"
        )


def _check_tasks(config: RunConfig, champion: Version) -> None:
    names = {task.name for task in config.tasks}
    gone = [
        name for name in champion.provenance.tasks if name not in names and name not in config.promotion.gates.retired
    ]
    if gone:
        raise InputError(
            f"every task of the champion must be configured or named as retired, version {champion.number} answers "
            f"{gone} too; configure them or add them to promotion.gates.retired"
        )


def _trained_until(config: RunConfig, champion: Version | None) -> dt.date | None:
    if champion is None:
        return None
    day = champion.provenance.trained_until
    if day is None:
        raise InputError(
            f"the champion must say until which day it was trained, version {champion.number} of "
            f"{config.promotion.model_name!r} does not; it was made without daily partitions: choose another "
            "promotion.model_name"
        )
    return day


def _why_nothing(
    config: RunConfig, settings: RetrainingConfig, partitions: Sequence[Partition], until: dt.date | None
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
