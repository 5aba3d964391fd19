"""Scores and rows of made-up arms."""

from __future__ import annotations

from typing import Any

import numpy as np

from pipeline.contracts import TaskSpec
from pipeline.evaluation.score_table import TaskScores
from pipeline.study.results import ArmRuns

TASKS = ("tone", "size", "a_third_task")


def scores(right: float, seed: int, samples: int = 120) -> dict[str, TaskScores]:
    """Return scores of three tasks of which a share is right, the same samples whatever the seed."""
    found = {}
    for number, task in enumerate(TASKS):
        labels = np.random.default_rng(number).integers(0, 2, samples)
        hit = np.random.default_rng([seed, number]).random(samples) < right
        said = np.where(hit, labels, 1 - labels)
        probabilities = np.where(np.arange(2) == said[:, None], 0.8, 0.2)
        spec = TaskSpec(name=task, template="{text}", label_words=(" no", " yes"), metric="accuracy")
        keys = np.array([str(i) for i in range(samples)], object)
        found[task] = TaskScores(spec, keys, labels.astype(float), probabilities)
    return found


def arm(name: str, right: float, parameters: int = 1000, seeds: int = 3, at_edge: bool = False) -> ArmRuns:
    """Return an arm's runs."""
    rows: list[dict[str, Any]] = [
        {"adapter_parameters": parameters, "parameters": 100_000, "train_s": 2.0} for _ in range(seeds)
    ]
    curve = {1e-3: right - 0.1, 1e-2: right, 1e-1: right - 0.2}
    runs = [scores(right, seed) for seed in range(seeds)]
    return ArmRuns(name, name.replace("_", " "), 1e-2, at_edge, curve, runs, rows)


UNTRAINED = {"tasks": {task: {"metric": "accuracy", "value": 0.5, "n": 120} for task in TASKS}}
