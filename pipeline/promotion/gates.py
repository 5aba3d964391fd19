"""The limits that a candidate is held to: configuration alone, see :mod:`pipeline.promotion.policy`."""

from __future__ import annotations

from collections.abc import Collection
from typing import Annotated, Literal

from pydantic import Field, model_validator

from pipeline.errors import did_you_mean
from pipeline.settings import Settings

Margin = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class LiveConfig(Settings):
    """What a candidate must show on live requests before it may become champion, beside the holdout.

    It must not be worse than the champion on rows that both have scored (``serve`` with a shadow) and whose labels have
    come (``feedback``).
    """

    log: str
    """Folder of the scores, as ``serve`` was told it; local or ``s3://``."""
    margin: Margin = 0.01
    """How much worse than the champion a task's metric may be: the paired interval must lie above its negative."""
    min_samples: int = Field(default=200, ge=1)
    """Fewest labelled rows a task that both have scored."""
    tasks: tuple[str, ...] = ()
    """Tasks whose labels come; empty for all."""
    calibration_ratio: tuple[Margin, Margin] = (0.67, 1.5)
    """Limits of expected over observed positives of a canary in each binary task: beyond them, and beyond chance,
    ``feedback`` takes it back."""


class GatesConfig(Settings):
    """The gates a candidate must pass."""

    beat_base: bool = True
    """Every task not at its ceiling must beat the untrained base with intervals that do not overlap."""
    ceiling_gap: Margin = 0.02
    """A base within this of the best attainable (or of 1) leaves a task nothing to gain: by the paired interval it may
    not get worse than the base by more than its margin."""
    margin: Margin = 0.01
    """How much worse than the champion a task's metric may be: the paired interval must lie above its negative. From 1
    on any fall is allowed, and none must be measured."""
    margins: dict[str, Margin] = Field(default_factory=dict)
    """Margins of single tasks, where they differ."""
    cumulative_margin: Margin | None = None
    """How much worse than the anchor, the best earlier champion, a task's metric may be, so that small falls do not add
    up week by week; null for the task's own margin."""
    gain: Literal["macro", "none"] | tuple[str, ...] = "macro"
    """What must be better than the champion: the macro mean, each task named, or nothing (non-inferiority alone)."""
    retired: tuple[str, ...] = ()
    """Tasks that ended: the champion answers them still, a candidate need not."""
    min_samples: int = Field(default=50, ge=1)
    """Fewest test samples a task."""
    min_rarer_class: int = Field(default=10, ge=1)
    """Fewest test samples of a binary task's rarer class; where samples have groups, fewest groups that hold some."""
    calibration_ratio: tuple[Margin, Margin] | None = None
    """Limits of expected over observed positives of each binary task, for example [0.8, 1.25]: its whole interval must
    lie within."""
    max_ece: float | None = Field(default=None, gt=0, le=1)
    """Largest expected calibration error a task; answers that are written have none."""
    max_latency_ms: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    """Largest median time to answer one row, in milliseconds."""

    @model_validator(mode="after")
    def _check(self) -> GatesConfig:
        if self.calibration_ratio is not None and not self.calibration_ratio[0] < self.calibration_ratio[1]:
            raise ValueError(
                f"promotion.gates.calibration_ratio must be a lower and an upper limit, got "
                f"{list(self.calibration_ratio)}; write for example [0.8, 1.25]"
            )
        return self

    def margin_of(self, task: str) -> float:
        """Return how much worse than the champion a task may be."""
        return self.margins.get(task, self.margin)

    def cumulative_margin_of(self, task: str) -> float:
        """Return how much worse than the anchor a task may be."""
        return self.margin_of(task) if self.cumulative_margin is None else self.cumulative_margin

    def unknown_names(self, tasks: Collection[str]) -> str | None:
        """Say which names stand in the gates that no task bears, and which tasks are both configured and retired.

        Args:
            tasks: names of the configured tasks.
        """
        gains = () if isinstance(self.gain, str) else self.gain
        for key, names in (("margins", self.margins), ("gain", gains)):
            for name in names:
                if name not in tasks and name not in self.retired:
                    return f"promotion.gates.{key} must name configured tasks, got {name!r}{did_you_mean(name, tasks)}"
        both = sorted(set(self.retired) & set(tasks))
        if both:
            return f"promotion.gates.retired must name tasks that ended, got {both}, which are configured; choose one"
        return None
