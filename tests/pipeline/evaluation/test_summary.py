"""Scores survive their file, summaries say what they mean, and nothing undefined becomes a number."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from scipy.stats import binomtest
from sklearn.metrics import roc_auc_score

from pipeline.contracts import EvaluationReport, Sample, TaskSpec
from pipeline.errors import InputError
from pipeline.evaluation.delong import auc_interval
from pipeline.evaluation.predict import latency_ms, predict
from pipeline.evaluation.score_table import TaskScores, read_scores, write_scores
from pipeline.evaluation.summary import summarize, task_result
from tests.pipeline.evaluation.simulated import scores, specs

DATA = {"manifest_sha256": "0" * 64, "split": "test"}


def summary(frame: pd.DataFrame, **more: object) -> EvaluationReport:
    return summarize(frame, specs(), model="m", data=DATA, replicates=100, **more)


def test_scores_come_back_from_parquet_as_they_were(tmp_path: Path) -> None:
    frame = scores(0.5, seed=1, num=50, group_size=5)
    frame["group"] = [None if i == 3 else group for i, group in enumerate(frame["group"])]
    frame["group"] = frame["group"].astype(object)
    write_scores(tmp_path / "s.parquet", frame.assign(day="2026-05-03"))
    back = read_scores(tmp_path / "s.parquet")
    assert back["group"].tolist() == [None if i == 3 else f"g{i % 50 // 5}" for i in range(150)]
    assert back["day"].unique().tolist() == ["2026-05-03"]
    np.testing.assert_array_equal(np.stack(back["scores"].tolist()), np.stack(frame["scores"].tolist()))
    assert list(tmp_path.iterdir()) == [tmp_path / "s.parquet"]
    assert summary(back).macro == summary(frame).macro


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda f: f.drop(columns="label"), r"lacks \['label'\]"),
        (lambda f: pd.concat([f, f[:2]]), "got 2 double ones"),
        (lambda f: f.replace({"task": {"query_ad": "query_adds"}}), "did you mean 'query_ad'"),
        (lambda f: f.assign(scores=[[0.2, 0.3, 0.5]] * len(f)), r"one score a class, 2, got \[3\]"),
        (lambda f: f.assign(label=2.0), "class index"),
        (lambda f: f.assign(scores=[[np.nan, 1.0]] * len(f)), "finite"),
    ],
)
def test_a_frame_that_breaks_its_form_is_refused(spoil, words: str) -> None:
    with pytest.raises(InputError, match=words):
        summary(spoil(scores(0.5, seed=1, num=40)))


def test_missing_and_broken_files_name_the_remedy(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="run evaluate first"):
        read_scores(tmp_path / "none.parquet")
    (tmp_path / "bad.parquet").write_text("no parquet")
    with pytest.raises(InputError, match="run evaluate again"):
        read_scores(tmp_path / "bad.parquet")


def test_summary_holds_the_metrics_and_is_independent_of_row_order() -> None:
    frame = scores(0.5, seed=1)
    report, shuffled = summary(frame), summary(frame.sample(frac=1, random_state=0))
    assert report == shuffled
    part = frame[frame.task == "query_ad"]
    result, p = report.tasks["query_ad"], np.array([s[1] for s in part.scores])
    assert result.value == result.auc == pytest.approx(roc_auc_score(part.label, p), abs=1e-12)
    assert result.ci95 == pytest.approx(auc_interval(part.label.to_numpy(), p))
    assert set(result.intervals) >= {"auc", "pr_auc", "accuracy", "logloss", "ece", "calibration_ratio"}
    assert report.macro.value == pytest.approx(np.mean([r.value for r in report.tasks.values()]))
    assert report.macro.averages == "query_ad (auc), query_keyword (auc), ad_landing_page (auc)"
    assert EvaluationReport.model_validate_json(report.model_dump_json(by_alias=True)) == report


def test_grouped_samples_have_wider_intervals_and_a_grouped_auc() -> None:
    alone = scores(2.0, seed=1, group_size=30)
    grouped = summary(alone).tasks["query_ad"]
    apart = summary(alone.assign(group=None)).tasks["query_ad"]
    assert "grouped_auc" in grouped.more
    assert "grouped_auc" not in apart.more
    assert grouped.value == apart.value
    assert np.ptp(grouped.intervals["logloss"]) > 1.5 * np.ptp(apart.intervals["logloss"])


def test_one_class_is_null_with_a_reason_and_the_macro_with_it() -> None:
    report = summary(scores(0.5, seed=1, num=60, one_class="query_ad"))
    result = report.tasks["query_ad"]
    assert (result.value, result.ci95, result.auc) == (None, None, None)
    assert result.reason == "all 60 labels are class 0; auc needs at least two classes"
    assert result.accuracy is not None
    assert result.undefined["normalized_entropy"].startswith("all 60 labels")
    assert (report.macro.value, report.macro.reason) == (None, "undefined for query_ad")


def test_a_task_without_samples_is_undefined() -> None:
    frame = scores(0.5, seed=1, num=60)
    result = summary(frame[frame.task != "query_ad"]).tasks["query_ad"]
    assert (result.n, result.value) == (0, None)
    assert result.reason == "no sample of task 'query_ad' was scored"


class LengthScorer:
    """P(class 1) from the text's length; counts what it was asked."""

    def __init__(self) -> None:
        self.asked: list[int] = []

    def probabilities(self, samples):
        self.asked.append(len(samples))
        lengths = [min(9, len(s.fields["text"])) / 10 for s in samples]
        return [np.array([1 - x, x]) for x in lengths]


