"""Sections of the report beyond the tasks' own: training, the shared adapter, data, drift, features."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from markupsafe import Markup

from pipeline.contracts import ShardManifest
from pipeline.evaluation import plots
from pipeline.evaluation.charts import heat_map
from pipeline.evaluation.features import TaskFeatures, plane, separation


def pace(history: Sequence[Mapping[str, Any]]) -> list[tuple[str, Markup | None]]:
    """Return the charts of learning rate and speed, each with its caption; None where the log lacks one."""
    return [
        ("Learning rate", plots.series(history, "learning_rate", "learning rate")),
        ("Tokens a second", plots.series(history, "tokens_per_s", "tokens a second")),
    ]


def mixing_map(mixing: Mapping[str, Sequence[float]] | None) -> Markup | None:
    """Return the heat map of tasks and up-projections."""
    if not mixing:
        return None
    values = np.array([list(row) for row in mixing.values()], np.float64)
    columns = [f"B{i + 1}" for i in range(values.shape[1])]
    return heat_map(
        values, [_words(name) for name in mixing], columns, "Mixing weights of each task", column_title="up-projection"
    )


def distance_map(distances: Mapping[str, Mapping[str, float]] | None) -> Markup | None:
    """Return the heat map of the distances between the tasks' transformations."""
    if not distances:
        return None
    names = list(distances)
    values = np.array([[distances[a].get(b, np.nan) for b in names] for a in names], np.float64)
    numbers = [str(i + 1) for i in range(len(names))]
    rows = [f"{_words(name)} · {number}" for name, number in zip(names, numbers, strict=True)]
    return heat_map(values, rows, numbers, "Distances between the tasks' transformations")


def _words(name: str) -> str:
    return name.replace("_", " ")


def data_rows(manifest: ShardManifest) -> list[dict[str, Any]]:
    """Return one row a task: samples a split, the positives' or commonest class's share, records put aside."""
    splits = sorted({shard.split for shard in manifest.shards})
    rows = []
    for spec in manifest.tasks:
        labels: dict[str, int] = {}
        for shard in manifest.shards:
            if shard.task == spec.name:
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
    features: Mapping[str, TaskFeatures] | None, order: Sequence[str]
) -> tuple[list[tuple[str, float, Markup]], list[str]]:
    """Return each model's t-SNE plane with its separation of the tasks, and the tasks in the order of their colours."""
    if not features:
        return [], []
    there = {task for found in features.values() for task in found.tasks}
    names = [name for name in order if name in there]
    planes = []
    for model, found in features.items():
        codes = np.array([names.index(task) for task in found.tasks])
        apart = separation(found) if len(set(found.tasks)) > 1 else float("nan")
        planes.append((model, apart, plots.scatter(plane(found.features), codes, f"Task features of {model}")))
    return planes, names


def drift_rows(drift: Any) -> list[dict[str, Any]]:
    """Return one row a task of a :class:`pipeline.ingestion.drift.DriftReport`: its measures with their verdicts."""
    if drift is None:
        return []
    return [{"name": name, "measures": measures} for name, measures in drift.tasks.items()]
