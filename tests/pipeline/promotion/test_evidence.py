"""A decision remembers: the anchor that small falls are measured from, and how often a holdout was looked at."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from pipeline.contracts import Difference
from pipeline.evaluation.compare import compare
from pipeline.evaluation.summary import summarize
from pipeline.promotion.evidence import ALPHA, ANCHOR_ALPHA, Evidence, Opponent, interval_at
from pipeline.promotion.gates import GatesConfig
from pipeline.promotion.policy import decide
from tests.pipeline.evaluation.simulated import TASKS, scores, specs

DATA = {"manifest_sha256": "a" * 64, "split": "test"}
WEEKLY = GatesConfig(beat_base=False, gain="none", margin=0.02)


def report(frame, model="c", **more):
    return summarize(frame, specs(), model=model, data=DATA, replicates=40, **more)


def opponent(name: str, frame, candidate) -> Opponent:
    found = compare(candidate, frame, specs(), candidate_name="c", reference_name=name, data=DATA, replicates=40)
    return Opponent(name, report(frame, name), found)


def test_a_fall_that_each_week_allowed_is_held_by_the_anchor_once_it_has_added_up() -> None:
    first, now, candidate = (scores({**dict.fromkeys(TASKS, 0.6), "query_ad": n}, seed=1) for n in (0.6, 0.9, 1.1))
    champion, anchor = (opponent(name, frame, candidate) for name, frame in (("9", now), ("3", first)))
    assert decide(report(candidate), Evidence(champion=champion), WEEKLY).verdict == "PROMOTE"
    decision = decide(report(candidate), Evidence(champion=champion, anchor=anchor), WEEKLY)
    assert decision.verdict == "REJECT"
    assert decision.reasons[0].startswith("query_ad: worse than version 3, the anchor: -0.0")
    assert "99 % interval" in decision.reasons[0]
    assert "cumulative margin 0.02" in decision.reasons[0]
    assert (decision.anchor, decision.becomes_anchor) == ("3", False)
    assert decision.evidence[:2] == ("champion: version 9", "anchor: version 3, the best earlier champion")
    wide = WEEKLY.model_copy(update={"cumulative_margin": 0.2})
    assert decide(report(candidate), Evidence(champion=champion, anchor=anchor), wide).verdict == "PROMOTE"


def test_the_anchor_moves_on_only_where_every_task_is_shown_to_be_no_worse() -> None:
    old = scores(0.9, seed=1)
    better, mixed = scores(0.3, seed=1), scores({**dict.fromkeys(TASKS, 0.3), "query_ad": 0.9}, seed=2)
    for frame, follows in ((better, True), (mixed, False)):
        decision = decide(report(frame), Evidence(champion=opponent("3", old, frame)), WEEKLY)
        assert (decision.anchor, decision.becomes_anchor) == ("3", follows)
    fewer = report(old[old.task != "query_ad"])
    fewer = fewer.model_copy(update={"tasks": {k: r for k, r in fewer.tasks.items() if k != "query_ad"}})
    unknowing = Opponent("3", fewer, opponent("3", old, mixed).comparison)
    assert decide(report(mixed), Evidence(champion=unknowing), WEEKLY).becomes_anchor  # it alone answers a new task
    assert decide(report(mixed), Evidence(), WEEKLY).becomes_anchor


def test_an_anchor_without_a_comparison_holds() -> None:
    frame = scores(0.5, seed=1)
    evidence = Evidence(champion=opponent("9", frame, frame), anchor=Opponent("3", report(frame, "3")))
    decision = decide(report(frame), evidence, WEEKLY)
    assert decision.verdict == "HOLD"
    assert "no paired comparison with version 3, the anchor" in decision.reasons[0]


def test_each_look_at_a_holdout_must_be_surer_than_the_one_before() -> None:
    candidate, champion = scores(0.57, seed=2), scores(0.8, seed=1)
    gates = GatesConfig(beat_base=False, margin=0.1)
    verdicts = []
    for looks in (0, 1, 400):
        evidence = Evidence(champion=opponent("9", champion, candidate), looks=looks)
        decision = decide(report(candidate), evidence, gates)
        verdicts.append(decision.verdict)
        assert decision.evidence[-1].startswith(f"look {looks + 1} at this holdout, intervals of ")
        assert evidence.words[-1].split("of ")[1] in " ".join(decision.reasons)
    assert verdicts == ["PROMOTE", "PROMOTE", "HOLD"]


def test_all_looks_together_call_better_no_oftener_than_one_level_allows() -> None:
    spent = [Evidence(looks=looks).alpha / 2 for looks in range(100_000)]  # to the side of better
    assert spent[0] == ALPHA / 2
    assert all(after <= before for before, after in itertools.pairwise(spent))
    assert math.fsum(spent) <= ALPHA


@given(st.floats(-0.5, 0.5), st.floats(0.001, 0.2), st.floats(0.001, 0.2), st.sampled_from([None, 9.0, 60.0]))
def test_a_surer_interval_holds_a_less_sure_one(d: float, below: float, above: float, free: float | None) -> None:
    found = Difference(
        candidate=d,
        reference=0.0,
        difference=d,
        ci95=(d - below, d + above),
        standard_error=below / 2,
        p_value=0.5,
        degrees_of_freedom=free,
    )
    assert interval_at(found, ALPHA) == pytest.approx(found.ci95)
    narrow, wide = interval_at(found, 0.1), interval_at(found, ANCHOR_ALPHA)
    assert wide[0] < found.ci95[0] < narrow[0] < d < narrow[1] < found.ci95[1] < wide[1]
    assert (d - wide[0]) / below == pytest.approx((wide[1] - d) / above)


def test_an_interval_without_a_difference_is_refused() -> None:
    known = dict.fromkeys(("candidate", "reference", "difference", "standard_error", "p_value"))
    assert Difference(**known, ci95=None).difference is None
    with pytest.raises(ValueError, match="an interval must be that of a difference"):
        Difference(**known, ci95=(-0.1, 0.1))


def near_the_top(noise: float, num: int) -> pd.DataFrame:
    rng = np.random.default_rng(3)
    parts = []
    for name in TASKS:
        labels = (np.arange(num) % 2).astype(float)
        p = 1 / (1 + np.exp(-(4 * (2 * labels - 1) + noise * rng.normal(size=num))))
        rows = {"key": [f"{i:05d}" for i in range(num)], "task": name, "label": labels}
        parts.append(pd.DataFrame({**rows, "scores": list(np.stack([1 - p, p], axis=1)), "group": None}))
    return pd.concat(parts, ignore_index=True)


@pytest.mark.parametrize(
    ("num", "noise", "verdict"), [(60, 3.8, "REJECT"), (2000, 3.8, "REJECT"), (2000, 2.4, "PROMOTE")]
)
def test_a_candidate_at_the_ceiling_must_be_paired_with_the_base(num: int, noise: float, verdict: str) -> None:
    base, candidate = near_the_top(2.4, num), near_the_top(noise, num)
    evidence = Evidence(base=opponent("base", base, candidate))
    decision = decide(report(candidate), evidence, GatesConfig())
    assert decision.verdict == verdict, decision.reasons


def test_calibration_must_lie_within_the_limits_with_its_whole_interval() -> None:
    few, many = (scores(0.3, seed=2, num=num) for num in (120, 6000))
    gates = GatesConfig(beat_base=False, gain="none", calibration_ratio=(0.9, 1.1))
    unsure = decide(report(few), Evidence(), gates)
    assert unsure.verdict == "HOLD"
    assert all("calibration ratio" in reason for reason in unsure.reasons)
    assert decide(report(many), Evidence(), gates).verdict == "PROMOTE"


def test_no_task_holds() -> None:
    nothing = report(scores(0.5, seed=1)).model_copy(update={"tasks": {}})
    decision = decide(nothing, Evidence(), WEEKLY)
    assert (decision.verdict, decision.reasons) == (
        "HOLD",
        ("no task was evaluated; configure tasks and evaluate again",),
    )


@pytest.mark.parametrize(
    ("gates", "words"),
    [
        (
            {"margins": {"query_adz": 0.1}},
            "margins must name configured tasks, got 'query_adz'; did you mean 'query_ad'",
        ),
        ({"gain": ("nobody",)}, "gain must name configured tasks, got 'nobody'"),
        ({"retired": ("query_ad",)}, "retired must name tasks that ended, got ['query_ad'], which are configured"),
        ({"retired": ("gone_ad",)}, "retired must name tasks that a version answered, got 'gone_ad'"),
    ],
)
def test_names_that_no_task_bears_hold(gates: dict, words: str) -> None:
    frame = scores(0.5, seed=1)
    evidence = Evidence(champion=opponent("9", frame, frame), ever_answered=(*TASKS, "gone"))
    decision = decide(report(frame), evidence, GatesConfig(beat_base=False, **gates))
    assert decision.verdict == "HOLD"
    assert any(words in reason for reason in decision.reasons), decision.reasons


@pytest.mark.parametrize("gates", [{"retired": ("gone",)}, {"margins": {"gone": 0.1}, "retired": ("gone",)}])
def test_names_of_tasks_that_ended_may_stay(gates: dict) -> None:
    frame = scores(0.5, seed=1)
    evidence = Evidence(champion=opponent("9", frame, frame), ever_answered=(*TASKS, "gone"))
    assert decide(report(frame), evidence, GatesConfig(beat_base=False, gain="none", **gates)).verdict == "PROMOTE"


@pytest.mark.parametrize(
    "gates",
    [
        {"margin": math.inf},
        {"margin": -0.1},
        {"margins": {"query_ad": math.inf}},
        {"margins": {"query_ad": -0.01}},
        {"margins": {"query_ad": math.nan}},
        {"cumulative_margin": math.inf},
        {"ceiling_gap": math.inf},
        {"calibration_ratio": (1.25, 0.8)},
        {"calibration_ratio": (0.8, math.inf)},
        {"min_rarer_class": 0},
    ],
)
def test_gates_that_hold_nothing_are_refused(gates: dict) -> None:
    with pytest.raises(ValidationError):
        GatesConfig(**gates)


def test_a_margin_of_one_allows_any_fall_and_needs_no_interval() -> None:
    few = scores(0.5, seed=1, num=12)
    gates = GatesConfig(beat_base=False, gain="none", margin=1.0, min_samples=1, min_rarer_class=1)
    evidence = Evidence(champion=opponent("9", scores(0.5, seed=2, num=12), few))
    assert decide(report(few), evidence, gates).verdict == "PROMOTE"
    asked = decide(report(few), evidence, gates.model_copy(update={"min_rarer_class": 10}))
    assert asked.verdict == "HOLD"
    assert "of the rarer class among 12 test samples, the gate asks for 10" in asked.reasons[0]
