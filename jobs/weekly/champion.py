"""The present champion in the loop: its adapter fetched, its health on the newest days, and that it stays the one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from jobs.config import RunConfig
from jobs.run import Run
from pipeline.contracts import PromotionDecision
from pipeline.errors import HeldBack
from pipeline.progress import say
from pipeline.promotion.policy import champion_fall
from pipeline.promotion.registry import Registry, Version


def adapter_folder(config: RunConfig, registry: Registry, champion: Version) -> Path:
    """Return where the champion's adapter lies, or will."""
    return config.run_root / "champions" / f"{registry.name}-{registry.place}-{champion.number}"


def fetch(registry: Registry, champion: Version, folder: Path) -> None:
    """Fetch the champion's adapter into a folder, whole or not at all.

    Raises:
        InputError: its files, there since earlier or fetched now, are not those that were registered.
    """
    if folder.is_dir():
        registry.check_files(champion, folder)
        return
    staged = folder.with_name(f".{folder.name}")
    predictor = registry.download(champion.number, staged)
    folder.parent.mkdir(parents=True, exist_ok=True)
    predictor.rename(folder)


def check_unchanged(registry: Registry, began_with: Version | None, holds_lease: Callable[[], int]) -> int:
    """Make sure that nobody else retrains, and that the champion is the one that this retraining began with.

    Returns:
        The number of the lease that is held.

    Raises:
        HeldBack: another version was made champion meanwhile, by hand or by a rollback.
    """
    lease = holds_lease()
    before, now = (version.number if version else None for version in (began_with, registry.champion()))
    if now != before:
        raise HeldBack(
            f"the champion must stay the one that a retraining began with, version {before or 'none'}; version "
            f"{now} was made champion meanwhile: retrain again, from that one on"
        )
    return lease


def check_fall(run: Run, champion: Version, max_drop: float) -> PromotionDecision | None:
    """Score the champion on the newest days before anything is trained; hold where it fell too far.

    A champion that answers last week's traffic and fails on this week's speaks of changed labels or data: a candidate
    trained on them would win on them too.

    Args:
        run: prepared, nothing trained yet.
        champion: the present one.
        max_drop: how far a task's metric may lie below what it was when the champion was promoted: its whole 95 %
            interval must not lie lower.

    Returns:
        The decision to hold, None where all is well.
    """
    from jobs.scoring import score, version_model

    (found,) = score(run, version_model(run, run.registry, champion))
    for name, result in found.report.tasks.items():
        if result.ci95 is None:
            say(f"{name}: whether the champion fell on the newest days is not known: {result.reason}")
    return champion_fall(found.report, champion.provenance, champion.number, max_drop)
