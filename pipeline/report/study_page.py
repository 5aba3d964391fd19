"""The page of a comparison: a table a suite, its differences with their intervals, the search's curves, figures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pipeline.contracts import write_atomic
from pipeline.study.results import SuiteResult

if TYPE_CHECKING:
    from pipeline.report.drawing import Chart

_ROW, _LEFT = 26, 210
"""Pixels of an arm's row in the chart of differences, and of its name."""


@dataclass(frozen=True)
class _Section:
    suite: SuiteResult
    differences: Chart | None
    curves: Chart


@dataclass(frozen=True)
class _Figure:
    title: str
    note: str
    charts: list[tuple[str, Chart]]
    keys: list[str]


def write_study_page(
    path: Path, name: str, suites: Sequence[SuiteResult], notes: Sequence[str], figures: Mapping[str, Any]
) -> None:
    """Write the page as one HTML file that needs nothing else, atomically.

    Args:
        path: of the page.
        name: of the study.
        suites: the tables.
        notes: sentences on what is scaled down and what is by construction.
        figures: as :mod:`pipeline.study.figures` leaves them, those that are there.
    """
    from pipeline.report import drawing  # takes matplotlib along
    from pipeline.report.rendering import environment

    with drawing.style():
        sections = [_Section(suite, differences_chart(suite), rates_chart(suite)) for suite in suites]
        html = (
            environment()
            .get_template("study.html.j2")
            .render(
                name=name,
                sections=sections,
                notes=notes,
                figures=[*_by_tasks(suites), *_figures(figures)],
                colours=drawing.COLOURS,
                task_colours=drawing.TASKS,
            )
        )
    write_atomic(path, html)


def differences_chart(suite: SuiteResult) -> Chart | None:
    """Draw each arm's difference to the best reference arm with its interval; None where there is only that one."""
    from pipeline.report.drawing import INK, plane

    shown = [(arm, arm.difference) for arm in suite.arms if arm.difference is not None]
    if not shown:
        return None
    ends = [end for _, difference in shown for end in difference.ci95]
    low, high = min(0.0, *ends), max(0.0, *ends)
    room = 0.06 * (high - low or 1.0)
    height = _ROW * len(shown) + 34
    chart = plane((low - room, high + room), (len(shown) - 0.4, -0.6), "Differences", 760, height, (_LEFT, 20, 4, 30))
    axes = chart.axes
    axes.set_axis_on()
    axes.grid(visible=False)
    axes.axvline(0, color=INK["faint"], linewidth=1)
    axes.set_yticks(range(len(shown)), [arm.title for arm, _ in shown])
    axes.tick_params(axis="y", labelcolor=INK["ink"])
    for place, (arm, found) in enumerate(shown):
        colour = INK["candidate" if arm.name == suite.recipe else "base"]
        axes.plot(found.ci95, (place, place), color=colour, linewidth=3, alpha=0.5, solid_capstyle="round")
        axes.plot(found.value, place, "o", color=colour, markersize=7)
    return chart


def rates_chart(suite: SuiteResult) -> Chart:
    """Draw each arm's mean on the development part over its learning rates, its chosen one marked."""
    from pipeline.report.drawing import INK, TASKS, plot

    values = [value for arm in suite.arms for value in arm.curve.values()]
    rates = np.log10([rate for arm in suite.arms for rate in arm.curve])
    room = 0.05 * ((max(values) - min(values)) or 1.0)
    chart = plot(
        (float(rates.min()), float(rates.max())),
        (min(values) - room, max(values) + room),
        "learning rate",
        "mean",
        "Mean on the development part by learning rate",
        760,
        280,
    )
    ticks = sorted({float(rate) for arm in suite.arms for rate in arm.curve})
    chart.axes.set_xticks(np.log10(ticks), [f"{tick:g}" for tick in ticks])
    for place, arm in enumerate(suite.arms):
        colour = INK[TASKS[place % len(TASKS)]]
        dashed = "-" if place < len(TASKS) else (0, (4, 2))
        x = np.log10(list(arm.curve))
        chart.axes.plot(x, list(arm.curve.values()), color=colour, linewidth=1.4, linestyle=dashed)
        chart.axes.plot(np.log10(arm.rate), arm.curve[arm.rate], "o", color=colour, markersize=6)
    return chart


