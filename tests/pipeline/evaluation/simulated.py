"""Scores of a simulated model: binary tasks whose labels follow a known logit, seen through noise."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd

from pipeline.contracts import TaskSpec

TASKS = ("query_ad", "query_keyword", "ad_landing_page")


def specs(names: Sequence[str] = TASKS) -> list[TaskSpec]:
    return [TaskSpec(name=name, template="{text}", label_words=(" no", " yes")) for name in names]


def scores(
    noise: float | dict[str, float],
    *,
    seed: int,
    num: int = 900,
    holdout: int = 0,
    names: Sequence[str] = TASKS,
    sharpen: float = 1.0,
    one_class: str = "",
    group_size: int = 0,
) -> pd.DataFrame:
    """Return scores of one model.

    Args:
        noise: standard deviation of the model's error on the logit, one for all tasks or one a task.
        seed: of the model's error; the samples and labels are those of ``holdout``.
        num: samples a task.
        holdout: seed of the samples.
        names: tasks.
        sharpen: factor on the logits; above 1 is overconfident.
        one_class: task whose labels are all 0.
        group_size: samples a group, whose logits share a part; 0 for none.
    """
    parts = []
    for index, name in enumerate(names):
        world, error = np.random.default_rng([holdout, index]), np.random.default_rng([seed, holdout, index])
        logit = 2.0 * world.normal(size=num) - 0.5
        labels = (world.random(num) < 1 / (1 + np.exp(-logit))).astype(float)
        if name == one_class:
            labels[:] = 0.0
        sigma = noise[name] if isinstance(noise, dict) else noise
        wrong = error.normal(size=num)
        if group_size:
            wrong = np.repeat(error.normal(size=-(-num // group_size)), group_size)[:num]
        p = 1 / (1 + np.exp(-sharpen * (logit + sigma * wrong)))
        groups = [f"g{i // group_size}" for i in range(num)] if group_size else None
        parts.append(
            pd.DataFrame(
                {
                    "key": [f"{i:06d}" for i in range(num)],
                    "task": name,
                    "label": labels,
                    "scores": list(np.stack([1 - p, p], axis=1)),
                    "group": groups,
                }
            )
        )
    return pd.concat(parts, ignore_index=True)
