"""Metrics of order: AUC, average precision, rank correlation, grouped AUC, and DeLong's variance of AUC.

A statistic is a function of sample weights: ``(R, N)`` weights, one row a replicate, to ``(R,)`` values, NaN where
undefined. All ones give the plain value, resampling counts a bootstrap, so each formula is written once.

Axes: R replicates, N samples, P positives, M negatives.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from pipeline.evaluation.score_table import Floats, Ints

Statistic = Callable[[Floats], Floats]


_ROUNDING = 1e-12
"""Differences of this share of the values come from the order of a sum."""


def ratio(numerator: Floats, denominator: Floats) -> Floats:
    """Divide element by element; NaN, silently, where the denominator is zero."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(denominator == 0, np.nan, numerator / denominator)


def auc(labels: NDArray, scores: NDArray, weights: Floats | None = None) -> float:
    """Return the area under the ROC curve: P(a positive scores above a negative), ties counting one half.

    Without weights the sums are of integers, so the value is exact to the last division. NaN with one class only.
    """
    positive = np.asarray(labels) == 1
    scores = np.asarray(scores)
    if weights is not None:
        return float(auc_statistic(positive, scores)(np.asarray(weights, np.float64)[None])[0])
    high, low = np.sort(scores[positive]), np.sort(scores[~positive])
    if not len(high) or not len(low):
        return float("nan")
    # Search the few in the many: needles in order walk the haystack front to back, which the cache likes.
    few, many = (high, low) if len(high) <= len(low) else (low, high)
    twice = int(np.searchsorted(many, few, "left").sum()) + int(np.searchsorted(many, few, "right").sum())
    total = 2 * len(high) * len(low)
    return (twice if few is high else total - twice) / total


def auc_statistic(positive: NDArray[np.bool_], scores: NDArray) -> Statistic:
    """Return AUC as a function of weights.

    Both classes are sorted once. A replicate then costs one running sum over the negatives and one look-up for each
    positive: numerator = sum over positives of w (W(below) + W(not above)) / 2.
    """
    p_rows, m_rows = _sorted_rows(positive, scores), _sorted_rows(~positive, scores)
    high, low = scores[p_rows], scores[m_rows]
    below, not_above = np.searchsorted(low, high, "left"), np.searchsorted(low, high, "right")
    tied = bool((below != not_above).any())

    def statistic(weights: Floats) -> Floats:
        w_p, w_m = weights[:, p_rows], weights[:, m_rows]
        running = np.zeros((len(weights), len(m_rows) + 1))
        np.cumsum(w_m, axis=1, out=running[:, 1:])
        under = running[:, below]
        if tied:
            under = (under + running[:, not_above]) / 2
        return ratio(np.einsum("rp,rp->r", w_p, under), w_p.sum(axis=1) * running[:, -1])

    return statistic


def _sorted_rows(mask: NDArray[np.bool_], scores: NDArray) -> Ints:
    rows = np.flatnonzero(mask)
    return rows[np.argsort(scores[rows])]


def average_precision_statistic(positive: NDArray[np.bool_], scores: NDArray) -> Statistic:
    """Return average precision (PR-AUC), the sum of precision times the step in recall over distinct scores."""
    order = np.argsort(-scores, kind="stable")
    ends = _run_ends(scores[order])
    hits = positive[order].astype(np.float64)

    def statistic(weights: Floats) -> Floats:
        ordered = weights[:, order]
        found = np.cumsum(ordered * hits, axis=1)[:, ends]
        named = np.cumsum(ordered, axis=1)[:, ends]
        steps = np.diff(found, axis=1, prepend=0.0)
        # A replicate may lose the highest scores altogether: no step there, so no precision is asked for.
        precision = np.divide(found, named, out=np.zeros_like(found), where=named > 0)
        return ratio((steps * precision).sum(axis=1), found[:, -1])

    return statistic


def _run_ends(ordered: NDArray) -> Ints:
    return np.append(np.flatnonzero(ordered[1:] != ordered[:-1]), len(ordered) - 1)


