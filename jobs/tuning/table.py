"""What a search shows in a terminal: a row a trial, its curve in a few characters."""

from __future__ import annotations

from collections.abc import Sequence

from rich.table import Table

from jobs.tuning.trials import Outcome
from pipeline.progress import console
from pipeline.report.search_page import shown

_BARS = "▁▂▃▄▅▆▇█"


def sparkline(values: Sequence[float], low: float, high: float) -> str:
    """Return a bar a value, its height between two ends."""
    span = (high - low) or 1.0
    return "".join(_BARS[min(len(_BARS) - 1, max(0, int((value - low) / span * len(_BARS))))] for value in values)


def show_trials(outcomes: Sequence[Outcome], best: Outcome, metric: str) -> None:
    """Show the trials, the best mean of two neighbouring measurements first."""
    every = [value for outcome in outcomes for _, value in outcome.curve]
    low, high = min(every, default=0.0), max(every, default=1.0)
    keys = list(dict.fromkeys(key for outcome in outcomes for key in outcome.values))
    table = Table(title=f"{len(outcomes)} trials by {metric} on the validation split")
    for column in ("trial", *keys, "state", "steps", f"best {metric}", "curve"):
        table.add_column(column, justify="left" if column in ("state", "curve") else "right")
    ranked = sorted(outcomes, key=lambda o: (o.state != "failed" and o.best is not None, o.best or 0.0), reverse=True)
    for outcome in ranked:
        table.add_row(
            *(str(outcome.number), *(shown(outcome.values.get(key, "·")) for key in keys), outcome.state),
            *(
                str(outcome.curve[-1][0]) if outcome.curve else "0",
                "–" if outcome.best is None else f"{outcome.best:.4f}",
            ),
            sparkline([value for _, value in outcome.curve], low, high),
            style="bold" if outcome.number == best.number else None,
        )
    console.print(table)
