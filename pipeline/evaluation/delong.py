"""DeLong's variance of AUC, of the difference of two AUCs on the same samples, and both for clustered samples.

DeLong, DeLong and Clarke-Pearson 1988 (Biometrics 44, equations 3 to 6), computed by sorting as in Sun and Xu 2014;
clusters as in Obuchowski 1997 (Biometrics 53): placements are summed within a cluster before they are squared.

Axes: N samples, P positives, M negatives, G clusters.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.special import expit, stdtrit

from pipeline.evaluation.frame import Floats, Ints
from pipeline.evaluation.intervals import Interval


@dataclass(frozen=True)
class Placements:
    """An AUC with each sample's part in it.

    Args:
        auc: the area.
        influence: (N,) placement of each sample less the AUC, over its class's count: the first-order effect on AUC
            of that sample's weight; sums to zero within each class.
        positive: (N,) which samples are positives.
    """

    auc: float
    influence: Floats
    positive: NDArray[np.bool_]


def placements(labels: NDArray, scores: NDArray) -> Placements:
    """Return each sample's placement: the share of the other class that it is on the right side of, ties one half.

    Raises:
        ValueError: one class only; AUC is undefined.
    """
    positive = np.asarray(labels) == 1
    high, low = np.asarray(scores)[positive], np.asarray(scores)[~positive]
    if not len(high) or not len(low):
        raise ValueError(f"AUC needs both classes, got {len(high)} positives and {len(low)} negatives")
    above = _share_below(high, low)
    beneath = 1.0 - _share_below(low, high)
    area = float(above.mean())
    influence = np.empty(len(positive))
    influence[positive] = (above - area) / len(high)
    influence[~positive] = (beneath - area) / len(low)
    return Placements(area, influence, positive)


def _share_below(values: Floats, others: Floats) -> Floats:
    ordered = np.sort(others)
    needles = np.argsort(values)  # in order, so that the search walks front to back
    twice = np.searchsorted(ordered, values[needles], "left") + np.searchsorted(ordered, values[needles], "right")
    shares = np.empty(len(values))
    shares[needles] = twice / (2 * len(ordered))
    return shares


def variance(influence: Floats, positive: NDArray[np.bool_], groups: Ints | None = None) -> tuple[float, float]:
    """Return the variance of an AUC, or of a difference of AUCs, and its degrees of freedom.

    Without groups: the sum of the classes' own variances (DeLong), with Welch and Satterthwaite's degrees of freedom.
    With groups: the sum of squared cluster totals (Obuchowski), corrected for the number of clusters.

    Args:
        influence: (N,) influences, or their differences between two models.
        positive: (N,) which samples are positives.
        groups: (N,) cluster codes from zero.
    """
    if groups is not None:
        totals = np.bincount(groups, influence)
        free = max(1, len(totals) - 1)
        return float(np.square(totals).sum() * len(totals) / free), float(free)
    parts, weighted = 0.0, 0.0
    for mask in (positive, ~positive):
        count = int(mask.sum())
        part = float(np.square(influence[mask]).sum()) * count / max(1, count - 1)
        parts, weighted = parts + part, weighted + part * part / max(1, count - 1)
    return parts, parts * parts / weighted if weighted > 0 else 1.0


def auc_interval(labels: NDArray, scores: NDArray, groups: Ints | None = None, level: float = 0.95) -> Interval:
    """Return the interval of an AUC: Student's t on the logit scale, which keeps it within 0 and 1.

    A perfect order has no estimate of its variance: its interval ends where the chance of such an order among the
    smaller class's samples falls below ``1 - level``, at ``(1 - level) ** (1 / count)``. Where all scores are tied they
    say nothing about the order, and the interval is from 0 to 1.

    Raises:
        ValueError: one class only.
    """
    found = placements(labels, scores)
    squared, free = variance(found.influence, found.positive, groups)
    few = int(min(found.positive.sum(), (~found.positive).sum()))
    if groups is not None:
        few = min(few, len(np.unique(groups)))
    if squared == 0.0 and found.auc not in (0.0, 1.0):
        return 0.0, 1.0
    if found.auc in (0.0, 1.0):
        edge = (1 - level) ** (1 / few)
        return (edge, 1.0) if found.auc >= 0.5 else (0.0, 1 - edge)
    logit = math.log(found.auc / (1 - found.auc))
    half = float(stdtrit(free, (1 + level) / 2)) * math.sqrt(squared) / (found.auc * (1 - found.auc))
    return float(expit(logit - half)), float(expit(logit + half))


def auc_difference(labels: NDArray, first: NDArray, second: NDArray, groups: Ints | None = None) -> tuple[float, float]:
    """Return ``AUC(first) - AUC(second)`` on the same samples and its standard error.

    Raises:
        ValueError: one class only.
    """
    a, b = placements(labels, first), placements(labels, second)
    return a.auc - b.auc, math.sqrt(variance(a.influence - b.influence, a.positive, groups)[0])
