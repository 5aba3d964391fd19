"""A difference is only as sure as the samples of the rarer class, the groups and the errors that it rests on."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.contracts import TaskSpec
from pipeline.errors import InputError
from pipeline.evaluation.compare import compare
from pipeline.evaluation.delong import LEAST
from pipeline.evaluation.paired import MANY, unanimous
from pipeline.evaluation.summary import summarize
from tests.pipeline.evaluation.simulated import scores, specs

DATA = {"manifest_sha256": "0" * 64, "split": "test"}
NAME = "query_ad"


def frame(labels, p, groups=None, name=NAME) -> pd.DataFrame:
    labels, p = np.asarray(labels, float), np.asarray(p, float)
    keys = [f"{i:06d}" for i in range(len(labels))]
    rows = {"key": keys, "task": name, "label": labels, "scores": list(np.stack([1 - p, p], axis=1))}
    return pd.DataFrame(rows).assign(group=pd.Series(groups, dtype=object))


def compared(a: pd.DataFrame, b: pd.DataFrame, names=(NAME,)):
    return compare(a, b, specs(names), candidate_name="a", reference_name="b", data=DATA)


def noisy(labels, seed: int, noise: float = 1.0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return 1 / (1 + np.exp(-(np.asarray(labels) + noise * rng.normal(size=len(labels)))))


@pytest.mark.parametrize("few", [1, 2, LEAST - 1, LEAST])
def test_fewer_of_the_rarer_class_than_the_least_have_no_interval(few: int) -> None:
    labels = np.repeat([1, 0], [few, 400 - few])
    found = compared(frame(labels, noisy(labels, 1)), frame(labels, noisy(labels, 2))).tasks[NAME]
    report = summarize(frame(labels, noisy(labels, 1)), specs([NAME]), model="m", data=DATA, replicates=20)
    result = report.tasks[NAME]
    assert found.rarer_class == result.rarer_class == few
    assert found.difference == pytest.approx(found.candidate - found.reference)
    assert result.value is not None
    if few >= LEAST:
        assert found.ci95 is not None
        assert result.ci95 is not None
        return
    assert (found.ci95, found.p_value, found.p_holm, found.verdict) == (None, None, None, "undefined")
    assert result.ci95 is None
    for reason in (found.reason, result.undefined["auc"], result.reason):
        assert reason == f"an interval needs at least {LEAST} samples of each class, got {few} of the rarer one"
    assert report.macro.ci95 is None
    assert report.macro.reason == f"no interval for {NAME}"


@pytest.mark.parametrize("groups_with_positives", [2, LEAST - 1, LEAST + 5])
def test_groups_that_hold_the_rarer_class_are_what_counts(groups_with_positives: int) -> None:
    group = np.repeat(np.arange(40), 10)
    labels = (np.arange(400) % 2 == 0) & (group < groups_with_positives)
    names = [f"g{g}" for g in group]
    found = compared(frame(labels, noisy(labels, 1), names), frame(labels, noisy(labels, 2), names)).tasks[NAME]
    assert found.rarer_class == groups_with_positives
    if groups_with_positives < LEAST:
        assert f"at least {LEAST} groups with samples of each class, got {groups_with_positives}" in found.reason
    else:
        assert found.degrees_of_freedom <= 39


def test_a_metric_without_classes_needs_the_least_of_groups_too() -> None:
    spec = TaskSpec(name="vertical", kind="multiclass", template="{x}", label_words=(" a", " b"))

    def of(groups: int) -> tuple[object, object]:
        labels = np.arange(300) % 2
        names = [f"g{i % groups}" for i in range(300)]
        a, b = (frame(labels, noisy(labels, seed), names, "vertical") for seed in (1, 2))
        found = compare(a, b, [spec], candidate_name="a", reference_name="b", data=DATA).tasks["vertical"]
        return found.ci95, found.reason

    assert of(LEAST - 1) == (None, f"an interval needs at least {LEAST} groups, got {LEAST - 1}")
    assert of(LEAST)[0] is not None


def test_two_nearly_perfect_orders_are_apart_by_their_own_intervals_once_they_are_many() -> None:
    def of(few: int):
        labels = np.repeat([1, 0], [few, few])
        p = np.where(labels, 0.9, 0.1) + np.linspace(0, 0.05, 2 * few)
        worse = p.copy()
        worse[0] = 0.12  # one positive below most negatives
        return compared(frame(labels, p), frame(labels, worse)).tasks[NAME]

    few, many = of(MANY // 2), of(2 * MANY)
    assert few.ci95 is None
    assert "nearly perfectly" in few.reason
    assert many.ci95[0] < 0 < many.difference < many.ci95[1] < 0.05


def test_scores_that_are_identical_differ_in_nothing_but_an_equal_order_may_be_chance() -> None:
    labels = np.repeat([1, 0], [40, 360])
    p = noisy(labels, 1)
    same = compared(frame(labels, p), frame(labels, p)).tasks[NAME]
    assert (same.difference, same.ci95, same.p_value) == (0.0, (0.0, 0.0), 1.0)
    sharper = compared(frame(labels, p), frame(labels, p**2)).tasks[NAME]
    assert (sharper.difference, sharper.p_value) == (0.0, 1.0)
    chance = 1 - 0.025 ** (1 / 40)  # three in forty might be ordered otherwise
    assert sharper.ci95 == pytest.approx((-chance, chance))


@given(st.sampled_from([-1.0, -0.5, 0.0, 0.3, 1.0]), st.integers(1, 500))
@settings(max_examples=60, deadline=None)
def test_where_all_agree_the_interval_and_the_p_value_say_the_same(d: float, units: int) -> None:
    found = unanimous(max(d, 0.0), max(-d, 0.0), units).difference
    low, high = found.ci95
    assert low <= d <= high
    assert high - low > 0
    assert (found.p_value <= 0.05) == (low > 0 or high < 0)
    if abs(d) == 1:
        assert found.p_value == pytest.approx(min(1.0, 2.0 ** (1 - units)))  # the sign test


@given(st.integers(12, 60), st.integers(0, 2**32 - 1), st.booleans())
@settings(max_examples=30, deadline=None)
def test_p_values_and_intervals_of_auc_agree_and_negate_when_swapped(few: int, seed: int, is_grouped: bool) -> None:
    labels = np.repeat([1, 0], [few, 3 * few])
    names = [f"g{i % (few + 3)}" for i in range(4 * few)] if is_grouped else None
    a, b = frame(labels, noisy(labels, seed), names), frame(labels, noisy(labels, seed + 1, 3.0), names)
    one, other = compared(a, b).tasks[NAME], compared(b, a).tasks[NAME]
    if one.ci95 is None:
        assert other.ci95 is None
        return
    assert one.ci95 == pytest.approx((-other.ci95[1], -other.ci95[0]), abs=1e-12)
    assert (one.p_value <= 0.05) == (one.ci95[0] > 0 or one.ci95[1] < 0)


@pytest.mark.parametrize("metric", ["auc", "accuracy"])
def test_groups_that_tasks_share_are_counted_once_in_the_macro_mean(metric: str) -> None:
    names = ("ad", "keyword")
    tasks = [TaskSpec(name=n, template="{x}", label_words=(" no", " yes"), metric=metric) for n in names]
    labels = np.arange(600) % 2
    group = [f"g{i // 10}" for i in range(600)]

    def macro(other: list[str]):
        pairs = []
        for seed in (1, 2):
            p = noisy(labels, seed)
            pairs.append(pd.concat([frame(labels, p, g, n) for n, g in zip(names, (group, other), strict=True)]))
        found = compare(*pairs, tasks, candidate_name="a", reference_name="b", data=DATA)
        report = summarize(pairs[0], tasks, model="a", data=DATA, replicates=50)
        return found.macro.standard_error, found.tasks["ad"].standard_error, np.ptp(report.macro.ci95)

    shared, alone, wide = macro(group)
    apart, _, narrow = macro([f"h{i // 10}" for i in range(600)])
    assert shared == pytest.approx(alone, rel=1e-9)  # the same samples twice say no more than once
    assert apart == pytest.approx(alone / np.sqrt(2), rel=1e-9)
    assert narrow == pytest.approx(wide / np.sqrt(2), rel=0.01)  # tasks draw their own bootstrap


def test_accuracy_is_sure_by_the_samples_on_which_one_model_alone_is_right() -> None:
    spec = TaskSpec(name="vertical", kind="multiclass", template="{x}", label_words=(" a", " b"))

    def found(wins: int, losses: int, num: int):
        ours, theirs = np.full(num, 0.9), np.full(num, 0.9)
        theirs[:wins] = 0.1
        ours[wins : wins + losses] = 0.1
        a, b = (frame(np.ones(num), p, name="vertical") for p in (ours, theirs))
        return compare(a, b, [spec], candidate_name="a", reference_name="b", data=DATA).tasks["vertical"]

    equal = found(0, 0, 400)
    assert (equal.difference, equal.ci95) == (0.0, (0.0, 0.0))
    assert found(3, 0, 400).verdict == "no difference shown"
    assert found(12, 0, 400).verdict == "better"
    low, high = found(1, 1, 400).ci95  # Bonett and Price 2012: (wins + 1) and (losses + 1) of 402
    assert (low, high) == pytest.approx((-1.959964 * np.sqrt(4) / 402, 1.959964 * np.sqrt(4) / 402), rel=1e-6)


@pytest.mark.parametrize("bad", [7.0, -0.5, float("nan"), float("inf")])
def test_what_is_no_probability_is_refused_with_its_value(bad: float) -> None:
    spoilt = scores(0.5, seed=1, num=40)
    spoilt.at[3, "scores"] = np.array([0.5, bad])
    with pytest.raises(InputError, match=r"from 0 to 1, got 1 that are not, first"):
        summarize(spoilt, specs(), model="m", data=DATA, replicates=10)
