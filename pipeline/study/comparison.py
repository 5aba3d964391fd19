"""What arms show together: means over tasks and seeds, and paired differences with what chance allows.

A replicate draws each task's samples anew, the same ones for all arms and seeds, and the seeds, the same ones for two
arms that are compared; so a difference is paired in both. Axes: A arms, S seeds, T tasks, R replicates.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from pipeline.evaluation.intervals import Interval, bootstrap_weights
from pipeline.evaluation.metrics import statistics
from pipeline.evaluation.score_table import Floats, TaskScores
from pipeline.evaluation.summary import metric_of

REPLICATES = 1000


@dataclass(frozen=True)
class Replicates:
    """One arm's metrics.

    Args:
        values: (S, T) as measured.
        drawn: (S, T, R) on drawn samples.
    """

    values: Floats
    drawn: Floats


def replicates(runs: Sequence[Mapping[str, TaskScores]], count: int = REPLICATES) -> Replicates:
    """Return an arm's metrics on its samples and on drawn ones.

    Args:
        runs: the scores by task of each seed's run.
        count: R.
    """
    values, drawn = [], []
    for scores in runs:
        row, more = [], []
        for task, sample in scores.items():
            statistic = statistics(sample)[metric_of(sample.spec)]
            # Equal generators give equal draws: the same samples for every arm and seed.
            rng = np.random.default_rng(zlib.crc32(task.encode()))
            blocks = bootstrap_weights(len(sample), rng, count, groups=sample.groups)
            row.append(float(statistic(np.ones((1, len(sample))))[0]))
            more.append(np.concatenate([statistic(weights) for weights in blocks]))
        values.append(row)
        drawn.append(more)
    return Replicates(np.array(values), np.array(drawn))


@dataclass(frozen=True)
class PairedMean:
    """The difference of two arms' means over tasks.

    Args:
        value: as measured, over all seeds.
        ci95: over drawn samples and seeds, the tasks being these.
        ci95_tasks: over drawn tasks too.
        p: two-sided, of the first.
        p_holm: the same, corrected for all claims of the table (Holm 1979).
        by_task: of each task.
        by_task_ci95: of each task.
    """

    value: float
    ci95: Interval
    ci95_tasks: Interval
    p: float
    p_holm: float
    by_task: tuple[float, ...]
    by_task_ci95: tuple[Interval, ...]


def paired_mean(ours: Replicates, theirs: Replicates, seed: int = 0) -> PairedMean:
    """Return the difference of two arms with its intervals; ``p_holm`` is ``p`` until :func:`with_holm`."""
    difference_STR = ours.drawn - theirs.drawn
    num_seeds, num_tasks, count = difference_STR.shape
    rng = np.random.default_rng(seed)
    seeds_RS = rng.integers(0, num_seeds, (count, num_seeds))
    tasks_RT = rng.integers(0, num_tasks, (count, num_tasks))
    places = np.arange(count)
    # Of replicate r the differences of its drawn seeds: (R, S, T), then the mean over them (R, T).
    by_task_RT = difference_STR[seeds_RS, :, places[:, None]].mean(axis=1)
    means_R = np.nanmean(by_task_RT, axis=1)
    over_tasks_R = np.nanmean(np.take_along_axis(by_task_RT, tasks_RT, axis=1), axis=1)
    each = (ours.values - theirs.values).mean(axis=0)
    return PairedMean(
        value=float(each.mean()),
        ci95=_interval(means_R),
        ci95_tasks=_interval(over_tasks_R),
        p=(p := _two_sided(means_R)),
        p_holm=p,
        by_task=tuple(each.tolist()),
        by_task_ci95=tuple(_interval(column) for column in by_task_RT.T),
    )


def holm(p_values: Sequence[float]) -> list[float]:
    """Return p-values corrected for their number, step by step (Holm 1979, Scandinavian Journal of Statistics 6)."""
    order = np.argsort(p_values)
    corrected, largest = [0.0] * len(p_values), 0.0
    for rank, place in enumerate(order):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[place]))
        corrected[place] = largest
    return corrected


def _interval(values: Floats) -> Interval:
    low, high = np.nanquantile(values, [0.025, 0.975]).tolist()
    return low, high


def _two_sided(values: Floats) -> float:
    count = len(values) + 1
    return min(1.0, 2 * min(int((values <= 0).sum()) + 1, int((values >= 0).sum()) + 1) / count)
