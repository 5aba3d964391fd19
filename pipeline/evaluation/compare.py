"""Two models on the same samples: paired differences with intervals, and what they show.

Each task's difference is :mod:`pipeline.evaluation.paired`'s; its verdict rests on its p-value adjusted over all tasks.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
import pandas as pd

from pipeline.contracts import Comparison, Difference, TaskDifference, TaskSpec
from pipeline.errors import InputError
from pipeline.evaluation.intervals import REPLICATES
from pipeline.evaluation.paired import Paired, paired_difference, rarer_class, student_difference
from pipeline.evaluation.score_table import TaskScores, by_task, keys_sha256, shared_parts
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
    found = compare_tasks(
        ours,
        theirs,
        candidate_name=candidate_name,
        reference_name=reference_name,
        data=data,
        seed=seed,
        replicates=replicates,
        auc_method=auc_method,
    )
    digests = {name: keys_sha256(ours[name]) for name in found.tasks}
    return found.model_copy(update={"data": {**data, "keys_sha256": digests}})


def compare_tasks(
    ours: Mapping[str, TaskScores],
    theirs: Mapping[str, TaskScores],
    *,
    candidate_name: str,
    reference_name: str,
    data: Mapping[str, Any],
    seed: int = 0,
    replicates: int = REPLICATES,
    auc_method: Literal["delong", "bootstrap"] = "delong",
) -> Comparison:
    """Compare two models' scores, task by task; arguments and errors as of :func:`compare`, but for the digests."""
    alone = {name: candidate_name for name in ours if name not in theirs}
    alone |= {name: reference_name for name in theirs if name not in ours}
    shared = [name for name in ours if name in theirs]
    if not shared:
        raise InputError(
            f"two models to compare must share a task, got {sorted(ours)} of {candidate_name} "
            f"and {sorted(theirs)} of {reference_name}; score both on the same data"
        )
    for name in shared:
        _checked(ours[name], theirs[name])
    parts = shared_parts({name: ours[name] for name in shared})
    found = {
        name: paired_difference(
            ours[name],
            theirs[name],
            metric_of(ours[name].spec),
            task_rng(seed, name),
            parts=parts[name],
            replicates=replicates,
            auc_method=auc_method,
        )
        for name in shared
    }
    return Comparison(
        candidate=candidate_name,
        reference=reference_name,
        data=dict(data),
        tasks=_task_differences(ours, {name: paired.difference for name, paired in found.items()}),
        macro=_macro(found),
        only_one=alone,
    )


def _task_differences(ours: Mapping[str, TaskScores], raw: Mapping[str, Difference]) -> dict[str, TaskDifference]:
    adjusted = holm({name: d.p_value for name, d in raw.items() if d.p_value is not None})
    return {
        name: TaskDifference(
            **d.model_dump(),
            n=len(ours[name]),
            metric=metric_of(ours[name].spec),
            p_holm=adjusted.get(name),
            verdict=_verdict(d, adjusted.get(name)),
            rarer_class=rarer_class(ours[name]),
        )
        for name, d in raw.items()
    }


def holm(p_values: Mapping[str, float]) -> dict[str, float]:
    """Adjust p-values for their number (Holm 1979, Scandinavian Journal of Statistics 6): never below the raw ones."""
    adjusted: dict[str, float] = {}
    largest = 0.0
    for rank, name in enumerate(sorted(p_values, key=lambda k: p_values[k])):
        largest = max(largest, min(1.0, p_values[name] * (len(p_values) - rank)))
        adjusted[name] = largest
    return adjusted


def _checked(ours: TaskScores, theirs: TaskScores) -> None:
    told = [(s.labels if s.references is None else s.references).tolist() for s in (ours, theirs)]
    if not np.array_equal(ours.keys, theirs.keys) or told[0] != told[1]:
        both = len(set(ours.keys) & set(theirs.keys))
        raise InputError(
            f"task {ours.spec.name!r}: two models to compare must have scored the same samples with the same labels, "
            f"got {len(ours)} and {len(theirs)} of which {both} are shared; score both on one manifest and split"
        )


def _verdict(d: Difference, adjusted: float | None) -> Literal["better", "worse", "no difference shown", "undefined"]:
    if d.difference is None or d.ci95 is None or adjusted is None:
        return "undefined"
    if adjusted > ALPHA or d.difference == 0:
        return "no difference shown"
    return "better" if d.difference > 0 else "worse"


def _macro(found: Mapping[str, Paired]) -> Difference:
    """Average the tasks' differences.

    Samples of different tasks are distinct, so their variances add, but for tasks that share groups: what a group adds
    is summed over the tasks before it is squared.
    """
    raw = {name: paired.difference for name, paired in found.items()}
    missing = [name for name, d in raw.items() if d.ci95 is None]
    a, b = (None if None in side else float(np.mean(side)) for side in _sides(raw))  # type: ignore[arg-type]
    if missing or a is None or b is None:
        return Difference(
            candidate=a,
            reference=b,
            difference=None if a is None or b is None else a - b,
            ci95=None,
            standard_error=None,
            p_value=None,
            reason=f"undefined for {', '.join(missing)}",
        )
    joint = [p.parts for p in found.values() if p.parts is not None]
    pieces = [
        ((d.standard_error or 0.0) ** 2, d.degrees_of_freedom or math.inf)
        for name, d in raw.items()
        if found[name].parts is None
    ]
    if joint:
        least = min(d.degrees_of_freedom or math.inf for name, d in raw.items() if found[name].parts is not None)
        pieces.append((float(np.square(np.sum(joint, axis=0)).sum()), least))
    variance = sum(part for part, _ in pieces)
    weighted = sum(part * part / free for part, free in pieces)
    free = variance * variance / weighted if weighted > 0 else math.inf
    return student_difference(a, b, math.sqrt(variance) / len(raw), free)


def _sides(raw: Mapping[str, Difference]) -> tuple[list[float | None], list[float | None]]:
    return [d.candidate for d in raw.values()], [d.reference for d in raw.values()]
