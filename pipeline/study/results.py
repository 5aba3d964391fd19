"""The table of a comparison: each arm's tasks, mean, spread over seeds and paired difference to the best rival."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from pipeline.evaluation.score_table import TaskScores
from pipeline.study.comparison import PairedMean, holm, paired_mean, replicates

SIZE_TOLERANCE = 0.06
"""How far an arm's size may lie from the others' to count as equal."""


@dataclass(frozen=True)
class ArmRuns:
    """What an arm's runs left.

    Args:
        name: of the arm.
        title: in words.
        rate: chosen on the development part.
        at_edge: whether the rate lies at an edge of what was tried.
        curve: rate → mean on the development part.
        scores: by task, of each seed.
        rows: of each seed.
    """

    name: str
    title: str
    rate: float
    at_edge: bool
    curve: Mapping[float, float]
    scores: Sequence[Mapping[str, TaskScores]]
    rows: Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class ArmResult:
    """One row of a suite's table.

    Args:
        name: of the arm.
        title: in words.
        rate: it was judged at.
        at_edge: whether that lies at an edge of what was tried.
        curve: rate → mean on the development part.
        tasks: task → mean over seeds of its metric.
        mean: over tasks and seeds.
        spread: standard deviation over seeds of the mean over tasks.
        parameters: of the adapter.
        share: of them in the whole model.
        size_ratio: of them to the first arm's.
        seconds: of a run's training, on average.
        difference: to the best reference arm; None for that arm itself.
        beats_untrained: whether its mean is above the untrained model's.
    """

    name: str
    title: str
    rate: float
    at_edge: bool
    curve: dict[float, float]
    tasks: dict[str, float]
    mean: float
    spread: float
    parameters: int
    share: float
    size_ratio: float
    seconds: float
    difference: PairedMean | None
    beats_untrained: bool

    @property
    def is_of_equal_size(self) -> bool:
        """Whether its size lies within the tolerance."""
        return abs(self.size_ratio - 1) <= SIZE_TOLERANCE


@dataclass(frozen=True)
class SuiteResult:
    """A suite's table.

    Args:
        name: of the suite.
        metrics: task → its metric.
        samples: task → samples judged on.
        untrained: task → metric of the base alone.
        reference: the reference arm of the highest mean, that the others are held against.
        recipe: the studied method's arm that was best on the development part; None without any.
        arms: in the table's order.
        seeds: number of them.
        missing: arms that are not done.
    """

    name: str
    metrics: dict[str, str]
    samples: dict[str, int]
    untrained: dict[str, float]
    reference: str
    recipe: str | None
    arms: tuple[ArmResult, ...]
    seeds: int
    missing: tuple[str, ...] = ()

    @property
    def untrained_mean(self) -> float:
        """Mean over the tasks."""
        return float(np.mean(list(self.untrained.values())))

    def arm(self, name: str) -> ArmResult:
        """Return an arm's row."""
        return next(arm for arm in self.arms if arm.name == name)

    def as_values(self) -> dict[str, Any]:
        """Return plain values, for JSON."""
        return asdict(self)


