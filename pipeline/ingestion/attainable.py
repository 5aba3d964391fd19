"""The best score that any model can reach on labels drawn from known probabilities."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from pipeline.contracts import TaskSpec
from pipeline.ingestion.resolve import KEEP, RENAMED, Decisions
from pipeline.ingestion.scan import part, read_rows
from pipeline.json_text import parse_json


def best_of_all(tasks: Sequence[TaskSpec], decisions: Decisions, work: Path) -> dict[str, float]:
    """Return for each task whose test records all carry their label probabilities the best score on them."""
    labels: dict[int, list[np.ndarray]] = {}
    known: dict[int, list[list[float]]] = {}
    for unit in decisions.scanned:
        path = part(work, unit.number, "known")
        if unit.split != "test" or not path.stat().st_size:
            continue
        with path.open("rb") as file:
            found = dict(parse_json(line) for line in file)
        rows = read_rows(work, unit.number)
        kept = decisions.of[unit.number] & ~np.uint8(RENAMED) == KEEP
        for task in np.unique(rows["task"]):
            mine = np.flatnonzero(kept & (rows["task"] == task))
            labels.setdefault(int(task), []).append(rows["label"][mine])
            known.setdefault(int(task), []).extend(found[row] for row in mine.tolist() if row in found)
    best = {}
    for number, probabilities in known.items():
        truth = np.concatenate(labels[number])
        if len(truth) == len(probabilities) and len(truth):
            score = best_attainable(tasks[number], truth, probabilities)
            if np.isfinite(score):
                best[tasks[number].name] = score
    return dict(sorted(best.items()))


def best_attainable(spec: TaskSpec, labels: np.ndarray, probabilities: Sequence[Sequence[float]]) -> float:
    """Return the task's metric of a model that knows each record's label probabilities, on these very labels."""
    from sklearn.metrics import roc_auc_score

    known = np.asarray(probabilities, dtype=float)
    if spec.metric == "auc":
        return float(roc_auc_score(labels, known[:, 1])) if len(np.unique(labels)) == 2 else float("nan")
    return float((known.argmax(axis=1) == labels).mean())
