"""The same metrics on parts of a test set: by label, by length, by day, by any field."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import pandas as pd

from pipeline.contracts import TaskResult, TaskSpec
from pipeline.errors import InputError, did_you_mean
from pipeline.evaluation.frame import by_task
from pipeline.evaluation.intervals import REPLICATES
from pipeline.evaluation.summary import task_result, task_rng

MOST = 30
"""Most slices a field may give; the commonest are kept."""


def slices(
    scores: pd.DataFrame,
    specs: Sequence[TaskSpec],
    by: str,
    *,
    seed: int = 0,
    replicates: int = REPLICATES,
    min_samples: int = 1,
) -> dict[str, dict[str, TaskResult]]:
    """Return every task's metrics on each value of a column.

    Args:
        scores: one row a sample, with the column; join it by ``task`` and ``key`` where the scores lack it.
        specs: the tasks.
        by: column; a number column of more than 10 values is cut into quarters.
        seed: of the bootstrap.
        replicates: of the bootstrap.
        min_samples: smaller slices are left out.

    Returns:
        Task → slice → metrics; a metric that a slice cannot have is None with its reason.

    Raises:
        InputError: there is no such column.
    """
    if by not in scores.columns:
        raise InputError(
            f"a slice must be by a column of the scores, got {by!r}{did_you_mean(by, map(str, scores.columns))}"
        )
    found: dict[str, dict[str, TaskResult]] = {}
    for task, part in scores.groupby("task", sort=False):
        keys = _values(part[by])
        common = keys.value_counts()
        names = sorted(str(name) for name in common[common >= min_samples].index[:MOST])
        found[str(task)] = {
            name: task_result(
                by_task(part[keys == name], specs)[str(task)], task_rng(seed, f"{task}/{name}"), replicates
            )[0]
            for name in names
        }
    return found


def _values(column: pd.Series) -> pd.Series:
    if pd.api.types.is_numeric_dtype(column) and column.nunique() > 10:
        return pd.qcut(column, 4, duplicates="drop").astype(str)
    return column.astype(object).where(column.notna(), "missing").astype(str)


def with_field(scores: pd.DataFrame, name: str, values: Mapping[tuple[str, str], object]) -> pd.DataFrame:
    """Return the scores with one more column, read from ``(task, key) → value``; missing ones stay missing."""
    pairs = zip(scores["task"], scores["key"], strict=True)
    return scores.assign(**{name: [values.get(pair) for pair in pairs]})
