"""The gates of live traffic."""

from __future__ import annotations

from typing import Any

import pytest

from pipeline.contracts import Comparison, Difference, TaskDifference
from pipeline.promotion.gates import LiveConfig
from pipeline.promotion.live import live_finding


def _difference(low: float, high: float, n: int = 500, **more: Any) -> TaskDifference:
    known: dict[str, Any] = {"candidate": 0.8, "reference": 0.8, "difference": (low + high) / 2, "ci95": (low, high)}
    known |= {
        "standard_error": 0.01,
        "p_value": 0.5,
        "n": n,
        "metric": "auc",
        "verdict": "no difference shown",
        "p_holm": 0.5,
    }
    return TaskDifference(**{**known, **more})


def _comparison(**tasks: TaskDifference) -> Comparison:
    macro = Difference(candidate=None, reference=None, difference=None, ci95=None, standard_error=None, p_value=None)
    return Comparison(candidate="2", reference="1", data={}, tasks=tasks, macro=macro)


@pytest.mark.parametrize(
    ("comparison", "more", "verdict", "words"),
    [
        (None, {}, "HOLD", "clicks: 0 labelled live rows, the gate asks for 200"),
        (_comparison(clicks=_difference(-0.005, 0.02)), {}, "HOLD", "topic: 0 labelled live rows"),
        (_comparison(clicks=_difference(-0.005, 0.02)), {"tasks": ("clicks",)}, "PASS", "no worse than the champion"),
        (_comparison(clicks=_difference(-0.05, 0.02)), {"tasks": ("clicks",)}, "HOLD", "margin 0.01"),
        (_comparison(clicks=_difference(-0.05, 0.02)), {"tasks": ("clicks",), "margin": 0.1}, "PASS", "margin 0.1"),
        (
            _comparison(clicks=_difference(-0.05, -0.02)),
            {},
            "REJECT",
            "worse than the champion on live traffic: clicks",
        ),
        (_comparison(clicks=_difference(0, 0, n=199)), {"tasks": ("clicks",)}, "HOLD", "199 labelled live rows"),
        (
            _comparison(clicks=_difference(0, 0, ci95=None, reason="one class")),
            {"tasks": ("clicks",)},
            "HOLD",
            "undefined: one class",
        ),
    ],
)
def test_live_evidence_can_hold_or_reject_and_missing_evidence_holds(
    comparison: Comparison | None, more: dict[str, Any], verdict: str, words: str
) -> None:
    found = live_finding(comparison, ["clicks", "topic"], LiveConfig(log="log", **more))
    assert found.verdict == verdict and words in found.words
