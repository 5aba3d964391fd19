"""The page of a search."""

from __future__ import annotations

from pathlib import Path

from pipeline.report.search_page import SearchPage, TrialRow, shown, write_search_page

TRIALS = (
    TrialRow(0, {"adapter.r": 8, "mixture": {"kind": "proportional"}}, "finished", ((10, 0.5), (20, 0.6)), 0.6, ""),
    TrialRow(1, {"adapter.r": 4, "mixture": "temperature"}, "stopped", ((10, 0.4),), 0.4, ""),
    TrialRow(2, {"adapter.r": 16, "mixture": "temperature"}, "failed", ((10, 0.9),), 0.9, "no memory is left"),
    TrialRow(3, {"adapter.r": 2, "mixture": "temperature"}, "failed", (), None, "no memory is left"),
)
PAGE = SearchPage("ads-tune", "macro", TRIALS, 0, "name: ads-best\n")


def test_trials_that_failed_come_last_whatever_they_measured() -> None:
    assert [trial.number for trial in PAGE.ranked] == [0, 1, 2, 3]


def test_the_page_says_the_best_trials_own_measurement_and_why_others_failed(tmp_path: Path) -> None:
    write_search_page(tmp_path / "tune.html", PAGE)
    html = (tmp_path / "tune.html").read_text()
    assert "best macro 0.6000, trial 0" in html.replace("Macro", "macro")
    assert html.count("no memory is left") == 2
    assert "name: ads-best" in html


def test_a_mixture_is_shown_without_braces() -> None:
    assert shown({"kind": "temperature", "temperature": 2.0}) == "temperature, temperature: 2"
    assert shown({"kind": "weights", "weights": {"a": 0.25, "b": 1}}) == "weights, weights: a: 0.25, b: 1"
    assert (shown(0.0012345), shown(4), shown("proportional")) == ("0.00123", "4", "proportional")
