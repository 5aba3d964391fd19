"""One self-contained HTML page: the verdict on top, then what it rests on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import pandas as pd
import yaml

from pipeline.contracts import (
    Comparison,
    EvaluationReport,
    PromotionDecision,
    ShardManifest,
    TaskResult,
    TaskSpec,
    write_atomic,
)
from pipeline.evaluation import plots
from pipeline.evaluation.features import TaskFeatures
from pipeline.evaluation.frame import TaskScores, by_task
from pipeline.evaluation.report_sections import (
    data_rows,
    distance_map,
    drift_rows,
    feature_planes,
    mixing_map,
    pace,
)

NAMES = {
    "auc": "AUC",
    "pr_auc": "PR-AUC",
    "grouped_auc": "AUC within groups",
    "accuracy": "Accuracy",
    "exact_match": "Exact match",
    "macro_f1": "Macro-F1",
    "f1": "F1",
    "matthews": "Matthews correlation",
    "pearson": "Pearson correlation",
    "spearman": "Spearman correlation",
    "logloss": "Log loss",
    "normalized_entropy": "Normalized entropy",
    "calibration_ratio": "Calibration ratio",
    "ece": "Calibration error (ECE)",
    "brier": "Brier score",
}
"""Metrics as a reader knows them, in the order they are shown."""


def write_report(
    path: str | Path,
    *,
    run_name: str,
    config: Mapping[str, Any] | None,
    manifest: ShardManifest,
    candidate: EvaluationReport,
    base: EvaluationReport | None = None,
    champion: EvaluationReport | None = None,
    decision: PromotionDecision | None = None,
    scores: pd.DataFrame | None = None,
    base_scores: pd.DataFrame | None = None,
    champion_scores: pd.DataFrame | None = None,
    history: Sequence[Mapping[str, Any]] | None = None,
    mixing: Mapping[str, Sequence[float]] | None = None,
    lambda_distance: Mapping[str, Mapping[str, float]] | None = None,
    lineage: Mapping[str, Any] | None = None,
    comparison: Comparison | None = None,
    drift: Any = None,
    features: Mapping[str, TaskFeatures] | None = None,
    features_note: str = "",
) -> None:
    """Write the page; a part without its input is left out.

    Args:
        path: of the HTML file.
        run_name: heading.
        config: the run's resolved configuration, shown folded.
        manifest: of the data that was scored.
        candidate: what the new model scored.
        base: what the untrained model scored.
        champion: what the present champion scored.
        decision: verdict and reasons.
        scores: the candidate's scores, for the plots.
        base_scores: the untrained model's.
        champion_scores: the champion's.
        history: training log, one row a logged step (``step``, ``loss``, ``task_loss``, ``learning_rate``,
            ``tokens_per_s``).
        mixing: task → weight of each up-projection.
        lambda_distance: task → task → distance of their Λ.
        lineage: what the model was made from, by name.
        comparison: paired differences to another model, shown in the table of tasks.
        drift: :class:`pipeline.ingestion.drift.DriftReport` against an earlier window.
        features: model (``LoRA``, ``MTL-LoRA``) → task features of the same samples, drawn side by side.
        features_note: said under them.
    """
    names = [spec.name for spec in manifest.tasks]
    planes, feature_tasks = feature_planes(features, names)
    given = {"candidate": candidate, "champion": champion, "base": base}
    reports = {name: report for name, report in given.items() if report is not None}
    frames = {"candidate": scores, "champion": champion_scores, "base": base_scores}
    samples = {name: by_task(frame, manifest.tasks) for name, frame in frames.items() if frame is not None}
    page = (
        _environment()
        .get_template("report.html.j2")
        .render(
            run_name=run_name,
            decision=decision,
            reports=reports,
            rows=_rows(reports),
            averaged=_averaged(candidate),
            sections=[_section(spec, reports, samples) for spec in manifest.tasks if spec.name in candidate.tasks],
            curves=[plots.learning_curve(history, names, *size) for size in ((680, 280), (340, 250))]
            if history
            else [],
            curve_tasks=plots.logged_tasks(history or (), names),
            pace=[chart for chart in pace(history) if chart[1]] if history else [],
            mixing=mixing_map(mixing),
            distances=distance_map(lambda_distance),
            data=data_rows(manifest),
            lineage=lineage or {},
            comparison=comparison,
            drift=drift,
            drift_rows=drift_rows(drift),
            planes=planes,
            feature_tasks=feature_tasks,
            features_note=features_note,
            config=yaml.safe_dump(dict(config), sort_keys=False) if config else "",
        )
    )
    write_atomic(path, page)


def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("pipeline.evaluation", "."),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters["num"] = _num
    environment.filters["p"] = lambda value: "< 0.001" if value is not None and value < 0.001 else _num(value)
    environment.filters["interval"] = _interval
    environment.filters["signed"] = lambda value, digits=3: (
        "–" if value is None else f"{value:+.{digits}f}".replace("-", "−")
    )
    environment.filters["metric"] = lambda name: NAMES.get(name, name)
    environment.filters["words"] = lambda name: str(name).replace("_", " ")
    environment.filters["thousands"] = lambda count: f"{count:,}".replace(",", "\u202f")
    return environment


def _num(value: float | None, digits: int = 3) -> str:
    return "–" if value is None else f"{value:.{digits}f}".replace("-", "−")


def _interval(pair: tuple[float, float] | None) -> str:
    return "" if pair is None else f"{_num(pair[0])}\u2009–\u2009{_num(pair[1])}"


def _rows(reports: Mapping[str, EvaluationReport]) -> list[dict[str, Any]]:
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
            "plot": plots.forest(marks[name], result.ci95, ends),
            "ends": ends,
        }
        for name, result in candidate.tasks.items()
    ]


def _averaged(report: EvaluationReport) -> str:
    metrics: dict[str, list[str]] = {}
    for name, result in report.tasks.items():
        metrics.setdefault(NAMES[result.metric], []).append(name.replace("_", " "))
    return "; ".join(f"{metric} of {', '.join(names)}" for metric, names in metrics.items())


def _marks(task: str, reports: Mapping[str, EvaluationReport]) -> dict[str, float | None]:
    found = {name: report.tasks[task].value for name, report in reports.items() if task in report.tasks}
    return {**found, "best": reports["candidate"].tasks[task].best_attainable}


def _section(
    spec: TaskSpec, reports: Mapping[str, EvaluationReport], samples: Mapping[str, Mapping[str, TaskScores]]
) -> dict[str, Any]:
    """Return one task's part of the page: its charts and all its metrics."""
    results = {name: report.tasks[spec.name] for name, report in reports.items() if spec.name in report.tasks}
    there = {name: parts[spec.name] for name, parts in samples.items() if spec.name in parts}
    return {
        "spec": spec,
        "result": results["candidate"],
        "charts": plots.task_charts(there) if "candidate" in there else [],
        "models": [name for name in ("candidate", "champion", "base") if name in results],
        "metrics": _metrics(results),
    }


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
        for metric in NAMES
        if metric in candidate.intervals or everything["candidate"].get(metric) is not None
    ]


def _all_metrics(result: TaskResult) -> dict[str, float | None]:
    named = {"auc": result.auc, "accuracy": result.accuracy, "logloss": result.logloss, "ece": result.ece}
    return {**named, **result.more}
