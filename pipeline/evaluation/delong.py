"""AUC, the difference of two AUCs on the same samples, and how sure both are, for single and for clustered samples.

Variances are DeLong's (DeLong, DeLong and Clarke-Pearson 1988, Biometrics 44, equations 3 to 6), computed by sorting as
in Sun and Xu 2014; clusters as in Obuchowski 1997 (Biometrics 53): placements are summed within a cluster before they
are squared. Each class has a variance of its own, and few samples of one know theirs badly: quantiles are Student's t
with Welch and Satterthwaite's degrees of freedom, and below :data:`LEAST` of the rarer class there is no interval.

Axes: N samples, P positives, M negatives, G clusters.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import brentq
from scipy.special import ndtri, owens_t, stdtrit

from pipeline.evaluation.intervals import Interval
from pipeline.evaluation.score_table import Floats, Ints

LEAST = 10
"""Fewest samples of a class, or clusters that hold it, from which an interval is read."""
PRIOR = 10
"""Samples that the binormal variance weighs, a class, against the sample's own."""


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


@dataclass(frozen=True)
class Spread:
    """The variance of an estimate.

    Args:
        variance: squared standard error.
        degrees_of_freedom: of Student's t.
        parts: the classes' own variances, positives first; without what clusters add between them.
    """

    variance: float
    degrees_of_freedom: float
    parts: tuple[float, float]


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


def part_sums(parts: Ints, influence: Floats, num_parts: int = 0) -> Floats:
    """Return what each part of the samples, or each cluster, adds to an AUC: its influences' sum."""
    return np.bincount(parts, influence, minlength=num_parts).astype(np.float64)


def class_units(positive: NDArray[np.bool_], groups: Ints | None = None) -> tuple[int, int]:
    """Return how many samples are positives and negatives; with groups, how many clusters hold some."""
    if groups is None:
        return int(positive.sum()), int((~positive).sum())
    return len(np.unique(groups[positive])), len(np.unique(groups[~positive]))


def spread(influence: Floats, positive: NDArray[np.bool_], groups: Ints | None = None) -> Spread:
    """Return the variance of an AUC or of a difference of AUCs.

    Without groups it is the sum of the classes' own variances (DeLong). With groups the two classes of a cluster vary
    together (Obuchowski); a class's degrees of freedom are those of as many equal clusters as its sizes are worth, the
    number of which is ``(sum m^2)^2 / sum m^4`` for m samples a cluster (Carter, Schnepel and Steigerwald 2017).

    Args:
        influence: (N,) influences, or their differences between two models.
        positive: (N,) which samples are positives.
        groups: (N,) cluster codes from zero.
    """
    variances, freedoms, totals = [], [], []
    for mask in (positive, ~positive):
        if groups is None:
            sums, worth = influence[mask], float(mask.sum())
        else:
            sizes = np.bincount(groups, mask).astype(np.float64)
            sums, worth = part_sums(groups, influence * mask), float((sizes**2).sum() ** 2 / (sizes**4).sum())
        units = int(mask.sum()) if groups is None else int((sizes > 0).sum())
        scaled = sums * math.sqrt(units / max(1, units - 1))
        totals.append(scaled)
        variances.append(float(np.square(scaled).sum()))
        freedoms.append(max(1.0, worth - 1))
    own = sum(variances)
    variance = own if groups is None else float(np.square(totals[0] + totals[1]).sum())
    weighted = sum(part * part / free for part, free in zip(variances, freedoms, strict=True))
    free = own * own / weighted if weighted > 0 else min(freedoms)
    if groups is not None:
        free = min(free, max(1.0, len(totals[0]) - 1.0))
    return Spread(variance, free, (variances[0], variances[1]))


def _binormal_variance(auc: float) -> float:
    """Return the variance of a placement where both classes are normal with one variance.

    The placement of a positive is Phi(Z + d) for a normal Z; its second moment is a bivariate normal probability of
    correlation one half, by Owen's T (Owen 1956): ``auc - 2 T(h, 1 / sqrt(3))``, h the normal quantile of ``auc``.
    """
    few = min(auc, 1 - auc)
    return max(few * (1 - few) - 2 * float(owens_t(ndtri(few), 1 / math.sqrt(3))), 0.0)


