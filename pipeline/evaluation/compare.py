"""Two models on the same samples: paired differences with intervals, and what they show.

Differences of AUC are DeLong's, those of any other metric a paired bootstrap; both by cluster where samples have
groups. A task's verdict rests on its p-value adjusted over all tasks.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
import pandas as pd
from scipy.special import ndtr, ndtri

from pipeline.contracts import Comparison, Difference, TaskDifference, TaskSpec
from pipeline.errors import InputError
from pipeline.evaluation.auc_bootstrap import paired_auc_bootstrap
from pipeline.evaluation.delong import auc_difference
from pipeline.evaluation.frame import TaskScores, by_task, keys_sha256
from pipeline.evaluation.intervals import REPLICATES, Interval, bca_interval, bootstrap_weights, left_out_weights
from pipeline.evaluation.metrics import reason, statistics
from pipeline.evaluation.summary import metric_of, task_rng

ALPHA = 0.05
"""Level of the verdicts, over all tasks together."""


def compare(
    candidate: pd.DataFrame,
    reference: pd.DataFrame,
    specs: Sequence[TaskSpec],
    *,
    candidate_name: str,
    reference_name: str,
    data: Mapping[str, Any],
    seed: int = 0,
    replicates: int = REPLICATES,
    auc_method: Literal["delong", "bootstrap"] = "delong",
) -> Comparison:
    """Compare two models' scores of the same samples.

    Args:
        candidate: scores of the one.
        reference: scores of the other.
        specs: the tasks; one that a model did not score is named in ``only_one``.
        candidate_name: of the one.
        reference_name: of the other.
        data: what was scored (``manifest_sha256``, ``split``); each task's digest of samples is added.
        seed: of the bootstrap.
        replicates: of the bootstrap.
        auc_method: where differences of AUC get their interval from.

    Raises:
        InputError: a task's samples or labels differ between the two.
    """
    ours, theirs = by_task(candidate, specs), by_task(reference, specs)
    alone = {name: candidate_name for name in ours if name not in theirs}
    alone |= {name: reference_name for name in theirs if name not in ours}
    shared = [spec.name for spec in specs if spec.name in ours and spec.name in theirs]
    if not shared:
        raise InputError(
            f"two models to compare must share a task, got {sorted(ours)} of {candidate_name} "
            f"and {sorted(theirs)} of {reference_name}; score both on the same data"
        )
    raw = {name: _task(ours[name], theirs[name], task_rng(seed, name), replicates, auc_method) for name in shared}
    adjusted = holm({name: d.p_value for name, d in raw.items() if d.p_value is not None})
    tasks = {
        name: TaskDifference(
            **d.model_dump(),
            n=len(ours[name]),
            metric=metric_of(ours[name].spec),
            p_holm=adjusted.get(name),
            verdict=_verdict(d, adjusted.get(name)),
        )
        for name, d in raw.items()
    }
    digests = {name: keys_sha256(ours[name]) for name in shared}
    return Comparison(
        candidate=candidate_name,
        reference=reference_name,
        data={**data, "keys_sha256": digests},
        tasks=tasks,
        macro=_macro(raw),
        only_one=alone,
    )


def holm(p_values: Mapping[str, float]) -> dict[str, float]:
    """Adjust p-values for their number (Holm 1979, Scandinavian Journal of Statistics 6): never below the raw ones."""
    adjusted: dict[str, float] = {}
    largest = 0.0
    for rank, name in enumerate(sorted(p_values, key=lambda k: p_values[k])):
        largest = max(largest, min(1.0, p_values[name] * (len(p_values) - rank)))
        adjusted[name] = largest
    return adjusted


def normal_difference(
    difference: float, error: float, unanimous_p: float, level: float = 0.95
) -> tuple[Interval, float]:
    """Return the normal interval of a difference and its two-sided p-value.

    Args:
        difference: as estimated.
        error: its standard error; 0 where all samples agree, however few they are.
        unanimous_p: p-value of a difference on which all samples agree.
        level: of the interval.
    """
    half = float(ndtri((1 + level) / 2)) * error
    if error > 0:
        p = float(2 * ndtr(-abs(difference) / error))
    else:
        p = unanimous_p if difference else 1.0
    return (difference - half, difference + half), p


def _task(
    ours: TaskScores, theirs: TaskScores, rng: np.random.Generator, replicates: int, auc_method: str
) -> Difference:
    if not np.array_equal(ours.keys, theirs.keys) or not np.array_equal(ours.labels, theirs.labels):
        both = len(set(ours.keys) & set(theirs.keys))
        raise InputError(
            f"task {ours.spec.name!r}: two models to compare must have scored the same samples with the same labels, "
            f"got {len(ours)} and {len(theirs)} of which {both} are shared; score both on one manifest and split"
        )
    metric = metric_of(ours.spec)
    f, g = statistics(ours)[metric], statistics(theirs)[metric]
    units = len(ours) if ours.groups is None else int(ours.groups.max()) + 1
    positives = int((ours.labels > 0).sum())
    deciding = min(units, positives, len(ours) - positives) if metric == "auc" else units
    unanimous_p = 2.0 ** (1 - deciding)  # the sign test's
    ones = np.ones((1, len(ours)))
    a, b = float(f(ones)[0]), float(g(ones)[0])
    if math.isnan(a) or math.isnan(b):
        return _undefined(a, b, reason(ours if math.isnan(a) else theirs, metric))
    if metric == "auc" and auc_method == "bootstrap" and ours.groups is None:
        values = paired_auc_bootstrap(ours.labels, ours.score, theirs.score, rng, replicates)
        error = float(values.std())
        low, high = np.quantile(values, [0.025, 0.975]).tolist()
        return _difference(a, b, (low, high), error, normal_difference(a - b, error, unanimous_p)[1])
    if metric == "auc" and auc_method == "delong":
        _, error = auc_difference(ours.labels, ours.score, theirs.score, ours.groups)
        interval, p = normal_difference(a - b, error, unanimous_p)
        return _difference(a, b, interval, error, p)
    draws = [f(w) - g(w) for w in bootstrap_weights(len(ours), rng, replicates, groups=ours.groups)]
    left_out = [f(w) - g(w) for w in left_out_weights(len(ours), ours.groups)]
    values = np.concatenate(draws)
    found = bca_interval(values, a - b, np.concatenate(left_out), units)
    if found is None:
        return _undefined(a, b, f"{metric} is undefined in most resamples of these {len(ours)} samples")
    error = float(np.nanstd(values))
    return _difference(a, b, found, error, normal_difference(a - b, error, unanimous_p)[1])


def _difference(a: float, b: float, interval: Interval, error: float, p: float) -> Difference:
    return Difference(candidate=a, reference=b, difference=a - b, ci95=interval, standard_error=error, p_value=p)


def _undefined(a: float | None, b: float | None, why: str) -> Difference:
    a, b = (None if x is None or math.isnan(x) else x for x in (a, b))
    return Difference(
        candidate=a, reference=b, difference=None, ci95=None, standard_error=None, p_value=None, reason=why
    )


def _verdict(d: Difference, adjusted: float | None) -> Literal["better", "worse", "no difference shown", "undefined"]:
    if d.difference is None or adjusted is None:
        return "undefined"
    if adjusted > ALPHA or d.difference == 0:
        return "no difference shown"
    return "better" if d.difference > 0 else "worse"


def _macro(raw: Mapping[str, Difference]) -> Difference:
    """Average the tasks' differences; their samples are distinct, so their variances add."""
    missing = [name for name, d in raw.items() if d.difference is None]
    if missing:
        return _undefined(None, None, f"undefined for {', '.join(missing)}")
    a = float(np.mean([d.candidate for d in raw.values()]))
    b = float(np.mean([d.reference for d in raw.values()]))
    error = math.sqrt(sum((d.standard_error or 0.0) ** 2 for d in raw.values())) / len(raw)
    interval, p = normal_difference(a - b, error, max(d.p_value or 0.0 for d in raw.values()))
    return _difference(a, b, interval, error, p)
