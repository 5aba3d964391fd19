"""Do 95 % intervals cover in 95 % of test sets?"""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from scipy.special import expit, ndtr, stdtrit

from pipeline.contracts import TaskSpec
from pipeline.evaluation.delong import auc_difference, auc_interval
from pipeline.evaluation.intervals import bca_interval, left_out_weights, plain_value, replicate, share_interval
from pipeline.evaluation.metrics import statistics
from pipeline.evaluation.score_table import TaskScores
from pipeline.evaluation.summary import SHARES
from tests.benchmarks.timing import hardware, row, side_by_side, versions

SIMULATIONS, BOOTSTRAPPED = 5000, 1500
SETTINGS = ((100, 0.3, 1.2), (200, 0.1, 1.0), (400, 0.5, 2.0), (1000, 0.1, 0.6), (2000, 0.2, 1.0))
"""Samples, positive rate, distance of the classes in standard deviations."""
SPEC = TaskSpec(name="t", template="{x}", label_words=(" no", " yes"))
Draw = Callable[[np.random.Generator], tuple[np.ndarray, np.ndarray]]


def _binormal(rng: np.random.Generator, num: int, rate: float, apart: float) -> tuple[np.ndarray, np.ndarray]:
    """Return labels and calibrated P(class 1); at least two samples of each class."""
    labels = (rng.random(num) < rate).astype(float)
    labels[:2], labels[2:4] = 1.0, 0.0
    rng.shuffle(labels)
    x = rng.normal(size=num) + apart * labels
    return labels, expit(apart * x - apart * apart / 2 + math.log(rate / (1 - rate)))


def _within(value: float, count: int) -> tuple[bool, dict[str, float]]:
    """Whether a coverage lies in 94 to 96 %, and how sure it is."""
    return 0.94 <= value <= 0.96, {"standard_error": round(math.sqrt(value * (1 - value) / count), 4)}


def _row(measure: str, hits: list[bool]) -> dict[str, Any]:
    value = float(np.mean(hits))
    is_met, details = _within(value, len(hits))
    return row(measure, "0.94 to 0.96", value, is_met, simulations=len(hits), **details)


def auc_coverage(num: int, rate: float, apart: float) -> dict[str, Any]:
    """Cover the binormal AUC, which is known exactly."""
    rng, truth, hits = np.random.default_rng(1), float(ndtr(apart / math.sqrt(2))), []
    for _ in range(SIMULATIONS):
        if (interval := auc_interval(*_binormal(rng, num, rate, apart))) is not None:
            hits.append(interval[0] <= truth <= interval[1])
    return _row(f"coverage of AUC {truth:.3f}, {num} samples, rate {rate}", hits)


def difference_coverage(num: int, rate: float, apart: float) -> dict[str, Any]:
    """Cover the difference of two correlated binormal AUCs."""
    rng, hits, noise = np.random.default_rng(2), [], 0.7
    truth = float(ndtr(apart / math.sqrt(2)) - ndtr(apart / math.sqrt(2 * (1 + noise**2))))
    for _ in range(SIMULATIONS):
        labels = (rng.random(num) < rate).astype(float)
        labels[:2], labels[2:4] = 1.0, 0.0
        x = rng.normal(size=num) + apart * labels
        found = auc_difference(labels, x, x + noise * rng.normal(size=num))
        reach = stdtrit(found.spread.degrees_of_freedom, 0.975) * found.standard_error
        hits.append(abs(found.difference - truth) <= reach)
    return _row(f"coverage of a paired AUC difference {truth:.3f}, {num} samples, rate {rate}", hits)


def clustered_coverage(groups: int, size: int) -> dict[str, Any]:
    """Cover the AUC where the samples of a group share half of their score's variance and of their label's cause."""
    rng, hits = np.random.default_rng(3), []

    def draw(count: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        codes = np.repeat(np.arange(count), size)
        cause = rng.normal(size=count)[codes] + rng.normal(size=count * size)
        labels = (cause > 0.8).astype(float)
        return labels, cause + rng.normal(size=count)[codes] + rng.normal(size=count * size), codes

    from pipeline.evaluation.ranking import auc

    labels, scores, _ = draw(400_000)
    truth = auc(labels, scores)
    for _ in range(SIMULATIONS // 2):
        if (interval := auc_interval(*draw(groups))) is not None:
            hits.append(interval[0] <= truth <= interval[1])
    return _row(f"coverage of AUC {truth:.3f}, {groups} groups of {size}", hits)


def bootstrap_coverage(num: int, rate: float, apart: float) -> list[dict[str, Any]]:
    """Cover accuracy, log loss and calibration ratio by the intervals that the report shows."""
    rng = np.random.default_rng(4)
    labels, p = _binormal(rng, 4_000_000, rate, apart)
    right = (p > 0.5) == (labels == 1)
    loss = -np.log(np.where(labels == 1, p, 1 - p))
    truth = {"accuracy": float(right.mean()), "logloss": float(loss.mean()), "calibration_ratio": 1.0}
    hits: dict[str, list[bool]] = {name: [] for name in truth}
    for _ in range(BOOTSTRAPPED):
        labels, p = _binormal(rng, num, rate, apart)
        sample = TaskScores(SPEC, np.arange(num).astype(object), labels, np.stack([1 - p, p], axis=1))
        known = {name: s for name, s in statistics(sample).items() if name in truth}
        draws = replicate(sample, known, rng)
        blocks = list(left_out_weights(num))
        for name, statistic in known.items():
            value = plain_value(statistic, num)
            if name in SHARES:
                interval: tuple[float, float] | None = share_interval(value, num)
            else:
                jackknife = np.concatenate([statistic(weights) for weights in blocks])
                interval = bca_interval(draws[name], value, jackknife, num)
            hits[name].append(interval is not None and interval[0] <= truth[name] <= interval[1])
    return [_row(f"coverage of {name} {truth[name]:.3f}, {num} samples, rate {rate}", h) for name, h in hits.items()]


def run() -> dict[str, Any]:
    """Simulate coverage."""
    parts: list[tuple[Any, ...]] = [(bootstrap_coverage, *SETTINGS[i]) for i in (4, 2, 0)]
    parts += [(clustered_coverage, 60, 8), (clustered_coverage, 200, 5)]
    parts += [(f, *setting) for f in (difference_coverage, auc_coverage) for setting in SETTINGS]
    return {
        "question": __doc__,
        "command": "python -m tests.benchmarks evaluation_trust",
        "hardware": hardware(),
        "versions": versions("numpy", "scipy", "pandas"),
        "protocol": "fixed seeds; the truth of AUC is the binormal formula, of the others a sample of 4 million",
        "rows": side_by_side(parts),
        "not_measured": "intervals of ECE, F1 and Matthews: with few predicted positives no bootstrap covers them",
    }