def auc_interval(labels: NDArray, scores: NDArray, groups: Ints | None = None, level: float = 0.95) -> Interval | None:
    """Return the interval of an AUC; None below :data:`LEAST` samples of a class, or clusters that hold it.

    All areas whose distance to the estimate is within Student's t of the standard error *at that area*: the standard
    error follows the binormal's, times what the sample's own is of it at the estimate. A score interval, as Wilson's of
    a share, so that a sample which happens to hold no hard case of its few positives is not taken as sure. Without
    groups that factor is drawn towards one as if by :data:`PRIOR` samples a class.

    A perfect order has no estimate of its variance: its interval ends where the chance of such an order among the
    rarer class's samples falls below ``1 - level``, at ``(1 - level) ** (1 / count)``. Where all scores are tied they
    say nothing about the order, and the interval is from 0 to 1.

    Raises:
        ValueError: one class only.
    """
    found = placements(labels, scores)
    counts = class_units(found.positive, groups)
    if min(counts) < LEAST:
        return None
    if found.auc in (0.0, 1.0):
        bound = (1 - level) ** (1 / min(counts))
        return (bound, 1.0) if found.auc == 1.0 else (0.0, 1 - bound)
    own = spread(found.influence, found.positive, groups)
    if own.variance == 0.0:
        return 0.0, 1.0
    factor, free = _factor(found.auc, own, counts if groups is None else None)
    reach = float(stdtrit(free, (1 + level) / 2)) * math.sqrt(factor)

    def beyond(area: float) -> float:
        return abs(found.auc - area) - reach * math.sqrt(_binormal_variance(area))

    edge = min(1e-9, found.auc / 2, (1 - found.auc) / 2)
    low = brentq(beyond, edge, found.auc) if beyond(edge) > 0 else 0.0
    high = brentq(beyond, found.auc, 1 - edge) if beyond(1 - edge) > 0 else 1.0
    return float(low), float(high)


def _factor(auc: float, own: Spread, counts: tuple[int, int] | None) -> tuple[float, float]:
    """Return the variance of an AUC over that of one binormal placement, and its degrees of freedom.

    Args:
        auc: neither 0 nor 1.
        own: its variance.
        counts: samples a class; None with groups, which leave the prior no count to stand on.
    """
    model = _binormal_variance(auc)
    if counts is None:
        return own.variance / model, own.degrees_of_freedom
    parts, weighted = 0.0, 0.0
    for variance, count in zip(own.parts, counts, strict=True):
        part = ((count - 1) * variance * count / model + PRIOR) / (count - 1 + PRIOR) / count
        parts, weighted = parts + part, weighted + part * part / (count - 1 + PRIOR)
    return parts, parts * parts / weighted


@dataclass(frozen=True)
class AucDifference:
    """The difference of two AUCs on the same samples.

    Args:
        first: the one's AUC.
        second: the other's.
        influence: (N,) difference of the two influences.
        spread: its variance.
        counts: positives and negatives, or clusters that hold some.
        errors: how many of the rarer class the two models place wrongly, on average: its count times one less AUC.
    """

    first: float
    second: float
    influence: Floats
    spread: Spread
    counts: tuple[int, int]
    errors: float

    @property
    def difference(self) -> float:
        """First less second."""
        return self.first - self.second

    @property
    def standard_error(self) -> float:
        """Square root of the variance."""
        return math.sqrt(self.spread.variance)


def auc_difference(labels: NDArray, first: NDArray, second: NDArray, groups: Ints | None = None) -> AucDifference:
    """Compare the AUCs of two models on the same samples.

    Raises:
        ValueError: one class only.
    """
    a, b = placements(labels, first), placements(labels, second)
    influence, counts = a.influence - b.influence, class_units(a.positive, groups)
    mean = (a.auc + b.auc) / 2
    errors = min(counts) * min(mean, 1 - mean)
    return AucDifference(a.auc, b.auc, influence, spread(influence, a.positive, groups), counts, errors)
