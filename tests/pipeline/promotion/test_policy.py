"""The verdict on a candidate, case by case, from real scores through summaries and the paired comparison."""

from __future__ import annotations

import functools
from datetime import UTC, datetime

import pytest

from pipeline.contracts import EvaluationReport, MacroResult, PromotionDecision, TaskResult
from pipeline.evaluation.compare import compare
from pipeline.evaluation.summary import summarize
from pipeline.promotion.entries import Entry
from pipeline.promotion.evidence import Evidence, Finding, Opponent
from pipeline.promotion.gates import GatesConfig
from pipeline.promotion.policy import (
    after,
    champion_already,
    champion_fall,
    decide,
    exports_agree,
    hold_untrained,
    not_deposed,
)
from tests.pipeline.evaluation.simulated import TASKS, scores, specs
from tests.pipeline.promotion.conftest import made_from

DATA = {"manifest_sha256": "a" * 64, "split": "test"}
GATES = GatesConfig(calibration_ratio=(0.8, 1.25), max_ece=0.1, margin=0.01)


def report(frame, model, **data):
    return summarize(frame, specs(), model=model, data={**DATA, **data}, replicates=200)


@functools.cache
def base_report(noise=8.0, one_class=""):
    return report(scores(noise, seed=77, one_class=one_class), "base")


def paired(candidate, reference, name):
    return compare(candidate, reference, specs(), candidate_name="c", reference_name=name, data=DATA, replicates=200)


def base_of(noise=8.0, one_class=""):
    return Opponent("base", base_report(noise, one_class))


def judged(
    candidate, champion=None, gates=GATES, base_noise=8.0, latency_ms=(None, None), champion_tasks=(), one_class=""
):
    opponent = None
    if champion is not None:
        theirs = report(champion, "7").model_copy(update={"latency_ms": latency_ms[1]})
        opponent = Opponent("7", theirs, paired(candidate, champion, "7"), champion_tasks)
    ours = report(candidate, "c").model_copy(update={"latency_ms": latency_ms[0]})
    return decide(ours, Evidence(base_of(base_noise, one_class), opponent), gates)


CHAMPION = {"noise": 0.8, "seed": 1}
WORSE_ON_ONE = {"query_ad": 1.6, "query_keyword": 0.3, "ad_landing_page": 0.3}


@pytest.mark.parametrize(
    ("case", "candidate", "verdict", "words"),
    [
        ("better", {"noise": 0.3, "seed": 2}, "PROMOTE", "macro +0.0"),
        ("equal", {"noise": 0.8, "seed": 2}, "HOLD", "no gain shown"),
        ("the same", CHAMPION, "HOLD", "no gain shown"),
        ("worse", {"noise": 1.6, "seed": 2}, "REJECT", "worse than the champion"),
        ("worse on one task", {"noise": WORSE_ON_ONE, "seed": 2}, "REJECT", "query_ad: worse than the champion"),
        ("overconfident", {"noise": 0.3, "seed": 2, "sharpen": 4.0}, "REJECT", "calibration error"),
    ],
)
def test_candidate_against_champion(case: str, candidate: dict, verdict: str, words: str) -> None:
    decision = judged(scores(**candidate), scores(**CHAMPION))
    assert decision.verdict == verdict, (case, decision.reasons)
    assert words in " | ".join(decision.reasons), case
    assert set(decision.tasks) == set(TASKS)


def test_first_candidate_is_held_to_the_base_alone() -> None:
    assert judged(scores(0.5, seed=1)).verdict == "PROMOTE"
    no_better = judged(scores(8.0, seed=5))
    assert no_better.verdict in ("HOLD", "REJECT")
    assert "against the base's" in no_better.tasks["query_ad"]


def test_a_base_at_the_ceiling_need_not_be_beaten() -> None:
    frame = scores(0.5, seed=1)
    best = {name: result.value for name, result in report(frame, "x").tasks.items()}
    same = summarize(frame, specs(), model="c", data=DATA, best_attainable=best, replicates=200)
    base = Opponent("base", report(frame, "base"), paired(frame, frame, "base"))
    decision = decide(same, Evidence(base), GatesConfig())
    assert decision.verdict == "PROMOTE"
    assert "at the ceiling" in decision.tasks["query_ad"]
    unpaired = decide(same, Evidence(Opponent("base", report(frame, "base"))), GatesConfig())
    assert unpaired.verdict == "HOLD"
    assert "no paired comparison with the untrained base" in unpaired.tasks["query_ad"]


