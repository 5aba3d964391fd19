"""``data.source=synthetic_ads``: where ingestion takes records that are made instead of read, and nowhere else."""

from __future__ import annotations

import datetime as dt
from collections.abc import Iterator, Sequence
from typing import Any

from pipeline.errors import InputError, did_you_mean
from pipeline.ingestion.config import DataConfig, days_of
from pipeline.ingestion.source_file import SYNTHETIC, SourceFile
from pipeline.synthetic.ads import TASKS, generate


def synthetic_sources(config: DataConfig, names: Sequence[str]) -> list[SourceFile]:
    """Return one input for each task and day of the configured windows, or of the synthetic data's own span.

    Raises:
        InputError: a task is none of the synthetic data.
    """
    for name in names:
        if name not in TASKS:
            raise InputError(
                f"source {SYNTHETIC!r} must be asked for its own tasks, got {name!r}"
                f"{did_you_mean(name, TASKS)}; for your own records set data.source=records and data.root"
            )
    windows = config.windows or config.synthetic.windows()
    days = [(split, day.isoformat(), 1.0) for split, window in windows.items() for day in days_of(window)]
    if config.replay is not None:
        days += [("train", day.isoformat(), config.replay.share) for day in days_of(config.replay.window)]
    return [
        SourceFile(name, split, f"{SYNTHETIC}/{day}/{name}", f"{SYNTHETIC}/{day}/{name}", day, keep=keep)
        for name in names
        for split, day, keep in days
    ]


def synthetic_records(config: DataConfig, source: SourceFile) -> Iterator[dict[str, Any]]:
    """Yield the records of one such input in their order."""
    yield from generate(config.synthetic, dt.date.fromisoformat(str(source.day)))[source.task]
