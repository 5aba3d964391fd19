"""What a search is said to take."""

from __future__ import annotations

import random

import numpy as np
import pytest

from jobs.tune_config import Halving, TuneConfig
from jobs.tuning.cost import halved_steps, search_cost
from pipeline.training.plan import Calibration, TrainingPlan

PLAN = TrainingPlan(
    parameters=1,
    trained_parameters=1,
    tokens=1,
    computed_share=1.0,
    micro_batches_per_step=1.0,
    largest_micro_batch_tokens=1,
    seconds=30.0,
    validation_seconds=10.0,
    rank_bytes=1,
    checkpoint_bytes=1,
    kept_bytes=1,
    calibration=Calibration(
        seconds_per_batch=0.0,
        seconds_per_token=1.0,
        loading_bytes=1,
        loaded_bytes=1,
        bytes_per_token=1.0,
        loading_seconds=2.0,
    ),
)


def _tune(asha: Halving | None, max_concurrent: int = 1) -> TuneConfig:
    space = {"training.learning_rate": {"log_uniform": [1e-4, 1e-2]}}
    return TuneConfig.model_validate({"space": space, "asha": asha, "max_concurrent": max_concurrent})


def test_without_halving_a_search_takes_the_steps_the_measurements_and_the_loading_of_all_its_trials() -> None:
    cost = search_cost(_tune(None, 2), [20] * 4, PLAN, 20)
    assert cost.steps == cost.expected_steps == 80
    assert cost.seconds == cost.expected_seconds == pytest.approx((4 * 40.0 + 4 * 2.0) / 2)


def test_halving_is_expected_to_save_steps() -> None:
    cost = search_cost(_tune(Halving(grace_steps=5, reduction=3)), [40] * 16, PLAN, 20)
    assert 16 * 5 < cost.expected_steps < cost.steps == 640
    assert cost.expected_seconds == pytest.approx(2.0 * cost.expected_steps + 16 * 2.0)


@pytest.mark.parametrize(("trials", "steps", "grace", "reduction"), [(16, 40, 10, 3), (32, 81, 3, 3), (9, 8, 4, 2)])
def test_expected_steps_are_those_of_trials_whose_measurements_are_independent(
    trials: int, steps: int, grace: int, reduction: int
) -> None:
    rungs = [grace * reduction**k for k in range(20) if grace * reduction**k < steps]
    draw = random.Random(0)

    def once() -> int:
        done, seen = 0, {rung: list[float]() for rung in rungs}
        for _ in range(trials):
            before = 0
            for rung in rungs:
                done, before = done + rung - before, rung
                value, others = draw.random(), seen[rung]
                goes_on = not others or value >= np.percentile(others, 100 * (1 - 1 / reduction))
                others.append(value)
                if not goes_on:
                    break
            else:
                done += steps - before
        return done

    mean = float(np.mean([once() for _ in range(600)]))
    assert halved_steps(trials, steps, Halving(grace_steps=grace, reduction=reduction)) == pytest.approx(mean, rel=0.05)
