"""Drift between two preparations: how far this window's data lies from an earlier one's."""

from __future__ import annotations

import posixpath
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, Self

import numpy as np
from pydantic import Field, model_validator

from pipeline.contracts import Contract
from pipeline.ingestion.profile import PROFILE, DataProfile, TaskProfile
from pipeline.retry import persistently
from pipeline.settings import Settings
from pipeline.storage import filesystem, is_remote

Verdict = Literal["ok", "warn", "hold"]
_RANK: dict[Verdict, int] = {"ok": 0, "warn": 1, "hold": 2}
_VERDICTS: tuple[Verdict, ...] = ("ok", "warn", "hold")


class Threshold(Settings):
    """From which value on a measure warns, and from which it holds the run back."""

    warn: float = Field(ge=0)
    """From this value on the measure is shown as drifted."""
    hold: float = Field(ge=0)
    """From this value on the run is held back."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.warn > self.hold:
            raise ValueError(
                f"a threshold must warn before it holds, got warn {self.warn} > hold {self.hold}; swap them"
            )
        return self


class DriftThresholds(Settings):
    """Thresholds of each measure; the population stability index has 0.1 and 0.25 by custom of credit scoring."""

    label_psi: Threshold = Threshold(warn=0.1, hold=0.25)
    """Population stability index of the labels, less what chance alone gives."""
    length_psi: Threshold = Threshold(warn=0.1, hold=0.25)
    """The same of the texts' lengths."""
    new_words: Threshold = Threshold(warn=0.1, hold=0.3)
    """Share of the words that the earlier samples lack, less what they lack of themselves."""
    more_rejected: Threshold = Threshold(warn=0.02, hold=0.1)
    """Rise of the share of invalid records."""


class DriftConfig(Settings):
    """Whether and how strictly new data is held against earlier data."""

    against: str | None = None
    """Earlier shards: their ``manifest.json`` or its folder, a path or URL; None for no comparison."""
    thresholds: DriftThresholds = DriftThresholds()
    """Of each measure."""


class DriftMeasure(Contract):
    """One measure of one task."""

    value: float
    verdict: Verdict


class DriftReport(Contract):
    """How far the tasks have drifted; ``hold`` where any measure holds."""

    verdict: Verdict
    tasks: dict[str, dict[str, DriftMeasure]]
    reasons: tuple[str, ...]
    """Each measure past a threshold, in words, the worst first."""
    new_tasks: tuple[str, ...] = ()
    dropped_tasks: tuple[str, ...] = ()


def compare_drift(earlier: str | Path, current: str | Path, thresholds: DriftThresholds | None = None) -> DriftReport:
    """Compare two preparations, each named by its folder or manifest, a path or URL, by their profiles.

    Raises:
        InputError: one has no profile, or it cannot be read.
    """
    before, now = (profile_of(str(place).rstrip("/")) for place in (earlier, current))
    return drift_of(before, now, thresholds or DriftThresholds())


def drift_of(before: DataProfile, now: DataProfile, thresholds: DriftThresholds) -> DriftReport:
    """Compare two profiles: a pure function of them and the thresholds."""
    tasks: dict[str, dict[str, DriftMeasure]] = {}
    found: list[tuple[Verdict, str]] = []
    for task in sorted(before.tasks.keys() & now.tasks.keys()):
        tasks[task] = {}
        for name, value in _measures(before.tasks[task], now.tasks[task]).items():
            threshold: Threshold = getattr(thresholds, name)
            verdict = _VERDICTS[int(value >= threshold.warn) + int(value >= threshold.hold)]
            tasks[task][name] = DriftMeasure(value=float(value), verdict=verdict)
            if verdict != "ok":
                limit = threshold.hold if verdict == "hold" else threshold.warn
                found.append((verdict, f"{verdict}: task {task!r}: {name} must be < {limit:g}, got {value:.3g}"))
    found.sort(key=lambda item: -_RANK[item[0]])
    return DriftReport(
        verdict=found[0][0] if found else "ok",
        tasks=tasks,
        reasons=tuple(reason for _, reason in found),
        new_tasks=tuple(sorted(now.tasks.keys() - before.tasks.keys())),
        dropped_tasks=tuple(sorted(before.tasks.keys() - now.tasks.keys())),
    )


def _measures(before: TaskProfile, now: TaskProfile) -> dict[str, float]:
    labels = sorted(before.label_counts.keys() | now.label_counts.keys())
    counts = [[profile.label_counts.get(label, 0) for label in labels] for profile in (before, now)]
    known = set(before.words)
    total = max(sum(now.word_counts), 1)
    new = sum(count for word, count in zip(now.words, now.word_counts, strict=True) if word not in known) / total
    return {
        "label_psi": stability_index(*counts),
        "length_psi": stability_index(before.length_counts, now.length_counts),
        "new_words": max(new - before.novelty, 0.0),
        "more_rejected": max(now.rejected_share - before.rejected_share, 0.0),
    }


def stability_index(before: Sequence[int], now: Sequence[int]) -> float:
    """Return the population stability index Σ (q − p) ln(q / p) less its expectation without drift, at least 0.

    For n and m draws from one distribution over B bins the expectation is about (B − 1)(1/n + 1/m), so that a small
    window does not look like a drifted one. Half a count is added to every bin, so that empty ones stay finite.
    """
    p, q = (np.asarray(counts, dtype=float) for counts in (before, now))
    used = (p + q) > 0
    p, q = p[used], q[used]
    chance = (len(p) - 1) * (1 / max(p.sum(), 1) + 1 / max(q.sum(), 1))
    p, q = (p + 0.5) / (p + 0.5).sum(), (q + 0.5) / (q + 0.5).sum()
    return max(float(((q - p) * np.log(q / p)).sum()) - chance, 0.0)


def profile_of(place: str) -> DataProfile:
    """Return the profile of a preparation, named by its folder or manifest, a path or ``s3://`` URL."""
    location = posixpath.join(posixpath.dirname(place) if place.endswith(".json") else place, PROFILE)
    if not is_remote(location):
        return DataProfile.read(location)
    fs, path = filesystem(location)
    return DataProfile.model_validate_json(persistently(lambda: bytes(fs.cat_file(path)), location))
