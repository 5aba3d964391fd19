"""From what the page shows to its HTML: the templates, how they write numbers, and what they are given."""

from __future__ import annotations

from itertools import count

import jinja2
import yaml

from pipeline.evaluation.score_table import by_task
from pipeline.report import charts, drawing
from pipeline.report.content import ReportPage
from pipeline.report.sections import (
    METRICS,
    averaged,
    data_rows,
    distance_map,
    feature_planes,
    mixing_map,
    pace,
    task_rows,
    task_section,
)

CURVES = ((984, 330), (340, 250))
"""Width and height of the learning curve on a desk and on a phone."""


def render(page: ReportPage) -> str:
    """Return the page as HTML; the same page gives the same bytes."""
    tasks = page.manifest.tasks
    names = [spec.name for spec in tasks]
    given = {"candidate": page.candidate, "champion": page.champion, "base": page.base}
    models = {name: model for name, model in given.items() if model is not None}
    reports = {name: model.report for name, model in models.items()}
    samples = {name: by_task(model.scores, tasks) for name, model in models.items() if model.scores is not None}
    scored = [spec for spec in tasks if spec.name in page.candidate.report.tasks]
    with drawing.style():
        planes, feature_tasks = feature_planes(page.features, names)
        return (
            environment()
            .get_template("page.html.j2")
            .render(
                page=page,
                colours=drawing.COLOURS,
                task_colours=drawing.TASKS,
                reports=reports,
                rows=task_rows(reports),
                averaged=averaged(reports["candidate"]),
                sections=[task_section(spec, reports, samples, page.prompts, page.images_of) for spec in scored],
                curves=[charts.learning_curve(page.history, names, *size) for size in CURVES] if page.history else [],
                curve_tasks=charts.logged_tasks(page.history, names),
                pace=pace(page.history),
                mixing=mixing_map(page.adapter),
                distances=distance_map(page.adapter),
                planes=planes,
                feature_tasks=feature_tasks,
                data=data_rows(page.manifest),
                config=yaml.safe_dump(dict(page.config), sort_keys=False) if page.config else "",
            )
        )


def environment() -> jinja2.Environment:
    """Return the templates with their filters; charts are numbered anew for each page."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("pipeline.report", "templates"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    numbers = count(1)
    environment.filters |= {
        "svg": lambda chart: drawing.svg(chart, f"chart{next(numbers)}"),
        "num": _num,
        "p": lambda value: "< 0.001" if value is not None and value < 0.001 else _num(value),
        "interval": _interval,
        "signed": lambda value, digits=3: "–" if value is None else f"{value:+.{digits}f}".replace("-", "−"),
        "metric": lambda name: METRICS.get(name, name),
        "words": lambda name: str(name).replace("_", " "),
        "thousands": lambda number: f"{number:,}".replace(",", "\u202f"),
    }
    return environment


def _num(value: float | None, digits: int = 3) -> str:
    return "–" if value is None else f"{value:.{digits}f}".replace("-", "−")


def _interval(pair: tuple[float, float] | None) -> str:
    return "" if pair is None else f"{_num(pair[0])}\u2009–\u2009{_num(pair[1])}"
