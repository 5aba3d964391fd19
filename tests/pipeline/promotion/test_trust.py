"""The evidence cannot be fooled: a short form of ``python -m tests.benchmarks evidence``, same seeds, fewer draws."""

from __future__ import annotations

import pytest

from pipeline.promotion.gates import GatesConfig
from tests.benchmarks import evidence as simulated
from tests.benchmarks.evidence import Holdout


@pytest.mark.parametrize(("gates", "who"), [("weekly", "all tasks"), ("default", "one task, two better")])
def test_small_falls_of_a_season_add_up_to_one_margin_at_most(gates: str, who: str) -> None:
    found = simulated.creep(gates, 1000, who, 8)
    assert found["met"], found


@pytest.mark.parametrize(
    ("gates", "holdout", "gain", "goal"),
    [
        ("weekly", Holdout(4000, 3), 0.0, 0.8),
        ("default", Holdout(2000, 3), 0.02, 0.85),
        ("weekly", Holdout(400, 1, 3), -0.05, 0.01),
        ("default", Holdout(400, 1, 20), -0.05, 0.01),
        ("weekly", Holdout(300, 4, None, 60, 0, True), -0.05, 0.01),
    ],
)
def test_equal_and_better_challengers_pass_and_worse_ones_do_not(
    gates: str, holdout: Holdout, gain: float, goal: float
) -> None:
    found = simulated.promoted(gates, holdout, gain, 50, "short", goal)
    assert found["met"], found


@pytest.mark.parametrize(
    ("holdout", "has_interval"),
    [
        (Holdout(400, 1, 3), False),
        (Holdout(400, 1, 20), True),
        (Holdout(50, 1, None, 5), False),
        (Holdout(300, 1, None, 30), True),
        (Holdout(400, 1, None, 40, 2), False),
        (Holdout(300, 4, None, 60, 0, True), True),
    ],
)
def test_two_equal_models_are_told_apart_no_oftener_than_the_level_allows(holdout: Holdout, has_interval: bool) -> None:
    found = simulated.false_better("short", holdout, 150)
    assert found["met"], found
    assert (found["defined"] > 0) == has_interval


def test_the_best_of_many_looks_at_one_holdout_is_no_better_for_it() -> None:
    found = simulated.many_looks(0.0, 0.05, GatesConfig(beat_base=False, margin=0.2), 10, 20)
    assert found["met"], found


@pytest.mark.parametrize(("area", "other"), [(0.85, None), (0.98, None), (0.85, 0.8)])
def test_intervals_cover_or_are_undefined(area: float, other: float | None) -> None:
    for found in simulated.coverage(area, other, 120):
        assert found["met"], found
        assert (found["value"] is None) == any(f", {few} positives" in found["measure"] for few in (2, 5, 9))