def test_miscalibration_rejects_though_the_order_is_better() -> None:
    shifted = scores(0.3, seed=2)
    shifted["scores"] = [[1 - min(1.0, 1.6 * s[1]), min(1.0, 1.6 * s[1])] for s in shifted["scores"]]
    decision = judged(shifted, scores(**CHAMPION))
    assert decision.verdict == "REJECT"
    assert any("calibration ratio" in r for r in decision.reasons)


def test_one_class_holds_with_the_reason() -> None:
    candidate, champion = (scores(n, seed=s, one_class="query_ad") for n, s in ((0.3, 2), (0.8, 1)))
    decision = judged(candidate, champion, one_class="query_ad")
    assert decision.verdict == "HOLD"
    assert any("query_ad: AUC is undefined: all 900 labels are class 0" in r for r in decision.reasons)


@pytest.mark.parametrize("other", [{"manifest_sha256": "b" * 64}, {"split": "valid"}])
def test_another_holdout_holds_though_every_number_is_better(other: dict) -> None:
    candidate, champion = scores(0.3, seed=2), scores(0.8, seed=1)
    against = paired(candidate, champion, "7")
    for ours, theirs in ((other, {}), ({}, other)):
        opponent = Opponent("7", report(champion, "7", **theirs), against)
        decision = decide(report(candidate, "c", **ours), Evidence(base_of(), opponent), GATES)
        assert decision.verdict == "HOLD"
        assert any("another holdout" in r for r in decision.reasons)


def test_other_samples_of_the_same_manifest_are_another_holdout() -> None:
    base = report(scores(8.0, seed=77, holdout=5), "base")
    decision = decide(report(scores(0.3, seed=2), "c"), Evidence(Opponent("base", base)), GATES)
    assert decision.verdict == "HOLD"
    assert "untrained base was evaluated on another holdout" in decision.reasons[0]


@pytest.mark.parametrize(
    ("gates", "more", "verdict"),
    [
        ({"max_latency_ms": 5.0}, {"latency_ms": (4.0, 9.0)}, "PROMOTE"),
        ({"max_latency_ms": 5.0}, {"latency_ms": (6.0, 4.0)}, "REJECT"),
        ({"max_latency_ms": 5.0}, {"latency_ms": (None, 4.0)}, "HOLD"),
        ({"max_latency_ms": 5.0}, {"latency_ms": (4.0, None)}, "HOLD"),
        ({"max_latency_ms": 5.0}, {}, "HOLD"),
        ({"min_samples": 901}, {}, "HOLD"),
        ({"min_rarer_class": 450}, {}, "HOLD"),
        ({"gain": ("query_ad",)}, {}, "PROMOTE"),
        ({"gain": ("query_ad", "no_such_task")}, {}, "HOLD"),
    ],
)
def test_limits(gates: dict, more: dict, verdict: str) -> None:
    assert judged(scores(0.3, seed=2), scores(**CHAMPION), GatesConfig(**gates), **more).verdict == verdict


def test_an_equal_candidate_passes_where_no_gain_is_asked_and_the_margin_allows() -> None:
    equal = scores(0.8, seed=2)
    assert judged(equal, scores(**CHAMPION), GatesConfig(gain="none", margin=0.05)).verdict == "PROMOTE"
    assert judged(equal, scores(**CHAMPION), GatesConfig(gain="none", margin=0.0001)).verdict == "HOLD"


def test_missing_evidence_holds() -> None:
    candidate, champion = scores(0.3, seed=2), scores(0.8, seed=1)
    base, ours, theirs = base_of(), report(candidate, "c"), report(champion, "7")
    assert decide(ours, Evidence(), GATES).verdict == "HOLD"
    assert "no paired comparison" in " ".join(decide(ours, Evidence(base, Opponent("7", theirs)), GATES).reasons)
    fewer = summarize(candidate[candidate.task != "query_ad"], specs()[1:], model="c", data=DATA)
    decision = decide(fewer, Evidence(base, Opponent("7", theirs, paired(candidate, champion, "7"))), GATES)
    assert decision.verdict == "HOLD"
    assert any("the champion answers task 'query_ad'" in r for r in decision.reasons)


@pytest.mark.parametrize(
    ("answered", "retired", "verdict"),
    [
        (TASKS, (), "PROMOTE"),
        ((*TASKS, "dropped"), (), "HOLD"),
        ((*TASKS, "dropped"), ("dropped",), "PROMOTE"),
        ((*TASKS, "dropped", "other"), ("dropped",), "HOLD"),
    ],
)
def test_a_candidate_that_lost_a_task_of_the_champion_holds(answered: tuple, retired: tuple, verdict: str) -> None:
    gates = GatesConfig(retired=retired)  # the champion was scored on the configured tasks alone
    decision = judged(scores(0.3, seed=2), scores(**CHAMPION), gates, champion_tasks=answered)
    assert decision.verdict == verdict
    lost = set(answered) - set(TASKS) - set(retired)
    assert [name for name in lost if f"the champion answers task {name!r}" in " ".join(decision.reasons)] == list(lost)


