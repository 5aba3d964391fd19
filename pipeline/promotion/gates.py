"""The limits that a candidate is held to: configuration alone, see :mod:`pipeline.promotion.policy`."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from pipeline.settings import Settings


class GatesConfig(Settings):
    """The gates a candidate must pass."""

    beat_base: bool = True
    """Every task not at its ceiling must beat the untrained base with intervals that do not overlap."""
    ceiling_gap: float = Field(default=0.02, ge=0)
    """A base within this of the best attainable (or of 1) leaves a task nothing to gain: it may not get worse."""
    margin: float = Field(default=0.01, ge=0)
    """How much worse than the champion a task's metric may be: the paired interval must lie above its negative."""
    margins: dict[str, float] = Field(default_factory=dict)
    """Margins of single tasks, where they differ."""
    gain: Literal["macro", "none"] | tuple[str, ...] = "macro"
    """What must be better than the champion: the macro mean, each task named, or nothing (non-inferiority alone)."""
    retired: tuple[str, ...] = ()
    """Tasks that ended: the champion answers them still, a candidate need not."""
    min_samples: int = Field(default=50, ge=1)
    """Fewest test samples a task."""
    calibration_ratio: tuple[float, float] | None = None
    """Limits of expected over observed positives of each binary task, for example [0.8, 1.25]."""
    max_ece: float | None = Field(default=None, gt=0, le=1)
    """Largest expected calibration error a task."""
    max_latency_ms: float | None = Field(default=None, gt=0)
    """Largest median time to answer one row, in milliseconds."""
