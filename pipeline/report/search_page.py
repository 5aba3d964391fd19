"""The page of a search: the trials' curves, a table, the best configuration."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.contracts import write_atomic

if TYPE_CHECKING:
    from pipeline.report.drawing import Chart


@dataclass(frozen=True)
class TrialRow:
    """One trial.

    Args:
        number: of the trial.
        values: of the searched keys.
        state: how it ended.
        curve: (step, metric) of each measurement.
        best: mean of two neighbouring measurements, or the only one; None without any.
        reason: why it failed.
    """

    number: int
    values: Mapping[str, Any]
    state: str
    curve: tuple[tuple[int, float], ...]
    best: float | None
    reason: str

    def shown(self, key: str) -> str:
        """Return the value of a key in few characters."""
        return shown(self.values[key]) if key in self.values else "–"


def shown(value: Any) -> str:
    """Return a searched value in few characters: a mapping, such as a mixture, without its braces and quotes."""
    if isinstance(value, Mapping):
        parts = [f"{key}: {shown(inner)}" for key, inner in value.items() if key != "kind"]
        return ", ".join(([str(value["kind"])] if "kind" in value else []) + parts)
    return f"{value:.3g}" if isinstance(value, float) else str(value)


@dataclass(frozen=True)
class SearchPage:
    """What the page shows.

    Args:
        name: of the search.
        metric: that judges the trials, the higher the better.
        trials: in the order of their numbers, 0 first: the configuration as it stands.
        best: number of the best one.
        config: the best configuration as YAML.
    """

    name: str
    metric: str
    trials: tuple[TrialRow, ...]
    best: int
    config: str

    @property
    def keys(self) -> list[str]:
        """The searched keys."""
        return list(dict.fromkeys(key for trial in self.trials for key in trial.values))

    @property
    def ranked(self) -> list[TrialRow]:
        """The trials, the best first, those that failed or have no measurement last."""
        return sorted(
            self.trials, key=lambda t: (t.state != "failed" and t.best is not None, t.best or 0.0), reverse=True
        )


def write_search_page(path: Path, page: SearchPage) -> None:
    """Write the page as one HTML file that needs nothing else, atomically."""
    from pipeline.report import drawing  # takes matplotlib along
    from pipeline.report.rendering import CURVES, environment

    with drawing.style():
        curves = [_curves(page, *size) for size in CURVES]
        html = (
            environment()
            .get_template("search.html.j2")
            .render(page=page, curves=curves, colours=drawing.COLOURS, task_colours=drawing.TASKS)
        )
    write_atomic(path, html)


def _curves(page: SearchPage, width: int, height: int) -> Chart:
    """Draw each trial's metric over its steps, the best one strongest."""
    from pipeline.report.drawing import INK, plot

    points = [point for trial in page.trials for point in trial.curve]
    values = [value for _, value in points]
    low, high = min(values), max(values)
    room = 0.05 * ((high - low) or 1.0)
    steps = (0.0, float(max(step for step, _ in points)))
    chart = plot(steps, (low - room, high + room), "step", page.metric, "Validation by step", width, height)
    for trial in sorted(page.trials, key=lambda t: t.number == page.best):
        if trial.curve:
            x, y = zip(*trial.curve, strict=True)
            is_best = trial.number == page.best
            chart.axes.plot(
                x,
                y,
                color=INK["candidate" if is_best else "base"],
                linewidth=2.2 if is_best else 1,
                marker="o",
                markersize=4 if is_best else 2.5,
            )
    return chart
