"""The statistics and the table of a comparison."""

from __future__ import annotations

import itertools
import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.study.comparison import Replicates, holm, paired_mean, replicates
from pipeline.study.results import markdown, suite_result, with_holm
from tests.pipeline.study.made import TASKS, UNTRAINED, arm, scores

REFERENCE = ("lora", "lora_word")


def test_equal_arms_differ_in_nothing() -> None:
    one = replicates([scores(0.8, 1), scores(0.8, 2)])
    found = paired_mean(one, one)
    assert (found.value, found.ci95, found.ci95_tasks, found.p) == (0.0, (0.0, 0.0), (0.0, 0.0), 1.0)


def test_a_shift_that_all_samples_share_has_no_width() -> None:
    drawn = np.random.default_rng(0).random((3, 2, 50))
    ours = Replicates(drawn.mean(-1) + 0.125, drawn + 0.125)
    found = paired_mean(ours, Replicates(drawn.mean(-1), drawn))
    assert found.value == pytest.approx(0.125)
    assert found.ci95 == pytest.approx((0.125, 0.125))
    assert found.by_task == pytest.approx((0.125, 0.125))


def test_an_interval_over_tasks_is_wider_where_tasks_disagree() -> None:
    drawn = np.zeros((3, 2, 400)) + np.random.default_rng(0).normal(0, 0.01, (3, 2, 400))
    ours = Replicates(np.array([[0.2, -0.2]] * 3), drawn + np.array([0.2, -0.2])[:, None])
    found = paired_mean(ours, Replicates(np.zeros((3, 2)), np.zeros((3, 2, 400))))
    low, high = found.ci95
    assert found.ci95_tasks[0] < low - 0.1 and found.ci95_tasks[1] > high + 0.1


def test_the_same_samples_are_drawn_for_every_arm_and_seed() -> None:
    found = replicates([scores(0.7, 1), scores(0.7, 1)], count=20)
    assert np.array_equal(found.drawn[0], found.drawn[1])
    again = replicates([scores(0.7, 1)], count=20)
    assert np.array_equal(found.drawn[0], again.drawn[0])


def test_intervals_of_pure_chance_hold_zero_about_as_often_as_they_say() -> None:
    held = 0
    for trial in range(40):
        ours = replicates([scores(0.7, 100 * trial + seed) for seed in range(5)], count=200)
        theirs = replicates([scores(0.7, 100 * trial + 50 + seed) for seed in range(5)], count=200)
        low, high = paired_mean(ours, theirs).ci95
        held += low <= 0 <= high
    assert held >= 34  # 95 % of 40 is 38


@given(st.lists(st.floats(0, 1), min_size=1, max_size=12))
def test_holm_keeps_the_order_and_never_lowers(p_values: list[float]) -> None:
    corrected = holm(p_values)
    for p, c in zip(p_values, corrected, strict=True):
        assert p <= c <= min(1.0, len(p_values) * p) or c == min(1.0, max(corrected))
    order = np.argsort(p_values, kind="stable")
    assert all(corrected[a] <= corrected[b] for a, b in itertools.pairwise(order))


def test_holm_of_known_numbers() -> None:
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])


def test_the_best_reference_arm_is_what_the_others_are_held_against() -> None:
    arms = [arm("lora", 0.6), arm("lora_word", 0.75), arm("mtl", 0.9), arm("mtl_two", 0.9, parameters=1100)]
    found = suite_result("made", arms, UNTRAINED, REFERENCE, ("mtl", "mtl_two"), ("dora",))
    assert found.reference == "lora_word" and found.arm("lora_word").difference is None
    ours = found.arm("mtl").difference
    assert ours is not None and ours.ci95[0] > 0 and ours.p < 0.01
    below = found.arm("lora").difference
    assert below is not None and below.ci95[1] < 0
    assert found.arm("mtl").is_of_equal_size and not found.arm("mtl_two").is_of_equal_size
    assert all(row.beats_untrained for row in found.arms)
    assert found.recipe == "mtl"  # of equal ones on the development part the first


def test_holm_is_over_all_suites() -> None:
    arms = [arm("lora", 0.6), arm("mtl", 0.64), arm("other", 0.62)]
    one = suite_result("one", arms, UNTRAINED, ("lora",), ("mtl",))
    both = with_holm([one, suite_result("two", arms, UNTRAINED, ("lora",), ("mtl",))])
    every = [row.difference for suite in both for row in suite.arms if row.difference is not None]
    assert [d.p_holm for d in every] == holm([d.p for d in every])
    json.dumps([suite.as_values() for suite in both])


def test_the_markdown_table_has_a_row_an_arm_and_says_what_is_missing() -> None:
    found = suite_result(
        "made", [arm("lora", 0.6), arm("mtl", 0.9, at_edge=True)], UNTRAINED, ("lora",), ("mtl",), ("dora",)
    )
    lines = markdown([found], ["a note"]).splitlines()
    table = [line for line in lines if line.startswith("|")]
    assert len(table) == 2 + 1 + 2 and len({line.count("|") for line in table}) == 1
    assert "0.01 edge" in table[-1] and "best of LoRA" in table[-2]
    assert "Not done yet: dora." in lines and "- a note" in lines
    assert all(task in table[0] for task in TASKS)