def suite_result(
    name: str,
    arms: Sequence[ArmRuns],
    untrained: Mapping[str, Any],
    reference: Sequence[str],
    recipes: Sequence[str],
    missing: Sequence[str] = (),
) -> SuiteResult:
    """Return a suite's table, each difference with its own p-value: see :func:`with_holm`.

    Args:
        name: of the suite.
        arms: that are done, at least one of them a reference.
        untrained: row of the base alone.
        reference: arms of which the best is what the others are held against; the best on the test samples, which
            favours them.
        recipes: arms of the studied method.
        missing: arms that are not done.
    """
    drawn = {arm.name: replicates(arm.scores) for arm in arms}
    means = {arm.name: float(drawn[arm.name].values.mean()) for arm in arms}
    best = max((arm for arm in reference if arm in means), key=lambda arm: means[arm])
    base = {task: found["value"] for task, found in untrained["tasks"].items()}
    size = arms[0].rows[0]["adapter_parameters"]
    results = []
    for arm in arms:
        values, row = drawn[arm.name].values, arm.rows[0]
        over_tasks = values.mean(axis=1)
        results.append(
            ArmResult(
                name=arm.name,
                title=arm.title,
                rate=arm.rate,
                at_edge=arm.at_edge,
                curve=dict(arm.curve),
                tasks=dict(zip(arm.scores[0], values.mean(axis=0).tolist(), strict=True)),
                mean=means[arm.name],
                spread=float(over_tasks.std(ddof=1)) if len(over_tasks) > 1 else 0.0,
                parameters=row["adapter_parameters"],
                share=row["adapter_parameters"] / row["parameters"],
                size_ratio=row["adapter_parameters"] / size,
                seconds=float(np.mean([row["train_s"] for row in arm.rows])),
                difference=None if arm.name == best else paired_mean(drawn[arm.name], drawn[best]),
                beats_untrained=means[arm.name] > float(np.mean(list(base.values()))),
            )
        )
    done = {arm.name: max(arm.curve.values()) for arm in arms if arm.name in recipes}
    return SuiteResult(
        name=name,
        metrics={task: found["metric"] for task, found in untrained["tasks"].items()},
        samples={task: found["n"] for task, found in untrained["tasks"].items()},
        untrained=base,
        reference=best,
        recipe=max(done, key=lambda arm: done[arm]) if done else None,
        arms=tuple(results),
        seeds=len(arms[0].scores),
        missing=tuple(missing),
    )


def with_holm(suites: Sequence[SuiteResult]) -> list[SuiteResult]:
    """Return the tables with p-values corrected over all their differences."""
    every = [arm.difference for suite in suites for arm in suite.arms if arm.difference is not None]
    corrected = iter(holm([difference.p for difference in every]))
    return [
        replace(
            suite,
            arms=tuple(
                arm if arm.difference is None else replace(arm, difference=_corrected(arm.difference, next(corrected)))
                for arm in suite.arms
            ),
        )
        for suite in suites
    ]


def _corrected(difference: PairedMean, p_holm: float) -> PairedMean:
    return replace(difference, p_holm=p_holm)


def markdown(suites: Sequence[SuiteResult], notes: Sequence[str] = ()) -> str:
    """Return the tables as Markdown."""
    return "\n".join(
        [*("\n".join(_suite_lines(suite)) + "\n" for suite in suites), *(f"- {note}" for note in notes), ""]
    )


def _suite_lines(suite: SuiteResult) -> list[str]:
    tasks = list(suite.metrics)
    head = ["arm", *(f"{task} ({suite.metrics[task]})" for task in tasks)]
    head += ["mean ± sd", "trainable", "rate", f"to {suite.arm(suite.reference).title} [95 %]", "p (Holm)"]
    rows = [
        ["untrained", *(_number(suite.untrained[task]) for task in tasks), _number(suite.untrained_mean), *[""] * 4]
    ]
    for arm in suite.arms:
        cells = [arm.title, *(_number(arm.tasks[task]) for task in tasks)]
        cells += [
            f"{arm.mean:.3f} ± {arm.spread:.3f}",
            f"{arm.share:.2%}",
            f"{arm.rate:g}{' edge' if arm.at_edge else ''}",
        ]
        found = arm.difference
        cells += ["best of LoRA", ""] if found is None else [_difference(found), f"{found.p_holm:.3f}"]
        rows.append(cells)
    lines = [f"## {suite.name}: {suite.seeds} seeds", ""]
    lines += ["| " + " | ".join(cells) + " |" for cells in (head, ["---"] * len(head), *rows)]
    if suite.missing:
        lines += ["", f"Not done yet: {', '.join(suite.missing)}."]
    return lines


def _difference(found: PairedMean) -> str:
    low, high = found.ci95
    return f"{found.value:+.3f} [{low:+.3f}, {high:+.3f}]"


def _number(value: float) -> str:
    return f"{value:.3f}"
