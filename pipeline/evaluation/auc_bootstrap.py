"""The bootstrap of an AUC difference at its least cost: integers only, one sort a model, no weights kept.

Axes: P positives, M negatives.
"""

from __future__ import annotations

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray

from pipeline.evaluation.score_table import Floats, Ints


def paired_auc_bootstrap(
    labels: NDArray, first: NDArray, second: NDArray, rng: Generator, replicates: int = 1000
) -> Floats:
    """Return replicates of ``AUC(first) - AUC(second)``, both models on the same resamples, stratified by class.

    A replicate draws P positives and M negatives and counts them. Each model then costs one running sum over its own
    order of the negatives and one look-up a positive: the sum over positives of count times negatives below, ties
    one half. All sums are exact integers.

    Raises:
        ValueError: one class only.
    """
    positive = np.asarray(labels) == 1
    p_rows, m_rows = np.flatnonzero(positive), np.flatnonzero(~positive)
    if not len(p_rows) or not len(m_rows):
        raise ValueError(f"AUC needs both classes, got {len(p_rows)} positives and {len(m_rows)} negatives")
    # Rows in the first model's order: its look-ups then walk memory front to back.
    p_rows, m_rows = (rows[np.argsort(first[rows])] for rows in (p_rows, m_rows))
    models = [_Order(np.asarray(scores)[p_rows], np.asarray(scores)[m_rows]) for scores in (first, second)]
    num_p, num_m = len(p_rows), len(m_rows)
    running = np.zeros(num_m + 1, np.int64)
    differences = np.empty(replicates)
    for r in range(replicates):
        count_p = np.bincount(rng.integers(0, num_p, num_p), minlength=num_p)
        count_m = np.bincount(rng.integers(0, num_m, num_m), minlength=num_m)
        above = [model.twice_wins(count_p, count_m, running) for model in models]
        differences[r] = (above[0] - above[1]) / (2 * num_p * num_m)
    return differences


class _Order:
    """One model's order of the samples: where each positive stands among the negatives."""

    def __init__(self, high: Floats, low: Floats) -> None:
        order = np.argsort(low, kind="stable")
        self._order = None if (order[1:] > order[:-1]).all() else order
        self._below: Ints = np.searchsorted(low[order], high, "left")
        self._not_above: Ints = np.searchsorted(low[order], high, "right")
        self._tied = bool((self._below != self._not_above).any())

    def twice_wins(self, count_p: Ints, count_m: Ints, running: Ints) -> int:
        """Return twice the won pairs of a resample; ``running`` is scratch of M + 1 integers, its first zero."""
        np.cumsum(count_m if self._order is None else count_m[self._order], out=running[1:])
        wins = int(count_p @ running[self._below])
        return wins + (int(count_p @ running[self._not_above]) if self._tied else wins)
