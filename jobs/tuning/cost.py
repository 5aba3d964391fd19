"""What a search will take, said before it starts."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from jobs.config import RunConfig
from jobs.tune_config import Halving, TuneConfig
from pipeline.training.plan import TrainingPlan


@dataclass(frozen=True)
class SearchCost:
    """The cost of a search, without the start of Ray.

    Args:
        trials: how many.
        steps: optimizer steps if no trial is ended early.
        seconds: by the clock, likewise.
        expected_steps: with the trials that successive halving ends early, were their order random.
        expected_seconds: by the clock, likewise.
        concurrent: trials at a time.
    """

    trials: int
    steps: int
    seconds: float
    expected_steps: int
    expected_seconds: float
    concurrent: int

    @property
    def words(self) -> str:
        """The cost in one line."""
        halved = "" if self.expected_steps == self.steps else f", about {self.expected_steps:,} where ASHA ends trials"
        most = "" if not halved else f", at most {_minutes(self.seconds)}"
        return (
            f"{self.trials} trials, {self.steps:,} steps{halved}, {self.concurrent} at a time: "
            f"about {_minutes(self.expected_seconds)}{most}"
        )

    def values(self) -> dict[str, Any]:
        """Return the cost as plain values."""
        return asdict(self)


def search_cost(tune: TuneConfig, steps: Sequence[int], plan: TrainingPlan, plan_steps: int) -> SearchCost:
    """Return what a search takes.

    Args:
        tune: the search.
        steps: of each trial.
        plan: of the first trial.
        plan_steps: its steps.
    """
    per_step = (plan.seconds + plan.validation_seconds) / plan_steps
    loading = (plan.calibration.loading_seconds if plan.calibration else None) or 0.0
    concurrent = min(len(steps), tune.max_concurrent or len(os.sched_getaffinity(0)))
    expected = sum(steps)
    if tune.asha is not None:
        expected = round(sum(steps) * halved_steps(len(steps), max(steps), tune.asha) / (len(steps) * max(steps)))

    def seconds(count: int) -> float:
        return (count * per_step + len(steps) * loading) / concurrent

    return SearchCost(len(steps), sum(steps), seconds(sum(steps)), expected, seconds(expected), concurrent)


def halved_steps(trials: int, steps: int, asha: Halving) -> float:
    """Return the expected steps of all trials, one after the other in random order, under successive halving.

    A trial goes on where it reaches the quantile 1 - 1/reduction of those that were measured before it at the same
    step; the k-th of them does so with probability ``(k - 1 - (k - 2) (1 - 1 / reduction)) / k``.
    """
    arriving, done, total, rung = float(trials), 0, 0.0, asha.grace_steps
    while rung < steps:
        total += arriving * (rung - done)
        places = range(2, round(arriving) + 1)
        arriving = 1 + sum((k - 1 - (k - 2) * (1 - 1 / asha.reduction)) / k for k in places)
        done, rung = rung, rung * asha.reduction
    return total + arriving * (steps - done)


def calibrated_plan(config: RunConfig) -> TrainingPlan:
    """Return the plan of a trial, from a few of its micro-batches on this machine.

    Raises:
        InputError: the model cannot be run here.
    """
    from jobs.stages.plan import training_job
    from pipeline.orchestration.calibration import calibrate
    from pipeline.training.planner import plan_training

    job = training_job(config)
    return plan_training(job, calibrate(job), config.folder, is_local=False)


def _minutes(seconds: float) -> str:
    return f"{seconds / 60:.1f} min"
