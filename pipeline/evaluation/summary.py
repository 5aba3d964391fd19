"""From scores to ``evaluation.json``: each task's metrics with intervals, and their macro mean."""

from __future__ import annotations

import math
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from scipy.special import ndtri

from pipeline.contracts import EvaluationReport, MacroResult, Metric, TaskResult, TaskSpec
from pipeline.evaluation.delong import auc_interval, part_sums, placements
from pipeline.evaluation.intervals import (
    REPLICATES,
    bca_interval,
    left_out_weights,
    part_effects,
    plain_value,
    replicate,
    share_interval,
)
from pipeline.evaluation.metrics import reason, statistics
from pipeline.evaluation.paired import rarer_class, too_few
from pipeline.evaluation.score_table import PARTS, Floats, Ints, TaskScores, by_task, keys_sha256, shared_parts

NAMED = ("auc", "accuracy", "logloss", "ece")
"""Metrics with a field of their own in :class:`TaskResult`; the others stand in ``more``."""
SHARES = ("accuracy", "exact_match", "answered", "subset_accuracy")
"""Metrics that are a share of the samples."""


def task_rng(seed: int, task: str) -> np.random.Generator:
    """Return the generator of one task's draws: the same for each model, whatever other tasks there are."""
    return np.random.default_rng([seed, zlib.crc32(task.encode())])


def summarize(
    scores: pd.DataFrame,
    specs: Sequence[TaskSpec],
    *,
    model: str,
    data: Mapping[str, Any],
    best_attainable: Mapping[str, float] | None = None,
    seed: int = 0,
    replicates: int = REPLICATES,
) -> EvaluationReport:
    """Score every task of ``specs``.

    Args:
        scores: one row a sample, as ``predict`` returns it.
        specs: the tasks; one without rows is reported as undefined, with the reason.
        model: name of the model that scored.
        data: what was scored (``manifest_sha256``, ``split``); the digest of the samples themselves is added.
        best_attainable: each task's metric under the known label probabilities, synthetic data only.
        seed: of the bootstrap.
        replicates: of the bootstrap.

    Raises:
        InputError: the frame breaks its form or names an unknown task.
    """
    parts = by_task(scores, specs)
    results: dict[str, TaskResult] = {}
    for spec in specs:
        best = (best_attainable or {}).get(spec.name)
        if spec.name not in parts:
            nothing = f"no sample of task {spec.name!r} was scored"
            results[spec.name] = TaskResult(
                n=0, metric=metric_of(spec), value=None, ci95=None, reason=nothing, best_attainable=best
            )
            continue
        results[spec.name] = task_result(parts[spec.name], task_rng(seed, spec.name), replicates, best)
    return EvaluationReport(
        model=model,
        data={**data, "keys_sha256": {name: keys_sha256(part) for name, part in parts.items()}},
        tasks=results,
        macro=_macro(results, parts),
    )


def metric_of(spec: TaskSpec) -> Metric:
    """Return the metric that stands for a task."""
    if spec.metric is None:
        raise ValueError(f"task {spec.name!r} must name its metric, got None; TaskSpec fills it in by kind")
    return spec.metric


def task_result(sample: TaskScores, rng: np.random.Generator, replicates: int, best: float | None = None) -> TaskResult:
    """Return one task's metrics with their intervals."""
    known = statistics(sample)
    values = {name: plain_value(statistic, len(sample)) for name, statistic in known.items()}
    draws = replicate(sample, known, rng, replicates)
    left_out = [
        {name: f(weights) for name, f in known.items()} for weights in left_out_weights(len(sample), sample.groups)
    ]
    metric = metric_of(sample.spec)
    undefined = {name: reason(sample, name) for name, value in values.items() if math.isnan(value)}
    units = len(sample) if sample.groups is None else int(sample.groups.max()) + 1
    intervals: dict[str, tuple[float, float] | None] = {}
    for name in known:
        if name in undefined:
            intervals[name] = None
        elif name == "auc":
            intervals[name] = auc_interval(sample.labels, sample.score, sample.groups)
            if intervals[name] is None:
                undefined[name] = too_few(sample, name) or "no interval"
        elif name in SHARES and (sample.groups is None or values[name] in (0.0, 1.0)):
            intervals[name] = share_interval(values[name], units)
        else:
            jackknife = np.concatenate([part[name] for part in left_out])
            intervals[name] = bca_interval(draws[name], values[name], jackknife, units)
    shown = {name: None if math.isnan(value) else value for name, value in values.items()}
    return TaskResult(
        n=len(sample),
        metric=metric,
        value=shown[metric],
        ci95=intervals[metric],
        reason=undefined.get(metric),
        best_attainable=best,
        more={name: value for name, value in shown.items() if name not in NAMED},
        intervals=intervals,
        undefined=undefined,
        rarer_class=rarer_class(sample),
        **{name: shown.get(name) for name in NAMED},
    )


def _macro(results: Mapping[str, TaskResult], samples: Mapping[str, TaskScores]) -> MacroResult:
    """Average the tasks' metrics; the interval is the normal one, with what shared groups add taken jointly."""
    missing = [name for name, result in results.items() if result.value is None]
    if missing or not results:
        why = f"undefined for {', '.join(missing)}" if missing else "no tasks"
        return MacroResult(value=None, ci95=None, reason=why)
    value = float(np.mean([result.value for result in results.values()]))
    averages = ", ".join(f"{name} ({result.metric})" for name, result in results.items())
    unsure = [name for name, result in results.items() if result.ci95 is None]
    if unsure:
        why = f"no interval for {', '.join(unsure)}"
        return MacroResult(value=value, ci95=None, reason=why, averages=averages)
    reach = float(ndtri(0.975))
    alone, joint = 0.0, np.zeros(PARTS)
    for name, parts in shared_parts(samples).items():
        low, high = results[name].ci95 or (0.0, 0.0)
        error = (high - low) / (2 * reach)
        effects = None if parts is None else _effects(samples[name], parts)
        if effects is None:
            alone += error**2
        else:
            joint += effects * (error / math.sqrt(float(np.square(effects).sum())))
    half = reach * math.sqrt(alone + float(np.square(joint).sum())) / len(results)
    return MacroResult(value=value, ci95=(max(-1.0, value - half), min(1.0, value + half)), averages=averages)


def _effects(sample: TaskScores, parts: Ints) -> Floats | None:
    """Return what each part of the groups adds to a task's metric; None where nothing varies."""
    metric = metric_of(sample.spec)
    if metric == "auc":
        effects: Floats | None = part_sums(parts, placements(sample.labels, sample.score).influence, PARTS)
    else:
        effects = part_effects(statistics(sample)[metric], parts)
    return effects if effects is not None and effects.any() else None
