"""Metrics of sets of classes and of numbers are scikit-learn's and scipy's, with intervals, paired and drawn."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from scipy.stats import pearsonr, spearmanr
from sklearn.metrics import (
    accuracy_score,
    f1_score,
    log_loss,
    mean_absolute_error,
    roc_auc_score,
    root_mean_squared_error,
)

from pipeline.contracts import Sample, TaskSpec
from pipeline.errors import InputError
from pipeline.evaluation.compare import compare
from pipeline.evaluation.predict import score_table
from pipeline.evaluation.score_table import by_task
from pipeline.evaluation.summary import summarize
from pipeline.label_names import label_of
from pipeline.report.charts import task_charts

TOPICS = TaskSpec(name="topics", kind="multilabel", segments=("{a}",), labels=("cars", "sofas", "music"))
PRICE = TaskSpec(name="price", kind="regression", segments=("{a}",), label_values=(10, 50))
NUM = 300


def _scores(noise: float, seed: int = 0) -> tuple[pd.DataFrame, np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    has = rng.random((NUM, 3)) < (0.2, 0.5, 0.7)
    said = np.clip(0.5 * has + 0.25 + noise * rng.normal(size=has.shape) * 0.3, 0.01, 0.99)
    prices = rng.normal(30, 10, NUM)
    found = prices + noise * rng.normal(size=NUM) * 8
    samples = [
        Sample(key=str(i), task="topics", fields={"a": ""}, label=label_of(np.flatnonzero(row).tolist()))
        for i, row in enumerate(has)
    ] + [Sample(key=str(i), task="price", fields={"a": ""}, label=price) for i, price in enumerate(prices)]
    return score_table(samples, [*said, *found[:, None]]), has, said, prices, found


def test_metrics_are_those_of_the_libraries_and_have_intervals() -> None:
    table, has, said, prices, found = _scores(1.0)
    report = summarize(table, [TOPICS, PRICE], model="m", data={}, replicates=200)
    topics, price = report.tasks["topics"], report.tasks["price"]
    guess = said >= 0.5
    assert topics.metric == "micro_f1" and price.metric == "pearson"
    assert {name: topics.more[name] for name in ("micro_f1", "macro_f1", "macro_auc", "subset_accuracy")} == {
        "micro_f1": pytest.approx(f1_score(has, guess, average="micro")),
        "macro_f1": pytest.approx(f1_score(has, guess, average="macro")),
        "macro_auc": pytest.approx(roc_auc_score(has, said, average="macro")),
        "subset_accuracy": pytest.approx(accuracy_score(has, guess)),
    }
    assert topics.logloss == pytest.approx(np.mean([log_loss(has[:, c], said[:, c]) for c in range(3)]))
    assert price.more == {
        "pearson": pytest.approx(pearsonr(prices, found).statistic),
        "spearman": pytest.approx(spearmanr(prices, found).statistic),
        "rmse": pytest.approx(root_mean_squared_error(prices, found)),
        "mae": pytest.approx(mean_absolute_error(prices, found)),
    }
    for result in (topics, price):
        assert set(result.intervals) == set(result.more) | ({"logloss"} if result is topics else set())
        for name, interval in result.intervals.items():
            value = result.more.get(name, result.logloss)
            assert interval is not None and value is not None and interval[0] < value < interval[1]


@pytest.mark.parametrize("metric", ["micro_f1", "macro_f1", "macro_auc", "subset_accuracy"])
def test_a_better_model_is_shown_to_be_better(metric: str) -> None:
    specs = [TOPICS.model_copy(update={"metric": metric}), PRICE]
    better, worse = _scores(0.6)[0], _scores(2.0)[0]
    found = compare(better, worse, specs, candidate_name="a", reference_name="b", data={}, replicates=200)
    assert [task.verdict for task in found.tasks.values()] == ["better", "better"]


def test_what_is_undefined_says_why() -> None:
    table = _scores(1.0)[0]
    topics, price = table[table.task == "topics"].copy(), table[table.task == "price"].copy()
    topics["label"], price["label"] = 0.0, 30.0
    report = summarize(pd.concat([topics, price]), [TOPICS, PRICE], model="m", data={}, replicates=50)
    assert "tells a class from the others" in report.tasks["topics"].undefined["macro_auc"]
    assert "labels are equal" in (report.tasks["price"].reason or "")


def test_numbers_that_are_none_and_sets_of_unknown_classes_are_refused() -> None:
    table = _scores(1.0)[0]
    table.loc[table.task == "topics", "label"] = 8.0
    with pytest.raises(InputError, match="a set of classes"):
        by_task(table, [TOPICS, PRICE])
    rows = [row if task != "price" else np.array([np.inf]) for task, row in zip(table.task, table.scores, strict=True)]
    with pytest.raises(InputError, match="finite numbers"):
        by_task(table.assign(scores=rows, label=0.0), [TOPICS, PRICE])


def test_each_has_its_charts() -> None:
    parts = by_task(_scores(1.0)[0], [TOPICS, PRICE])
    captions = {name: [caption for caption, _ in task_charts({"candidate": part})] for name, part in parts.items()}
    assert captions == {
        "topics": ["Reliability", "Scores"],
        "price": ["Predicted number against label", "Scores"],
    }
