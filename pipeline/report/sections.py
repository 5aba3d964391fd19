"""The page's sections as its templates take them: rows of the tables, charts with their captions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from pipeline.contracts import EvaluationReport, ShardManifest, TaskResult, TaskSpec
from pipeline.evaluation.features import TaskFeatures, plane, separation
from pipeline.evaluation.score_table import TaskScores
from pipeline.report import charts
from pipeline.report.adapter_view import AdapterView
from pipeline.report.drawing import Chart
from pipeline.report.examples import PROBABILITY, ImagesOf, examples, has_examples

METRICS = {
    "auc": "AUC",
    "pr_auc": "PR-AUC",
    "grouped_auc": "AUC within groups",
    "accuracy": "Accuracy",
    "exact_match": "Exact match",
    "token_f1": "Token F1",
    "rouge_l": "ROUGE-L",
    "bleu": "BLEU",
    "chrf": "chrF",
    "cider": "CIDEr-D, over 10",
    "answered": "Answered by a label word",
    "micro_f1": "Micro-F1",
    "macro_f1": "Macro-F1",
    "macro_auc": "Macro-AUC",
    "subset_accuracy": "Subset accuracy",
    "f1": "F1",
    "matthews": "Matthews correlation",
    "pearson": "Pearson correlation",
    "spearman": "Spearman correlation",
    "rmse": "Root mean squared error",
    "mae": "Mean absolute error",
    "logloss": "Log loss",
    "normalized_entropy": "Normalized entropy",
    "calibration_ratio": "Calibration ratio",
    "ece": "Calibration error (ECE)",
    "brier": "Brier score",
    PROBABILITY: "the right answer's probability",
}
"""Metrics as a reader knows them, in the order they are shown."""


def task_rows(reports: Mapping[str, EvaluationReport]) -> list[dict[str, Any]]:
    """Return the table of tasks, each row with its place on a scale common to all."""
    candidate = reports["candidate"]
    marks = {name: _marks(name, reports) for name in candidate.tasks}
    numbers = [v for each in marks.values() for v in each.values() if v is not None]
    numbers += [end for result in candidate.tasks.values() for end in result.ci95 or ()]
    low, high = (min(numbers), max(numbers)) if numbers else (0.0, 1.0)
    ends = (max(-1.0, np.floor(low * 20) / 20), min(1.0, np.ceil(high * 20) / 20))
    ends = ends if ends[1] > ends[0] else (ends[0] - 0.5, ends[0] + 0.5)
    return [
        {
            "name": name,
            "result": result,
            "others": {other: reports[other].tasks.get(name) for other in ("base", "champion") if other in reports},
            "plot": charts.forest(marks[name], result.ci95, ends),
            "ends": ends,
        }
        for name, result in candidate.tasks.items()
    ]


def averaged(report: EvaluationReport) -> str:
    """Say of which metrics the macro is the mean."""
    metrics: dict[str, list[str]] = {}
    for name, result in report.tasks.items():
        metrics.setdefault(METRICS[result.metric], []).append(name.replace("_", " "))
    return "; ".join(f"{metric} of {', '.join(names)}" for metric, names in metrics.items())


def _marks(task: str, reports: Mapping[str, EvaluationReport]) -> dict[str, float | None]:
    found = {name: report.tasks[task].value for name, report in reports.items() if task in report.tasks}
    return {**found, "best": reports["candidate"].tasks[task].best_attainable}


def task_section(
    spec: TaskSpec,
    reports: Mapping[str, EvaluationReport],
    samples: Mapping[str, Mapping[str, TaskScores]],
    prompts: Mapping[tuple[str, str], str],
    images_of: ImagesOf | None = None,
) -> dict[str, Any]:
    """Return one task's part of the page: its charts, all its metrics, and what it wrote."""
    results = {name: report.tasks[spec.name] for name, report in reports.items() if spec.name in report.tasks}
    there = {name: parts[spec.name] for name, parts in samples.items() if spec.name in parts}
    return {
        "spec": spec,
        "result": results["candidate"],
        "charts": charts.task_charts(there) if "candidate" in there else [],
        **_answers(spec, there, prompts, images_of),
        "models": [name for name in ("candidate", "champion", "base") if name in results],
        "metrics": _metrics(results),
    }


