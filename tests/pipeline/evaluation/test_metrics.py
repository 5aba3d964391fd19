"""Each metric agrees with scikit-learn or scipy, whatever the ties, weights and class sizes."""

from __future__ import annotations

import itertools
import math
import warnings

import numpy as np
import pandas as pd
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from scipy import stats
from sklearn import metrics as sk

from pipeline.contracts import TaskSpec
from pipeline.evaluation.metrics import statistics
from pipeline.evaluation.ranking import auc, auc_statistic, average_precision_statistic
from pipeline.evaluation.score_table import TaskScores, by_task

EXACT = 1e-12


def task(kind: str = "binary", words: int = 2, **more: object) -> TaskSpec:
    values = {"label_values": tuple(float(i) for i in range(words))} if kind == "ordinal" else {}
    labels = () if kind == "choice" else tuple(f" w{i}" for i in range(words))
    return TaskSpec.model_validate(
        {"name": "t", "kind": kind, "template": "{x}", "label_words": labels, **values, **more}
    )


def binary(labels: np.ndarray, scores: np.ndarray) -> TaskScores:
    keys = np.array([str(i) for i in range(len(labels))], object)
    return TaskScores(task(), keys, labels.astype(float), np.stack([1 - scores, scores], axis=1))


@st.composite
def two_classes(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Labels of both classes, tied scores in [0, 1] and positive weights."""
    n = draw(st.integers(2, 40))
    labels = np.array(draw(st.lists(st.integers(0, 1), min_size=n, max_size=n)))
    labels[:2] = 0, 1
    levels = draw(st.sampled_from([1, 2, 5, 1000]))
    scores = np.array(draw(st.lists(st.integers(0, levels), min_size=n, max_size=n))) / levels
    weights = np.array(draw(st.lists(st.floats(0.1, 9.0), min_size=n, max_size=n)))
    return labels, scores, weights


@given(two_classes())
@settings(max_examples=60, deadline=None)
def test_auc_is_pair_counting_with_ties_one_half(case: tuple[np.ndarray, np.ndarray, np.ndarray]) -> None:
    labels, scores, weights = case
    high, low = scores[labels == 1], scores[labels == 0]
    wins = (high[:, None] > low[None]) + 0.5 * (high[:, None] == low[None])
    assert auc(labels, scores) == pytest.approx(wins.mean(), abs=EXACT)
    pair_weights = weights[labels == 1][:, None] * weights[labels == 0][None]
    expected = (wins * pair_weights).sum() / pair_weights.sum()
    assert auc(labels, scores, weights) == pytest.approx(expected, abs=EXACT)


@given(two_classes())
@settings(max_examples=40, deadline=None)
def test_ranking_metrics_agree_with_scikit_learn(case: tuple[np.ndarray, np.ndarray, np.ndarray]) -> None:
    labels, scores, weights = case
    assert auc(labels, scores, weights) == pytest.approx(
        sk.roc_auc_score(labels, scores, sample_weight=weights), abs=EXACT
    )
    for w in (weights, np.ones_like(weights)):
        value = average_precision_statistic(labels == 1, scores)(w[None])[0]
        assert value == pytest.approx(sk.average_precision_score(labels, scores, sample_weight=w), abs=EXACT)


@given(two_classes())
@settings(max_examples=40, deadline=None)
def test_integer_weights_are_repeated_samples(case: tuple[np.ndarray, np.ndarray, np.ndarray]) -> None:
    labels, scores, weights = case
    counts = np.ceil(weights).astype(int)
    once = statistics(binary(labels, scores))
    repeated = binary(np.repeat(labels, counts), np.repeat(scores, counts))
    for name, statistic in statistics(repeated).items():
        expected = statistic(np.ones((1, len(repeated))))[0]
        np.testing.assert_allclose(
            once[name](counts[None].astype(float))[0], expected, atol=EXACT, rtol=EXACT, err_msg=name
        )


@given(two_classes())
@settings(max_examples=40, deadline=None)
def test_binary_metrics_agree_with_scikit_learn(case: tuple[np.ndarray, np.ndarray, np.ndarray]) -> None:
    labels, scores, w = case
    sample = binary(labels, scores)
    said = (scores > 0.5).astype(int)
    got = {name: statistic(w[None])[0] for name, statistic in statistics(sample).items()}
    expected = {
        "accuracy": sk.accuracy_score(labels, said, sample_weight=w),
        "logloss": sk.log_loss(labels, sample.probabilities, sample_weight=w),
        "macro_f1": sk.f1_score(labels, said, average="macro", sample_weight=w),
        "f1": sk.f1_score(labels, said, sample_weight=w),
        # Where one class alone is said it is 0 by scikit-learn's convention, which rounding turns into NaN there.
        "matthews": sk.matthews_corrcoef(labels, said, sample_weight=w) if len(set(said)) > 1 else 0.0,
        "brier": sk.brier_score_loss(labels, scores, sample_weight=w),
        "calibration_ratio": (w * scores).sum() / (w * labels).sum(),
    }
    rate = (w * labels).sum() / w.sum()
    expected["normalized_entropy"] = expected["logloss"] / stats.entropy([rate, 1 - rate])
    for name, value in expected.items():
        assert got[name] == pytest.approx(value, abs=EXACT, rel=EXACT), name


@given(st.integers(2, 30), st.integers(2, 5), st.integers(0, 2**32 - 1))
@settings(max_examples=40, deadline=None)
def test_multiclass_metrics_agree_with_scikit_learn(n: int, classes: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, classes, n)
    labels[:2] = 0, 1
    probabilities = rng.dirichlet(np.ones(classes), n)
    sample = TaskScores(task("multiclass", classes), np.arange(n).astype(object), labels.astype(float), probabilities)
    said, w = probabilities.argmax(axis=1), rng.uniform(0.1, 3, n)
    got = {name: statistic(w[None])[0] for name, statistic in statistics(sample).items()}
    assert got["accuracy"] == pytest.approx(sk.accuracy_score(labels, said, sample_weight=w), abs=EXACT)
    assert got["matthews"] == pytest.approx(sk.matthews_corrcoef(labels, said, sample_weight=w), abs=EXACT)
    assert got["macro_f1"] == pytest.approx(sk.f1_score(labels, said, average="macro", sample_weight=w), abs=EXACT)
    losses = sk.log_loss(labels, probabilities, labels=np.arange(classes), sample_weight=w)
    assert got["logloss"] == pytest.approx(losses, abs=EXACT, rel=EXACT)


@given(st.integers(3, 40), st.integers(2, 30), st.integers(0, 2**32 - 1))
@example(3, 2, 5873)  # predictions that differ by rounding alone
@settings(max_examples=40, deadline=None)
def test_correlations_agree_with_scipy(n: int, levels: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, levels, n) / (levels - 1) * 5
    probabilities = np.round(rng.dirichlet(np.ones(6), n), 1)
    sample = TaskScores(task("ordinal", 6), np.arange(n).astype(object), labels, probabilities)
    got = {name: statistic(np.ones((1, n)))[0] for name, statistic in statistics(sample).items()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pearson, spearman = stats.pearsonr(sample.score, labels)[0], stats.spearmanr(sample.score, labels)[0]
    for name, expected in (("pearson", pearson), ("spearman", spearman)):
        assert (math.isnan(got[name]) and np.ptp(labels) * np.ptp(sample.score) < 1e-9) or got[name] == pytest.approx(
            expected, abs=1e-11
        )


def test_calibration_error_is_the_mean_gap_of_fifteen_bins() -> None:
    rng = np.random.default_rng(3)
    scores, labels = rng.uniform(size=500), rng.integers(0, 2, 500)
    edges, total = np.linspace(0, 1, 16), 0.0
    for low, high in itertools.pairwise(edges):
        inside = (scores > low) & (scores <= high)
        if inside.any():
            total += inside.mean() * abs(scores[inside].mean() - labels[inside].mean())
    assert statistics(binary(labels, scores))["ece"](np.ones((1, 500)))[0] == pytest.approx(total, abs=EXACT)


def test_grouped_auc_weighs_groups_by_size_and_skips_those_of_one_class() -> None:
    labels = np.array([0, 1, 1, 0, 1, 0, 0, 0])
    scores = np.array([0.1, 0.9, 0.05, 0.8, 0.3, 0.3, 0.2, 0.9])
    groups = np.array([0, 0, 0, 1, 1, 1, 2, 2])
    sample = binary(labels, scores)
    sample = TaskScores(sample.spec, sample.keys, sample.labels, sample.probabilities, groups)
    # group 0: 1 of 2 pairs; group 1: half of one tie of 2 pairs; group 2 has no positive
    assert statistics(sample)["grouped_auc"](np.ones((1, 8)))[0] == pytest.approx((3 * 0.5 + 3 * 0.25) / 6, abs=EXACT)


@pytest.mark.parametrize("label", [0, 1])
def test_one_class_leaves_order_undefined(label: int) -> None:
    labels, scores = np.full(7, label), np.linspace(0, 1, 7)
    got = {name: s(np.ones((1, 7)))[0] for name, s in statistics(binary(labels, scores)).items()}
    assert math.isnan(got["auc"])
    assert math.isnan(got["normalized_entropy"])
    assert math.isnan(got["matthews"])
    assert math.isnan(auc(labels, scores))
    assert got["accuracy"] == pytest.approx((scores.round() == label).mean(), abs=0.2)


def test_auc_of_replicates_equals_auc_of_each_alone() -> None:
    rng = np.random.default_rng(0)
    labels, scores = rng.integers(0, 2, 50), rng.integers(0, 9, 50) / 9
    weights = rng.integers(0, 4, (20, 50)).astype(float)
    together = auc_statistic(labels == 1, scores)(weights)
    alone = [sk.roc_auc_score(labels, scores, sample_weight=w) for w in weights]
    np.testing.assert_allclose(together, alone, atol=EXACT)


def test_choice_rows_of_different_length_are_padded() -> None:
    frame = pd.DataFrame(
        {
            "key": ["b", "a"],
            "task": "t",
            "label": [2.0, 0.0],
            "scores": [[0.2, 0.3, 0.5], [0.6, 0.4]],
            "group": None,
        }
    )
    sample = by_task(frame, [task("choice")])["t"]
    assert sample.keys.tolist() == ["a", "b"]
    np.testing.assert_allclose(sample.probabilities, [[0.6, 0.4, 0.0], [0.2, 0.3, 0.5]])
    assert sample.predicted.tolist() == [0, 2]
