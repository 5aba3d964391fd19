"""How sure the difference of two models is in one task, both having scored the same samples.

AUC by DeLong with Student's t, accuracy by counting the samples on which one alone is right, any other metric by the
bootstrap or, where samples have groups, by leaving groups out. Where all samples agree there is no variance to estimate
from: how many they are says how sure they can be. Two models whose scores are identical are one, and differ in nothing.

Axes: N samples, R replicates, K parts.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.random import Generator
from scipy.special import stdtr, stdtrit

from pipeline.contracts import Difference
from pipeline.evaluation.auc_bootstrap import paired_auc_bootstrap
from pipeline.evaluation.delong import LEAST, auc_difference, auc_interval, class_units, part_sums
from pipeline.evaluation.intervals import Interval, bca_interval, bootstrap_weights, left_out_weights, part_effects
from pipeline.evaluation.metrics import reason, statistics
from pipeline.evaluation.ranking import Statistic
from pipeline.evaluation.score_table import PARTS, Floats, Ints, TaskScores

ALPHA = 0.05
"""Level of the intervals."""
MANY = 100
"""Samples of the rarer class from which two nearly perfect orders are told apart by their own intervals."""
_OF_CLASSES = ("auc", "f1", "matthews", "macro_f1")
"""Metrics of a binary task that the rarer class decides."""
_UNANIMOUS_FREEDOM = 8.0
"""Degrees of freedom with which t's quantiles bound the tail of :func:`unanimous` from above at any level."""


@dataclass(frozen=True)
class Paired:
    """One task's difference.

    Args:
        difference: with its interval, or the reason why it has none.
        parts: (K,) what each part of the groups adds to it, squares summing to the variance; None without groups.
    """

    difference: Difference
    parts: Floats | None = None


def rarer_class(sample: TaskScores) -> int | None:
    """Return how many samples of a binary task's rarer class there are, or groups that hold some; None for others."""
    return min(class_units(sample.labels > 0, sample.groups)) if sample.spec.kind == "binary" else None


def paired_difference(
    ours: TaskScores,
    theirs: TaskScores,
    metric: str,
    rng: Generator,
    *,
    parts: Ints | None = None,
    replicates: int = 1000,
    auc_method: str = "delong",
) -> Paired:
    """Return the difference of two models' metric with its interval and p-value.

    Args:
        ours: the one's scores.
        theirs: the other's, of the same samples.
        metric: which.
        rng: of the bootstrap.
        parts: (N,) the part, below :data:`PARTS`, that a sample's group belongs to, the same in all tasks.
        replicates: of the bootstrap.
        auc_method: ``delong``, or ``bootstrap``.
    """
    if metric == "auc" and min(class_units(ours.labels == 1)) > 0:
        return _auc(ours, theirs, rng, parts, replicates if auc_method == "bootstrap" else None)
    f, g = statistics(ours)[metric], statistics(theirs)[metric]
    ones = np.ones((1, len(ours)))
    a, b = float(f(ones)[0]), float(g(ones)[0])
    if math.isnan(a) or math.isnan(b):
        return _undefined(a, b, reason(ours if math.isnan(a) else theirs, metric))
    if (why := too_few(ours, metric)) is not None:
        return _undefined(a, b, why)
    if _is_same(ours, theirs):
        return _found(a, b, (0.0, 0.0), 0.0, 1.0)
    if ours.groups is not None and parts is not None:
        return _left_out(f, g, (a, b), parts, int(ours.groups.max()) + 1)
    if metric in ("accuracy", "exact_match", "subset_accuracy"):
        return _shares(ours, theirs, (a, b))
    values = np.concatenate([f(w) - g(w) for w in bootstrap_weights(len(ours), rng, replicates)])
    left_out = np.concatenate([f(w) - g(w) for w in left_out_weights(len(ours))])
    found = bca_interval(values, a - b, left_out, len(ours))
    if found is None:
        return _undefined(a, b, f"{metric} is undefined in most resamples of these {len(ours)} samples")
    error = float(np.nanstd(values))
    if error == 0.0:
        return unanimous(a, b, len(ours))
    return _found(a, b, found, error, _t(a - b, error, len(ours) - 1.0)[1], len(ours) - 1.0)


def unanimous(a: float, b: float, units: int) -> Paired:
    """Return the difference of two metrics where all samples, or groups, say the same.

    The share of them that would say otherwise is below ``1 - (alpha / 2) ** (1 / units)``, each of which may be as far
    off as 1 or -1. For a difference of one this is the sign test.
    """
    d = a - b
    other = 1 - (ALPHA / 2) ** (1 / units)
    low, high = d - other * (1 + d), d + other * (1 - d)
    p = min(1.0, 2 * (1 + abs(d)) ** -units) if d else 1.0
    error = max(d - low, high - d) / float(stdtrit(_UNANIMOUS_FREEDOM, 1 - ALPHA / 2))
    return _found(a, b, (low, high), error, p, _UNANIMOUS_FREEDOM)


def too_few(sample: TaskScores, metric: str) -> str | None:
    """Say what is too little for an interval, None where enough is there."""
    few = rarer_class(sample)
    unit = "samples" if sample.groups is None else "groups with samples"
    if metric in _OF_CLASSES and few is not None and few < LEAST:
        return f"an interval needs at least {LEAST} {unit} of each class, got {few} of the rarer one"
    groups = LEAST if sample.groups is None else int(sample.groups.max()) + 1
    if groups < LEAST:
        return f"an interval needs at least {LEAST} groups, got {groups}"
    return None


