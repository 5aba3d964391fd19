"""Differences are paired, symmetric, and as sure as the samples make them."""

from __future__ import annotations

import itertools

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import roc_auc_score

from pipeline.contracts import TaskSpec
from pipeline.errors import InputError
from pipeline.evaluation.auc_bootstrap import paired_auc_bootstrap
from pipeline.evaluation.compare import compare, holm
from pipeline.evaluation.delong import auc_difference, auc_interval, placements, spread
from pipeline.evaluation.intervals import bootstrap_weights
from pipeline.evaluation.score_table import COLUMNS
from tests.pipeline.evaluation.simulated import scores, specs

DATA = {"manifest_sha256": "0" * 64, "split": "test"}


def compared(a, b, **more):
    return compare(a, b, specs(), candidate_name="a", reference_name="b", data=DATA, **more)


def test_delong_variance_agrees_with_the_paired_formula_of_all_pairs() -> None:
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 2, 80)
    first, second = np.round(rng.normal(size=80) + labels, 1), np.round(rng.normal(size=80) + 0.5 * labels, 1)

    def psi(s):  # DeLong 1988, equation 2, pair by pair
        x, y = s[labels == 1], s[labels == 0]
        return (x[:, None] > y[None]) + 0.5 * (x[:, None] == y[None])

    v10 = np.stack([psi(s).mean(axis=1) for s in (first, second)])
    v01 = np.stack([psi(s).mean(axis=0) for s in (first, second)])
    cov = np.cov(v10) / v10.shape[1] + np.cov(v01) / v01.shape[1]
    found = auc_difference(labels, first, second)
    assert found.difference == pytest.approx(roc_auc_score(labels, first) - roc_auc_score(labels, second), abs=1e-12)
    assert found.spread.variance == pytest.approx(cov[0, 0] + cov[1, 1] - 2 * cov[0, 1], rel=1e-12)
    one = placements(labels, first)
    assert spread(one.influence, one.positive).variance == pytest.approx(cov[0, 0], rel=1e-12)


def test_clusters_of_one_sample_give_the_unclustered_variance() -> None:
    rng = np.random.default_rng(1)
    labels = rng.integers(0, 2, 400)
    p = placements(labels, rng.normal(size=400) + labels)
    alone, clustered = spread(p.influence, p.positive), spread(p.influence, p.positive, np.arange(400))
    assert clustered.variance == pytest.approx(alone.variance, rel=1e-9)
    assert clustered.degrees_of_freedom == pytest.approx(alone.degrees_of_freedom, rel=1e-9)


def test_copied_clusters_leave_the_clustered_interval_as_it_was() -> None:
    rng = np.random.default_rng(2)
    labels, values = rng.integers(0, 2, 200), rng.normal(size=200)
    values = values + labels
    alone = auc_interval(labels, values, np.arange(200))
    copied = auc_interval(np.repeat(labels, 5), np.repeat(values, 5), np.repeat(np.arange(200), 5))
    naive = auc_interval(np.repeat(labels, 5), np.repeat(values, 5))
    assert copied == pytest.approx(alone, abs=1e-9)
    assert (naive[1] - naive[0]) < 0.6 * (copied[1] - copied[0])


@pytest.mark.parametrize("flip", [False, True])
def test_perfect_order_has_an_interval_that_knows_its_size(flip: bool) -> None:
    labels = np.repeat([0, 1], [30, 10])
    low, high = auc_interval(labels, -labels if flip else labels)
    assert (low, high) == pytest.approx((0.0, 1 - 0.05**0.1) if flip else (0.05**0.1, 1.0))


def test_swapping_the_models_negates_the_differences() -> None:
    a, b = scores(0.5, seed=1), scores(1.5, seed=2)
    one, other = compared(a, b), compared(b, a)
    for name in one.tasks:
        assert one.tasks[name].difference == pytest.approx(-other.tasks[name].difference, abs=1e-12)
        assert one.tasks[name].ci95 == pytest.approx(tuple(-x for x in other.tasks[name].ci95[::-1]), abs=1e-12)
        assert one.tasks[name].verdict == "better"
        assert other.tasks[name].verdict == "worse"
    assert one.macro.difference == pytest.approx(-other.macro.difference, abs=1e-12)


def test_a_model_against_itself_differs_in_nothing() -> None:
    a = scores(0.5, seed=1)
    for d in compared(a, a.sample(frac=1, random_state=3)).tasks.values():
        assert (d.difference, d.ci95, d.p_value, d.verdict) == (0.0, (0.0, 0.0), 1.0, "no difference shown")


def test_pairing_is_sharper_than_two_separate_intervals() -> None:
    d = compared(scores(0.5, seed=1), scores(0.55, seed=1)).tasks["query_ad"]
    frame = scores(0.5, seed=1)
    part = frame[frame.task == "query_ad"]
    low, high = auc_interval(part.label.to_numpy(), np.array([s[1] for s in part.scores]))
    assert d.ci95[1] - d.ci95[0] < 0.2 * (high - low)


