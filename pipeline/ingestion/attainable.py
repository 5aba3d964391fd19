"""The best score that any model can reach on labels drawn from known probabilities."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from pipeline.contracts import Sample, TaskSpec


def best_attainable(spec: TaskSpec, samples: Sequence[Sample], probabilities: Sequence[Sequence[float]]) -> float:
    """Return the task's metric of a model that knows each record's label probabilities, on these very labels."""
    from sklearn.metrics import roc_auc_score

    labels = np.array([int(sample.label) for sample in samples])
    known = np.asarray(probabilities, dtype=float)
    if spec.metric == "auc":
        return float(roc_auc_score(labels, known[:, 1])) if len(set(labels.tolist())) == 2 else float("nan")
    return float((known.argmax(axis=1) == labels).mean())
