"""A chart says what its numbers are, in the page's colours and fonts, whatever the names in it."""

from __future__ import annotations

import re
from xml.etree import ElementTree

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import roc_auc_score

from pipeline.contracts import TaskSpec
from pipeline.evaluation.score_table import TaskScores
from pipeline.report import charts, drawing
from pipeline.report.drawing import COLOURS, INK, Chart, plot, svg


def written(chart: Chart) -> ElementTree.Element:
    with drawing.style():
        return ElementTree.fromstring(svg(chart, "c"))


def binary(n: int = 300, skill: float = 1.0) -> TaskScores:
    rng = np.random.default_rng(0)
    labels = (rng.random(n) < 0.4).astype(float)
    p = 1 / (1 + np.exp(-skill * (2 * labels - 1) - rng.normal(size=n)))
    spec = TaskSpec(name="query_ad", template="{q}", label_words=(" no", " yes"))
    return TaskScores(spec, np.arange(n).astype(object), labels, np.stack([1 - p, p], axis=1))


def words(element: ElementTree.Element) -> list[str]:
    return [found.text or "" for found in element.iter("text")]


def test_the_drawn_roc_curve_has_the_area_of_the_auc() -> None:
    sample = binary()
    drawn = charts.roc({"candidate": sample}).axes.lines[-1]
    area = np.trapezoid(drawn.get_ydata(), drawn.get_xdata())
    assert area == pytest.approx(roc_auc_score(sample.labels, sample.score), abs=1e-12)


def test_the_curve_of_many_samples_stays_small() -> None:
    with drawing.style():
        text = svg(charts.roc({"candidate": binary(100_000)}), "c")
    assert len(text) < 20_000


def test_histogram_shares_sum_to_one_for_each_class() -> None:
    stairs = charts.histogram(binary()).axes.patches
    assert [float(np.sum(part.get_data().values)) for part in stairs] == pytest.approx([1.0, 1.0])


def test_every_colour_is_a_variable_of_the_page_in_light_and_dark() -> None:
    assert len(set(INK.values())) == len(COLOURS)
    shares = np.array([[0.9, 0.1], [np.nan, 0.4]])
    with drawing.style():
        drawn = [
            *(chart for _, chart in charts.task_charts({name: binary() for name in charts.MODELS})),
            charts.heat_map(shares, ["a", "b"], ["c", "d"], "shares", row_title="rows", column_title="columns"),
            charts.forest({"candidate": 0.7, "base": 0.5, "best": 0.9}, (0.6, 0.8), (0.4, 1.0)),
            charts.scatter(np.random.default_rng(0).normal(size=(30, 2)), np.arange(30) % 10, "plane"),
        ]
    for chart in drawn:
        root = written(chart)
        looks = [value for element in root.iter() if (value := element.get("style"))]
        assert not [look for look in looks if re.search(r"#[0-9a-f]{3}|rgb|font-family|url\(", look)]
        named = {name for look in looks for name in re.findall(r"var\(--(\w+)\)", look)}
        assert named
        assert named <= set(COLOURS)
        assert all("fill: var(--" in text.get("style", "") for text in root.iter("text"))
        assert root.get("role") == "img"
        assert root.get("aria-label") == chart.about


@settings(max_examples=15, deadline=None)
@given(st.lists(st.text(min_size=1, max_size=12), min_size=2, max_size=4, unique=True))
def test_any_class_name_is_shown_as_it_is(names: list[str]) -> None:
    with drawing.style():
        chart = charts.heat_map(np.eye(len(names)), names, names, "about")
    shown = words(written(chart))
    for name in names:
        readable = "".join(sign if sign.isprintable() else " " for sign in name).strip()
        assert not readable or readable in shown


@pytest.mark.parametrize("name", ["<b>$x^2$</b> & $5", "体育", "ספורט", "line\nbreak", "\x1b[31m", "\ud800"])
def test_markup_mathematics_other_scripts_and_control_signs_are_text(name: str) -> None:
    with drawing.style():
        chart = charts.heat_map(np.eye(2), [name, "b"], ["a", "b"], "about")
    shown = words(written(chart))
    assert "".join(sign if sign.isprintable() else " " for sign in name).strip() in shown


@pytest.mark.parametrize(("low", "high"), [(0, 1), (0.25, 0.95), (0, 3e-4), (0, 12345), (-1, 1), (2, 2)])
def test_ticks_are_few_round_and_within_the_range(low: float, high: float) -> None:
    with drawing.style():
        drawn = plot((low, high), (0, 1), "x", "y", "about").axes
        ends = drawn.get_xlim()
        found = [tick for tick in drawn.get_xticks() if ends[0] - 1e-12 <= tick <= ends[1] + 1e-12]
    assert 1 <= len(found) <= 7
    assert all(float(f"{tick:.4g}") == pytest.approx(tick) for tick in found)


@pytest.mark.parametrize(
    ("value", "shown"), [(0.25, "0.25"), (12345, "12.345k"), (20000, "20k"), (1.5e-4, "1.5e-4"), (0, "0"), (-2, "-2")]
)
def test_numbers_are_short(value: float, shown: str) -> None:
    assert drawing.number(value) == shown
