"""A study's rows become its table: Markdown, JSON and a page."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.table import Table

from jobs.study_config import StudyConfig
from pipeline.contracts import write_atomic
from pipeline.json_text import parse_json
from pipeline.progress import console, say

if TYPE_CHECKING:
    from pipeline.study.results import SuiteResult

TABLE, RESULTS, PAGE = "study.md", "study.json", "study.html"
"""Names in the study's folder."""


def write_results(config: StudyConfig, finished: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Write table, JSON and page of what is done, and show the table.

    Args:
        config: of the study.
        finished: of each suite, see :meth:`jobs.study.work.Work.finished`.

    Returns:
        The paths ``table``, ``results`` and ``page``, and ``files`` with all of them.
    """
    from pipeline.report.study_page import write_study_page
    from pipeline.study.results import markdown, with_holm

    suites = with_holm([found for name in finished if (found := _suite(config, name, finished[name])) is not None])
    folder = config.folder
    values = {"study": config.name, "suites": [suite.as_values() for suite in suites], "notes": list(config.notes)}
    write_atomic(folder / RESULTS, json.dumps(values, indent=1) + "\n")
    write_atomic(folder / TABLE, markdown(suites, config.notes))
    figures = folder / "figures.json"
    known = parse_json(figures.read_text()) if figures.is_file() else {}
    write_study_page(folder / PAGE, config.name, suites, config.notes, known)
    for suite in suites:
        _show(suite)
    say(f"table {folder / TABLE}, page {folder / PAGE}")
    paths = {"table": folder / TABLE, "results": folder / RESULTS, "page": folder / PAGE}
    return {**paths, "files": list(paths.values())}


def _suite(config: StudyConfig, name: str, found: Mapping[str, Any]) -> SuiteResult | None:
    """Return a suite's table of the arms that are done; None before a reference arm and the base are."""
    from pipeline.evaluation.score_table import by_task, read_scores
    from pipeline.study.results import ArmRuns, suite_result
    from pipeline.study.trial import SCORES

    done, missing = [], []
    for arm, left in found["arms"].items():
        if any(row is None for _, row in left["runs"]) or left["search"].chosen is None:
            missing.append(arm)
            continue
        scores = [by_task(read_scores(Path(trial.folder) / SCORES), trial.job.tasks) for trial, _ in left["runs"]]
        title = config.arms[arm].title or arm.replace("_", " ")
        search, rows = left["search"], [row for _, row in left["runs"]]
        done.append(ArmRuns(arm, title, search.chosen, search.at_edge, left["curve"], scores, rows))
    _, untrained = found["untrained"]
    if untrained is None or not any(arm.name in config.reference for arm in done):
        return None
    return suite_result(name, done, untrained, config.reference, config.recipes, missing)


def _show(suite: SuiteResult) -> None:
    table = Table(title=f"{suite.name}, {suite.seeds} seeds; untrained {suite.untrained_mean:.3f}")
    for column in ("arm", *suite.metrics, "mean", "±", "rate", f"to {suite.reference}", "p (Holm)"):
        table.add_column(column, justify="left" if column == "arm" else "right")
    for arm in suite.arms:
        found = arm.difference
        low, high = found.ci95 if found is not None else (0.0, 0.0)
        shown = (
            ("–", "–") if found is None else (f"{found.value:+.3f} [{low:+.3f}, {high:+.3f}]", f"{found.p_holm:.3f}")
        )
        cells = (*(f"{arm.tasks[task]:.3f}" for task in suite.metrics), f"{arm.mean:.3f}", f"{arm.spread:.3f}")
        table.add_row(arm.title, *cells, f"{arm.rate:g}", *shown, style="bold" if arm.name == suite.recipe else None)
    console.print(table)