def test_other_samples_are_refused_with_both_counts() -> None:
    a, b = scores(0.5, seed=1, num=300), scores(0.5, seed=1, num=300, holdout=9)
    with pytest.raises(InputError, match="same samples with the same labels"):
        compared(a, b)


def test_a_task_only_one_model_knows_is_named() -> None:
    a, b = scores(0.5, seed=1, num=300), scores(0.5, seed=2, num=300)
    found = compared(a, b[b.task != "query_ad"])
    assert found.only_one == {"query_ad": "a"}
    assert set(found.tasks) == {"query_keyword", "ad_landing_page"}


def test_one_class_is_undefined_with_the_reason() -> None:
    a, b = scores(0.5, seed=1, num=300, one_class="query_ad"), scores(0.5, seed=2, num=300, one_class="query_ad")
    found = compared(a, b)
    assert found.tasks["query_ad"].verdict == "undefined"
    assert "all 300 labels are class 0" in found.tasks["query_ad"].reason
    assert found.macro.difference is None


@given(st.dictionaries(st.text(min_size=1, max_size=3), st.floats(0, 1), min_size=1, max_size=5))
@settings(max_examples=40, deadline=None)
def test_holm_rejects_what_closed_testing_with_bonferroni_rejects(raw: dict[str, float]) -> None:
    adjusted, names = holm(raw), sorted(raw)
    for alpha in (0.01, 0.05, 0.2):
        for name in names:
            # rejected by closed testing: Bonferroni rejects every subset that holds the hypothesis
            closed = all(
                min(raw[n] for n in subset) * len(subset) <= alpha
                for k in range(1, len(names) + 1)
                for subset in itertools.combinations(names, k)
                if name in subset
            )
            assert (adjusted[name] <= alpha) == closed or abs(adjusted[name] - alpha) < 1e-12


@given(st.integers(1, 30), st.integers(1, 4), st.integers(0, 2**32 - 1))
@settings(max_examples=40, deadline=None)
def test_resamples_keep_their_size_and_strata_and_draw_whole_groups(num: int, codes: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    strata = rng.integers(0, codes, num)
    plain = np.concatenate(list(bootstrap_weights(num, rng, 7)))
    assert (plain.sum(axis=1) == num).all()
    kept = np.concatenate(list(bootstrap_weights(num, rng, 7, strata=strata)))
    for code in np.unique(strata):
        assert (kept[:, strata == code].sum(axis=1) == (strata == code).sum()).all()
    groups = np.unique(strata, return_inverse=True)[1]
    whole = np.concatenate(list(bootstrap_weights(num, rng, 7, groups=groups)))
    for code in np.unique(groups):
        assert (np.ptp(whole[:, groups == code], axis=1) == 0).all()
    assert whole.shape == (7, num)


@given(st.integers(4, 40), st.integers(1, 6), st.integers(0, 2**32 - 1))
@settings(max_examples=30, deadline=None)
def test_fast_auc_bootstrap_is_the_auc_of_its_own_resamples(num: int, levels: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 2, num)
    labels[:2] = 0, 1
    first, second = rng.integers(0, levels, num) / levels, rng.integers(0, levels, num) / levels
    found = paired_auc_bootstrap(labels, first, second, np.random.default_rng(seed), 4)
    again, draws = np.random.default_rng(seed), []
    high, low = (np.flatnonzero(labels == c)[np.argsort(first[labels == c])] for c in (1, 0))
    for _ in range(4):
        rows = [high[again.integers(0, len(high), len(high))], low[again.integers(0, len(low), len(low))]]
        rows = np.concatenate(rows)
        draws.append(roc_auc_score(labels[rows], first[rows]) - roc_auc_score(labels[rows], second[rows]))
    np.testing.assert_allclose(found, draws, atol=1e-12)


def test_bootstrap_and_delong_agree_on_the_error_of_a_difference() -> None:
    a, b = scores(0.5, seed=1), scores(1.0, seed=2)
    one, other = compared(a, b), compared(a, b, auc_method="bootstrap", replicates=2000)
    for name in one.tasks:
        assert other.tasks[name].standard_error == pytest.approx(one.tasks[name].standard_error, rel=0.1)
        assert other.tasks[name].difference == one.tasks[name].difference


def test_tied_scores_say_nothing_about_the_order() -> None:
    assert auc_interval(np.repeat([0, 1], [50, 50]), np.ones(100)) == (0.0, 1.0)


@pytest.mark.parametrize(("num", "verdict"), [(4, "no difference shown"), (40, "better")])
def test_samples_that_all_agree_are_as_sure_as_they_are_many(num: int, verdict: str) -> None:
    spec = TaskSpec(name="vertical", kind="multiclass", template="{text}", label_words=(" a", " b"))

    def frame(right: float) -> pd.DataFrame:
        rows = [(str(i), "vertical", 0.0, np.array([right, 1 - right]), None) for i in range(num)]
        return pd.DataFrame(rows, columns=list(COLUMNS)).astype({"group": object})

    found = compare(frame(0.9), frame(0.2), [spec], candidate_name="a", reference_name="b", data=DATA)
    assert found.tasks["vertical"].p_value == 2.0 ** (1 - num)
    assert found.tasks["vertical"].verdict == verdict