def _answers(
    spec: TaskSpec,
    samples: Mapping[str, TaskScores],
    prompts: Mapping[tuple[str, str], str],
    images_of: ImagesOf | None,
) -> dict[str, Any]:
    """Return what was answered to read: examples, how they were chosen, and against whom."""
    if not has_examples(spec) or "candidate" not in samples:
        return {"examples": [], "examples_metric": "", "examples_against": ""}
    against = next((name for name in ("base", "champion") if name in samples), "")
    shown, metric = examples(samples["candidate"], samples.get(against), prompts, images_of)
    return {"examples": shown, "examples_metric": metric, "examples_against": against}


def _metrics(results: Mapping[str, TaskResult]) -> list[dict[str, Any]]:
    candidate = results["candidate"]
    everything = {name: _all_metrics(result) for name, result in results.items()}
    return [
        {
            "name": metric,
            "values": {name: values.get(metric) for name, values in everything.items()},
            "interval": candidate.intervals.get(metric),
            "reason": candidate.undefined.get(metric),
        }
        for metric in METRICS
        if metric in candidate.intervals or everything["candidate"].get(metric) is not None
    ]


def _all_metrics(result: TaskResult) -> dict[str, float | None]:
    named = {"auc": result.auc, "accuracy": result.accuracy, "logloss": result.logloss, "ece": result.ece}
    return {**named, **result.more}


def pace(history: Sequence[Mapping[str, Any]]) -> list[tuple[str, Chart]]:
    """Return the charts of learning rate and speed that the log has numbers for, each with its caption."""
    drawn = {
        "Learning rate": charts.series(history, "learning_rate", "learning rate"),
        "Tokens a second": charts.series(history, "tokens_per_s", "tokens a second"),
    }
    return [(caption, chart) for caption, chart in drawn.items() if chart is not None]


def mixing_map(adapter: AdapterView | None) -> Chart | None:
    """Return the heat map of tasks and up-projections."""
    if adapter is None:
        return None
    values = np.array(list(adapter.mixing.values()), np.float64)
    columns = [f"B{i + 1}" for i in range(values.shape[1])]
    rows = [_words(name) for name in adapter.mixing]
    return charts.heat_map(values, rows, columns, "Mixing weights of each task", column_title="up-projection")


def distance_map(adapter: AdapterView | None) -> Chart | None:
    """Return the heat map of the distances between the tasks' transformations."""
    if adapter is None:
        return None
    names = list(adapter.lambda_distance)
    values = np.array([[adapter.lambda_distance[a][b] for b in names] for a in names], np.float64)
    numbers = [str(i + 1) for i in range(len(names))]
    rows = [f"{_words(name)} · {number}" for name, number in zip(names, numbers, strict=True)]
    return charts.heat_map(values, rows, numbers, "Distances between the tasks' transformations")


def _words(name: str) -> str:
    return name.replace("_", " ")


def data_rows(manifest: ShardManifest) -> list[dict[str, Any]]:
    """Return one row a task: samples a split, the positives' or commonest class's share, records put aside."""
    splits = sorted({shard.split for shard in manifest.shards})
    rows = []
    for spec in manifest.tasks:
        labels: dict[str, int] = {}
        for shard in manifest.shards:
            if shard.task == spec.name and spec.kind != "generation":  # texts are no classes to be counted
                for label, count in shard.label_counts.items():
                    labels[label] = labels.get(label, 0) + count
        rows.append(
            {
                "name": spec.name,
                "kind": spec.kind,
                "splits": {split: manifest.samples_of(spec.name, split) for split in splits},
                "labels": dict(sorted(labels.items(), key=lambda item: -item[1])[:4]),
                "rejected": sum(r.records for r in manifest.rejected if r.task == spec.name),
            }
        )
    return rows


def feature_planes(
    features: Mapping[str, TaskFeatures], order: Sequence[str]
) -> tuple[list[tuple[str, float | None, Chart]], list[str]]:
    """Return each model's t-SNE plane with its separation of the tasks, and the tasks in the order of their colours.

    The separation is None where there is one task alone.
    """
    there = {task for found in features.values() for task in found.tasks}
    names = [name for name in order if name in there]
    planes = []
    for model, found in features.items():
        codes = np.array([names.index(task) for task in found.tasks])
        apart = separation(found) if len(set(found.tasks)) > 1 else None
        planes.append((model, apart, charts.scatter(plane(found.features), codes, f"Task features of {model}")))
    return planes, names