def _is_same(ours: TaskScores, theirs: TaskScores) -> bool:
    if ours.texts is not None and theirs.texts is not None:
        return np.array_equal(ours.texts, theirs.texts)
    return np.array_equal(ours.probabilities, theirs.probabilities)


def _auc(ours: TaskScores, theirs: TaskScores, rng: Generator, parts: Ints | None, replicates: int | None) -> Paired:
    """Compare two AUCs; by the bootstrap where replicates are given and samples have no groups."""
    compared = auc_difference(ours.labels, ours.score, theirs.score, ours.groups)
    values, few = (compared.first, compared.second), min(compared.counts)
    if (why := too_few(ours, "auc")) is not None:
        return _undefined(*values, why)
    if _is_same(ours, theirs):
        return _found(*values, (0.0, 0.0), 0.0, 1.0)
    if compared.standard_error == 0.0:
        return unanimous(*values, few)
    if compared.errors < 1 and few < MANY:
        return _undefined(
            *values,
            f"both models order these samples nearly perfectly: of the {few} of the rarer class {compared.errors:.2g} "
            f"stand wrong, an interval needs 1, or {MANY} of the class; score more samples",
        )
    if replicates is not None and ours.groups is None:
        draws = paired_auc_bootstrap(ours.labels, ours.score, theirs.score, rng, replicates)
        low, high = np.quantile(draws, [ALPHA / 2, 1 - ALPHA / 2]).tolist()
        return _found(
            *values, (low, high), float(draws.std()), _t(compared.difference, float(draws.std()), math.inf)[1]
        )
    totals = None if parts is None else part_sums(parts, compared.influence, PARTS)
    error, free = compared.standard_error, compared.spread.degrees_of_freedom
    if compared.errors < 1:
        return _nearly_perfect(ours, theirs, values, free, totals)
    interval, p = _t(compared.difference, error, free)
    return _found(*values, interval, error, p, free, totals)


def _nearly_perfect(
    ours: TaskScores, theirs: TaskScores, values: tuple[float, float], free: float, totals: Floats | None
) -> Paired:
    """Let two AUCs be as far apart as their own intervals allow: the few errors may be so few by chance."""
    first, second = (auc_interval(s.labels, s.score, s.groups) for s in (ours, theirs))
    if first is None or second is None:
        raise ValueError(f"an AUC of {MANY} samples of each class must have an interval, got {first} and {second}")
    low, high = first[0] - second[1], first[1] - second[0]
    d = values[0] - values[1]
    error = max(d - low, high - d) / float(stdtrit(free, 1 - ALPHA / 2))
    return _found(*values, (low, high), error, _t(d, error, free)[1], free, totals)


def _shares(ours: TaskScores, theirs: TaskScores, values: tuple[float, float]) -> Paired:
    """Compare two shares of right answers: one sample more is counted for either model (Bonett and Price 2012).

    Their adjusted Wald interval for paired shares keeps its level also where few samples tell the models apart.
    """
    right, other = ours.right, theirs.right
    wins, losses, num = int((right & ~other).sum()), int((other & ~right).sum()), len(ours) + 2
    if len(ours) in (wins, losses):
        return unanimous(*values, len(ours))
    gained, lost = (wins + 1) / num, (losses + 1) / num
    shift, error = gained - lost, math.sqrt((gained + lost - (gained - lost) ** 2) / num)
    (low, high), p = _t(shift, error, math.inf)
    d = values[0] - values[1]
    return _found(*values, (min(low, d), max(high, d)), error, p)


def _left_out(f: Statistic, g: Statistic, values: tuple[float, float], parts: Ints, groups: int) -> Paired:
    totals = part_effects(lambda w: f(w) - g(w), parts)
    if totals is None:
        return _undefined(*values, "the metric is undefined where one group is left out; score more groups")
    error, free = math.sqrt(float(np.square(totals).sum())), len(np.unique(parts)) - 1.0
    if error == 0.0:
        return unanimous(*values, groups)
    interval, p = _t(values[0] - values[1], error, free)
    return _found(*values, interval, error, p, free, totals)


def _t(d: float, error: float, free: float) -> tuple[Interval, float]:
    """Return Student's t interval of a difference and its two-sided p-value."""
    half = float(stdtrit(free, 1 - ALPHA / 2)) * error
    return (d - half, d + half), float(2 * stdtr(free, -abs(d) / error))


def student_difference(a: float, b: float, error: float, free: float) -> Difference:
    """Return the difference ``a - b`` with Student's t interval; one without an error is exact.

    Args:
        a: the one's metric.
        b: the other's.
        error: standard error of the difference.
        free: degrees of freedom; infinite for the normal distribution.
    """
    interval, p = _t(a - b, error, free) if error > 0 else ((a - b, a - b), 1.0)
    return _found(a, b, interval, error, p, free).difference


def _found(
    a: float,
    b: float,
    interval: Interval,
    error: float,
    p: float,
    free: float = math.inf,
    totals: Floats | None = None,
) -> Paired:
    if totals is not None and (own := float(np.square(totals).sum())) > 0:
        totals = totals * (error / math.sqrt(own))
    difference = Difference(
        candidate=a,
        reference=b,
        difference=a - b,
        ci95=interval,
        standard_error=error,
        p_value=p,
        degrees_of_freedom=None if math.isinf(free) else free,
    )
    return Paired(difference, totals)


def _undefined(a: float, b: float, why: str) -> Paired:
    known = [None if math.isnan(x) else x for x in (a, b)]
    d = a - b
    return Paired(
        Difference(
            candidate=known[0],
            reference=known[1],
            difference=None if math.isnan(d) else d,
            ci95=None,
            standard_error=None,
            p_value=None,
            reason=why,
        )
    )
