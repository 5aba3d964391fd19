"""The page of a comparison stands alone and shows every arm, and every figure that is there."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import numpy as np

from pipeline.report.study_page import write_study_page
from pipeline.study.results import suite_result, with_holm
from tests.pipeline.study.made import UNTRAINED, arm

FIGURES = {
    "features": {
        "note": "n",
        "tasks": ["a", "b"],
        "arms": [
            {
                "title": "LoRA",
                "plane": np.random.default_rng(0).random((8, 2)).tolist(),
                "of": ["a", "b"] * 4,
                "silhouette": 0.25,
                "probe": 0.5,
            }
        ],
    },
    "sharing": {
        "note": "n",
        "tasks": ["a", "b"],
        "arms": [
            {"title": "LoRA", "mixing": {}, "cosine": {"a|b": -0.25}},
            {"title": "MTL-LoRA", "mixing": {"a": [0.75, 0.25], "b": [0.5, 0.5]}, "cosine": {}},
        ],
    },
    "latency": {"note": "n", "batch_sizes": [1, 4], "ratios": {"base": [1.0, 1.0], "LoRA": [1.2, 1.1]}},
}


def write_page(path: Path) -> Path:
    arms = [arm("lora", 0.6), arm("lora_word", 0.7), arm("mtl_<b>", 0.8, at_edge=True), arm("dora", 0.65, 1200)]
    suites = with_holm([suite_result(name, arms, UNTRAINED, ("lora", "lora_word"), ("mtl_<b>",)) for name in "xy"])
    write_study_page(path, "the study", suites, ["scaled down"], FIGURES)
    return path


def test_the_page_shows_each_arm_and_figure_and_needs_nothing_else(tmp_path: Path) -> None:
    html = write_page(tmp_path / "page.html").read_text()
    for words in (
        "lora word",
        "mtl &lt;b&gt;",
        "scaled down",
        "silhouette 0.25",
        "Latency by batch size",
        "0.01 edge",
        "-0.25",
        "0.75",
    ):
        assert words in html
    assert "<b>" not in html and "http" not in html.replace("http://www.w3.org", "")
    charts = html.split("<svg")[1:]
    assert len(charts) == 2 * 2 + 1 + 2 + 1
    for chart in charts:
        ElementTree.fromstring("<svg" + chart.split("</svg>")[0] + "</svg>")


def test_one_arm_alone_has_no_differences(tmp_path: Path) -> None:
    suite = suite_result("x", [arm("lora", 0.6)], UNTRAINED, ("lora",), ())
    write_study_page(tmp_path / "page.html", "s", [suite], [], {})
    assert (tmp_path / "page.html").read_text().count("<svg") == 1


def test_suites_that_contain_each_other_are_drawn_over_their_number_of_tasks(tmp_path: Path) -> None:
    arms = [arm("lora", 0.6), arm("mtl_lora", 0.8)]
    large = suite_result("large", arms, UNTRAINED, ("lora",), ())
    small = replace(large, name="small", metrics={"tone": "accuracy", "size": "accuracy"})
    for suites, drawn in (([large, small], 1), ([large, large], 0), ([large], 0)):
        write_study_page(tmp_path / "page.html", "s", suites, [], {})
        assert (tmp_path / "page.html").read_text().count("By the number of tasks") == drawn