def test_predict_scores_each_sample_once_and_reports_progress() -> None:
    samples = [
        Sample(key=f"k{i}", task="query_ad", fields={"text": "x" * (i % 9)}, label=i % 2, group=f"g{i // 4}")
        for i in range(10)
    ]
    scorer, done = LengthScorer(), []
    frame = predict(scorer, iter(samples), done.append, chunk=4)
    assert scorer.asked == done == [4, 4, 2]
    assert frame["key"].tolist() == [s.key for s in samples]
    assert [s[1] for s in frame["scores"]] == pytest.approx([min(9, i % 9) / 10 for i in range(10)])
    with pytest.raises(InputError, match="exactly once"):
        predict(scorer, samples + samples[:1])


class SlowScorer(LengthScorer):
    def probabilities(self, samples):
        time.sleep(0.2 if samples[0].key == "slow" else 0.002)
        return super().probabilities(samples)


def test_latency_is_the_median_of_single_rows() -> None:
    samples = [Sample(key=k, task="query_ad", fields={"text": "x"}, label=0) for k in ("a", "slow", "b", "c", "d")]
    scorer = SlowScorer()
    assert 2.0 <= latency_ms(scorer, samples) < 100
    assert scorer.asked == [1] * 8
    with pytest.raises(InputError, match="at least one sample"):
        latency_ms(scorer, [])


@pytest.mark.parametrize("right", [0, 3, 8])
def test_a_share_of_few_samples_is_never_sure(right: int) -> None:
    spec = TaskSpec(name="vertical", kind="multiclass", template="{text}", label_words=(" a", " b", " c"))
    said = np.zeros((8, 3))
    said[:, 1] = 0.6
    said[:, 0] = said[:, 2] = 0.2
    labels = np.array([1.0] * right + [2.0] * (8 - right))
    sample = TaskScores(spec, np.array([str(i) for i in range(8)], dtype=object), labels, said)
    result = task_result(sample, np.random.default_rng(0), 200)
    low, high = result.intervals["accuracy"]
    expected = binomtest(right, 8).proportion_ci(method="wilson")
    assert (low, high) == pytest.approx((expected.low, expected.high), abs=1e-12)
    assert high - low > 0.3


@pytest.mark.parametrize("num", [1, 2, 3])
def test_a_handful_of_samples_has_metrics_and_no_interval_that_it_cannot_have(num: int) -> None:
    frame = scores(0.5, seed=1, num=300)
    few = pd.concat([part.head(num) for _, part in frame.groupby("task")])
    for result in summary(few).tasks.values():
        assert result.n == num
        assert result.intervals["logloss"] is None or num > 2