DECIDED = PromotionDecision(verdict="PROMOTE", reasons=("better",), candidate="8", champion="7", tasks={"ad": "well"})


@pytest.mark.parametrize(
    ("verdict", "finding", "expected", "reasons"),
    [
        ("PROMOTE", Finding("PASS", ""), "PROMOTE", ("better",)),
        ("PROMOTE", Finding("PASS", "and so"), "PROMOTE", ("better", "and so")),
        ("PROMOTE", Finding("HOLD", "but"), "HOLD", ("but",)),
        ("PROMOTE", Finding("REJECT", "no"), "REJECT", ("no",)),
        ("HOLD", Finding("PASS", "and so"), "HOLD", ("better",)),
        ("HOLD", Finding("REJECT", "no"), "HOLD", ("better",)),
        ("REJECT", Finding("HOLD", "but"), "REJECT", ("better",)),
    ],
)
def test_a_later_gate_takes_a_promotion_back_and_never_makes_one(
    verdict: str, finding: Finding, expected: str, reasons: tuple[str, ...]
) -> None:
    found = after(DECIDED.model_copy(update={"verdict": verdict}), finding)
    assert (found.verdict, found.reasons, found.tasks) == (expected, reasons, {"ad": "well"})


def test_a_deposed_champion_comes_back_by_a_rollback_alone() -> None:
    assert not_deposed(8, None) == Finding("PASS", "")
    moment = datetime(2026, 5, 3, 12, 30, tzinfo=UTC)
    found = not_deposed(8, Entry(5, 4, "rollback", 7, 8, ("clicks fell",), "ann", moment))
    assert found.verdict == "HOLD"
    assert found.words.startswith("version 8 was champion until ann made version 7 champion at 2026-05-03 12:30 UTC")
    assert "rollback --to 8" in found.words


def test_an_export_that_answers_otherwise_rejects() -> None:
    assert exports_agree(None, 16, "ad: 0.2 apart") == Finding("REJECT", "ad: 0.2 apart")
    found = exports_agree(2e-5, 16)
    assert (found.verdict, "2e-05 apart at most" in found.words) == ("PASS", True)


def test_a_champion_is_champion_already_and_what_is_not_trained_holds() -> None:
    found = champion_already("ads", 8)
    assert (found.verdict, found.candidate, found.champion) == ("PROMOTE", "8", "8")
    assert found.reasons == ("version 8 of ads is champion already",)
    held = hold_untrained(["the data drifted"], None)
    assert (held.verdict, held.candidate, held.champion) == ("HOLD", "none trained", None)


@pytest.mark.parametrize(
    ("then", "now", "interval", "held"),
    [
        (0.9, 0.88, (0.85, 0.91), False),
        (0.9, 0.70, (0.65, 0.76), False),  # the interval reaches what the drop allows
        (0.9, 0.70, (0.65, 0.74), True),
        (0.9, None, None, False),  # undefined here: decided where the candidate is judged
        (None, 0.5, (0.4, 0.6), False),  # undefined then
        ("absent", 0.5, (0.4, 0.6), False),  # a task that is new since
        (0.5, 0.9, (0.85, 0.95), False),
    ],
)
def test_a_champion_that_fell_too_far_holds_before_anything_is_trained(
    then: object, now: float | None, interval: tuple[float, float] | None, held: bool
) -> None:
    result = TaskResult(n=100, metric="auc", value=now, ci95=interval)
    well = TaskResult(n=100, metric="auc", value=0.8, ci95=(0.75, 0.85))
    report = EvaluationReport(
        model="7", data={}, tasks={"ad": result, "pick": well}, macro=MacroResult(value=None, ci95=None)
    )
    before = {"pick": 0.8} | ({} if then == "absent" else {"ad": then})
    found = champion_fall(report, made_from(metrics=before), 7, 0.15)
    assert (found is not None) == held
    if found is not None:
        assert (found.verdict, found.candidate, found.champion) == ("HOLD", "none trained", "7")
        assert found.reasons[0].startswith("ad: the champion scored 0.900 when it was promoted and 0.700 [0.650")
        assert found.tasks["pick"] == "as before"