def pearson_statistic(x: Floats, y: Floats) -> Statistic:
    """Return Pearson's correlation as a function of weights; NaN where a side is constant."""
    # Centred first: raw moments would lose the digits that the mean holds.
    moments = _moments(_centred(x), _centred(y)) if len(x) else np.zeros((0, 6))

    def statistic(weights: Floats) -> Floats:
        return _correlation(weights @ moments)

    return statistic


def is_constant(values: Floats) -> bool:
    """Whether values are equal up to rounding: what is left of their differences then is noise."""
    return bool(np.ptp(values) <= _ROUNDING * np.abs(values).max())


def _centred(values: Floats) -> Floats:
    return np.zeros(len(values)) if is_constant(values) else values - values.mean()


def _moments(x: Floats, y: Floats) -> Floats:
    return np.stack([np.ones_like(x), x, y, x * x, y * y, x * y], axis=1)


def _correlation(sums: Floats) -> Floats:
    n, x, y, xx, yy, xy = sums.T
    x, y = ratio(x, n), ratio(y, n)
    var_x, var_y, cov = ratio(xx, n) - x * x, ratio(yy, n) - y * y, ratio(xy, n) - x * y
    # Constant up to rounding is constant.
    flat = (var_x <= 1e-14 * ratio(xx, n)) | (var_y <= 1e-14 * ratio(yy, n))
    value = ratio(cov, np.sqrt(np.maximum(var_x, 0) * np.maximum(var_y, 0)))
    return np.where(flat, np.nan, np.clip(value, -1.0, 1.0))


def spearman_statistic(x: Floats, y: Floats) -> Statistic:
    """Return Spearman's rank correlation: Pearson's of mid-ranks, ranked anew in each replicate."""
    rank_x, rank_y = _midranks(x), _midranks(y)

    def statistic(weights: Floats) -> Floats:
        a, b = rank_x(weights), rank_y(weights)
        n = weights.sum(axis=1, keepdims=True)
        a, b = a - (n + 1) / 2, b - (n + 1) / 2  # the mean mid-rank is (n + 1) / 2 whatever the ties
        cov = (weights * a * b).sum(axis=1)
        return ratio(cov, np.sqrt((weights * a * a).sum(axis=1) * (weights * b * b).sum(axis=1)))

    return statistic


def _midranks(values: Floats) -> Statistic:
    order = np.argsort(values, kind="stable")
    ends = _run_ends(values[order]) if len(values) else np.zeros(0, np.int64)
    run = np.empty(len(values), np.int64)
    run[order] = np.repeat(np.arange(len(ends)), np.diff(ends, prepend=-1))

    def ranks(weights: Floats) -> Floats:
        through = np.cumsum(weights[:, order], axis=1)[:, ends]
        before = np.concatenate([np.zeros((len(weights), 1)), through[:, :-1]], axis=1)
        return ((before + through + 1) / 2)[:, run]

    return ranks


def grouped_auc_statistic(positive: NDArray[np.bool_], scores: NDArray, groups: Ints) -> Statistic:
    """Return the mean of the groups' AUCs, each weighing its number of samples (Zhou et al. 2018, GAUC).

    Groups of one class have no AUC and are left out. Weights must be equal within a group (whole groups are drawn).
    """
    order = np.lexsort((scores, groups))
    ordered, hits = scores[order], positive[order]
    starts = np.flatnonzero(np.diff(groups[order], prepend=-1))
    sizes = np.diff(np.append(starts, len(order)))
    value = np.full(len(order), np.nan)
    for start, size in zip(starts.tolist(), sizes.tolist(), strict=True):
        rows = slice(start, start + size)
        if 0 < hits[rows].sum() < size:
            value[order[rows]] = auc(hits[rows], ordered[rows])
    features = np.stack([np.nan_to_num(value), (~np.isnan(value)).astype(np.float64)], axis=1)

    def statistic(weights: Floats) -> Floats:
        total, counted = (weights @ features).T
        return ratio(total, counted)

    return statistic
