"""How much synthetic Ads data is made, over which days, and how it drifts."""

from __future__ import annotations

import datetime as dt

from pydantic import Field, model_validator

from pipeline.settings import Settings


class SyntheticAdsConfig(Settings):
    """Size, time span, noise and drift of the synthetic Ads data."""

    seed: int = 0
    """Seed of the catalogue and of every draw."""
    start: dt.date = dt.date(2026, 1, 5)
    """Day 0; weeks of drift are counted from here, whatever window is prepared."""
    days: int = Field(default=8, ge=1)
    """Daily partitions, where no window is configured."""
    test_days: int = Field(default=1, ge=0)
    """The last days of the span that form the test split; the earlier ones are the train split."""
    rows_per_day: int = Field(default=200, ge=1)
    """Records a task a day."""
    drift: float = Field(default=0.0, ge=0, le=4)
    """0 keeps the catalogue; 1 replaces one of each vertical's five brands a week and swings shares and rates."""
    label_noise: float = Field(default=0.05, ge=0, lt=0.5)
    """Share of labels drawn without regard to the texts."""

    @model_validator(mode="after")
    def _check(self) -> SyntheticAdsConfig:
        if self.test_days >= self.days:
            raise ValueError(
                f"synthetic.test_days must be < days, got {self.test_days} of {self.days}; leave days to train on"
            )
        return self

    def windows(self) -> dict[str, tuple[dt.date, dt.date]]:
        """Return the first and last day of each split."""
        last = self.start + dt.timedelta(days=self.days - 1)
        cut = last - dt.timedelta(days=self.test_days)
        return {"train": (self.start, cut)} | ({"test": (cut + dt.timedelta(days=1), last)} if self.test_days else {})