def _by_tasks(suites: Sequence[SuiteResult]) -> list[_Figure]:
    """Return the figure over the number of tasks, where each suite has all tasks of the next smaller one and more."""
    ordered = sorted(suites, key=lambda suite: len(suite.metrics))
    pairs = list(pairwise(ordered))
    if not pairs or not all(set(small.metrics) < set(large.metrics) for small, large in pairs):
        return []
    common = list(ordered[0].metrics)
    lines = {
        first.title: [float(np.mean([suite.arm(first.name).tasks[task] for task in common])) for suite in ordered]
        for first in ordered[0].arms
        if all(first.name in [arm.name for arm in suite.arms] for suite in ordered)
    }
    about = f"Mean of the {len(common)} tasks that all suites have, by the number of tasks trained together"
    x = [float(len(suite.metrics)) for suite in ordered]
    chart = _lines(x, lines, "tasks trained together", "mean", about)
    return [_Figure("By the number of tasks", f"{about}.", [("mean of the common tasks", chart)], list(lines))]


def _figures(known: Mapping[str, Any]) -> list[_Figure]:
    """Return the figures that are there, in their order."""
    makers = {"features": _features, "sharing": _sharing, "latency": _latency}
    return [make(known[name]) for name, make in makers.items() if name in known]


def _features(found: Mapping[str, Any]) -> _Figure:
    from pipeline.report.charts import scatter

    tasks = found["tasks"]
    charts = []
    for arm in found["arms"]:
        codes = np.array([tasks.index(task) for task in arm["of"]])
        words = f"{arm['title']}: silhouette {arm['silhouette']:.2f}, linear probe {arm['probe']:.2f}"
        charts.append((words, scatter(np.array(arm["plane"]), codes, f"Features of {arm['title']} in a plane")))
    return _Figure("Features of the last block's output projection", found["note"], charts, tasks)


def _sharing(found: Mapping[str, Any]) -> _Figure:
    from pipeline.report.charts import heat_map

    tasks, charts = found["tasks"], []
    words = [task.replace("_", " ") for task in tasks]
    numbers = [str(place + 1) for place in range(len(tasks))]
    rows = [f"{name} · {number}" for name, number in zip(words, numbers, strict=True)]
    for arm in found["arms"]:
        if arm["mixing"]:
            weights = np.array([arm["mixing"][task] for task in tasks])
            columns = [f"B{place + 1}" for place in range(weights.shape[1])]
            about = f"Mixing weights of {arm['title']}"
            charts.append((f"{arm['title']}: mixing weights", heat_map(weights, words, columns, about)))
        if arm["cosine"]:
            # Shaded by half of one minus the cosine: the darker, the more two tasks pull apart.
            apart = np.array([[_apart(arm["cosine"], one, other) for other in tasks] for one in tasks])
            about = f"Cosines between the tasks' gradients under {arm['title']}"
            shown = heat_map(apart, rows, numbers, about, form=lambda half: f"{1 - 2 * half:+.2f}")
            charts.append((f"{arm['title']}: cosines between gradients", shown))
    return _Figure("How tasks share an adapter", found["note"], charts, [])


def _apart(cosines: Mapping[str, float], one: str, other: str) -> float:
    pair = "|".join(sorted((one, other)))
    return (1 - cosines[pair]) / 2 if pair in cosines else float("nan")


def _lines(x: Sequence[float], series: Mapping[str, Sequence[float]], x_label: str, y_label: str, about: str) -> Chart:
    from pipeline.report.drawing import INK, TASKS, plot

    values = [value for line in series.values() for value in line]
    room = 0.08 * ((max(values) - min(values)) or 1.0)
    low = max(0.0, min(values) - room)
    chart = plot((min(x), max(x)), (low, max(values) + room), x_label, y_label, about)
    chart.axes.set_xticks(list(x), [f"{value:g}" for value in x])
    for place, line in enumerate(series.values()):
        colour = INK[TASKS[place % len(TASKS)]]
        dashed = "-" if place < len(TASKS) else (0, (4, 2))
        chart.axes.plot(list(x), list(line), color=colour, marker="o", markersize=4, linestyle=dashed)
    return chart


def _latency(found: Mapping[str, Any]) -> _Figure:
    x = [float(np.log2(size)) for size in found["batch_sizes"]]
    chart = _lines(x, found["ratios"], "batch size", "time over the base", "Latency over that of the base")
    chart.axes.set_xticks(x, [str(size) for size in found["batch_sizes"]])
    return _Figure("Latency by batch size", found["note"], [("time over the base's", chart)], list(found["ratios"]))
