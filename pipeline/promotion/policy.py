"""Whether a candidate takes over: a pure function of what was measured and of the gates.

Evidence is the paired comparison on the same fresh samples. Missing or undefined evidence holds, evidence against
rejects, and nothing is assumed in a candidate's favour.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

from pipeline.contracts import Comparison, EvaluationReport, PromotionDecision, TaskDifference, TaskResult
from pipeline.promotion.entries import Entry
from pipeline.promotion.gates import GatesConfig
from pipeline.promotion.provenance import Provenance

Verdict = Literal["PASS", "HOLD", "REJECT"]


@dataclass(frozen=True)
class Finding:
    """What one gate found.

    Args:
        verdict: PASS, HOLD where evidence is missing, REJECT where it speaks against the candidate.
        words: the finding with its numbers.
        task: the task judged; empty for the whole model.
    """

    verdict: Verdict
    words: str
    task: str = ""


def decide(
    candidate: EvaluationReport,
    base: EvaluationReport | None,
    champion: EvaluationReport | None,
    gates: GatesConfig,
    *,
    against_champion: Comparison | None = None,
    champion_tasks: Collection[str] = (),
) -> PromotionDecision:
    """Decide on a candidate.

    Args:
        candidate: what it scored.
        base: what the untrained model scored on the same samples.
        champion: what the present champion scored on the same samples; None where there is none yet.
        gates: the limits.
        against_champion: the paired comparison of candidate and champion.
        champion_tasks: every task that the champion's version answers, also those it was not scored on here.

    Returns:
        PROMOTE where all gates pass, REJECT where one finds against the candidate, else HOLD.
    """
    findings = list(_same_holdout(candidate, base, champion, against_champion))
    for name, result in candidate.tasks.items():
        findings += _task_findings(name, result, base, champion, against_champion, gates)
    findings += _lost_tasks(candidate, [*(champion.tasks if champion else ()), *champion_tasks], gates)
    findings += _gain(against_champion, gates) if champion is not None else ()
    findings += _latency(candidate, champion, gates)
    rejects = [f for f in findings if f.verdict == "REJECT"]
    holds = [f for f in findings if f.verdict == "HOLD"]
    passed = [f.words for f in findings if f.verdict == "PASS" and not f.task]
    count = len(candidate.tasks)
    passed.append(f"all {count} tasks pass" + (" against champion and base" if champion else " against the base"))
    return PromotionDecision(
        verdict="REJECT" if rejects else "HOLD" if holds else "PROMOTE",
        reasons=tuple(f"{f.task}: {f.words}" if f.task else f.words for f in rejects + holds) or tuple(passed),
        candidate=candidate.model,
        champion=champion.model if champion else None,
        tasks={name: "; ".join(f.words for f in findings if f.task == name) for name in candidate.tasks},
    )


def after(decision: PromotionDecision, finding: Finding) -> PromotionDecision:
    """Return a decision after one more gate: it can take a promotion back, and never makes one."""
    if decision.verdict != "PROMOTE":
        return decision
    if finding.verdict == "PASS":
        return decision.model_copy(update={"reasons": (*decision.reasons, finding.words)} if finding.words else {})
    return decision.model_copy(update={"verdict": finding.verdict, "reasons": (finding.words,)})


def not_deposed(candidate: int, deposed: Entry | None) -> Finding:
    """A version that was champion and was replaced comes back by a rollback alone, however well it scores.

    Args:
        candidate: number of the version.
        deposed: the ledger's entry that ended its last time as champion; None where it never was.
    """
    if deposed is None:
        return Finding("PASS", "")
    return Finding(
        "HOLD",
        f"version {candidate} was champion until {deposed.who} made version {deposed.version} champion at "
        f"{deposed.time:%Y-%m-%d %H:%M} UTC; to bring it back: mtl-lora rollback --to {candidate}",
    )


def exports_agree(apart: float | None, samples: int, refusal: str = "") -> Finding:
    """Each exported task must answer as the adapter does.

    Args:
        apart: largest difference in log-probability; None where one was beyond the tolerance.
        samples: on how many samples they were compared.
        refusal: which task was beyond it, in words.
    """
    if apart is None:
        return Finding("REJECT", refusal)
    words = f"exports answer as the adapter does, {apart:.1g} apart at most in log-probability on {samples} samples"
    return Finding("PASS", words)


def champion_already(model: str, version: int) -> PromotionDecision:
    """Return the decision on a candidate that is the champion: the same training came to the same weights."""
    words = f"version {version} of {model} is champion already"
    return PromotionDecision(
        verdict="PROMOTE", reasons=(words,), candidate=str(version), champion=str(version), tasks={}
    )


def hold_untrained(
    reasons: Iterable[str], champion: int | None, tasks: dict[str, str] | None = None
) -> PromotionDecision:
    """Return the decision to hold before anything is trained, since the data or the champion speaks against it."""
    return PromotionDecision(
        verdict="HOLD",
        reasons=tuple(reasons),
        candidate="none trained",
        champion=None if champion is None else str(champion),
        tasks=tasks or {},
    )


def champion_fall(now: EvaluationReport, then: Provenance, version: int, max_drop: float) -> PromotionDecision | None:
    """Hold where the champion fell too far: a candidate trained on changed labels or data would win on them too.

    Args:
        now: what the champion scores on the newest days.
        then: its provenance, with what it scored when it was registered.
        version: its number.
        max_drop: how far a task's metric may lie below that: its whole 95 % interval must not lie lower.

    Returns:
        The decision to hold, None where all is well.
    """
    fallen = {}
    for name, result in now.tasks.items():
        before = then.metrics.get(name)
        if before is not None and result.ci95 is not None and result.ci95[1] < before - max_drop:
            fallen[name] = (
                f"the champion scored {before:.3f} when it was promoted and {result.value:.3f} "
                f"[{result.ci95[0]:.3f}, {result.ci95[1]:.3f}] on the newest days, a fall of more than {max_drop:g}: "
                "its labels or data have changed"
            )
    if not fallen:
        return None
    reasons = (f"{name}: {words}" for name, words in fallen.items())
    return hold_untrained(reasons, version, {name: fallen.get(name, "as before") for name in now.tasks})


def _same_holdout(
    candidate: EvaluationReport,
    base: EvaluationReport | None,
    champion: EvaluationReport | None,
    comparison: Comparison | None,
) -> Iterator[Finding]:
    """Everything that is compared must have been scored on one manifest, split and set of samples a task."""
    ours = candidate.data
    if not ours.get("manifest_sha256"):
        yield Finding("HOLD", "the evaluation must name its data, manifest_sha256 is missing; evaluate again")
    others = ((base, "the untrained base"), (champion, "the champion"), (comparison, "the comparison"))
    for other, what in others:
        if other is not None and not _same_data(ours, other.data):
            yield Finding("HOLD", f"{what} was evaluated on another holdout; score both on the same samples")


def _same_data(ours: dict, theirs: dict) -> bool:
    keys = ("manifest_sha256", "split")
    mine, other = ours.get("keys_sha256") or {}, theirs.get("keys_sha256") or {}
    shared = mine.keys() & other.keys()
    return all(ours.get(k) == theirs.get(k) for k in keys) and all(mine[k] == other[k] for k in shared)


def _task_findings(
    name: str,
    result: TaskResult,
    base: EvaluationReport | None,
    champion: EvaluationReport | None,
    comparison: Comparison | None,
    gates: GatesConfig,
) -> Iterator[Finding]:
    if result.value is None or result.ci95 is None:
        yield Finding("HOLD", f"{_title(result)} is undefined: {result.reason}", name)
        return
    if result.n < gates.min_samples:
        yield Finding("HOLD", f"{result.n} test samples, the gate asks for {gates.min_samples}", name)
    if champion is not None and name in champion.tasks:
        yield _not_worse(name, comparison.tasks.get(name) if comparison else None, gates)
    if gates.beat_base:
        yield _beats_base(name, result, base.tasks.get(name) if base else None, gates)
    yield from _calibration(name, result, gates)


def _not_worse(name: str, found: TaskDifference | None, gates: GatesConfig) -> Finding:
    """Non-inferiority: the whole paired interval lies above minus the margin. Each task is held to it at the full
    level, since all of them must pass."""
    if found is None:
        return Finding("HOLD", "no paired comparison with the champion; compare both on the same samples", name)
    if found.difference is None or found.ci95 is None:
        return Finding("HOLD", f"the difference to the champion is undefined: {found.reason}", name)
    margin = gates.margins.get(name, gates.margin)
    words = f"{found.difference:+.4f} against the champion, 95 % interval {_pair(found.ci95)}, margin {margin:g}"
    if found.ci95[0] >= -margin:
        return Finding("PASS", words, name)
    if found.ci95[1] < 0:
        return Finding("REJECT", f"worse than the champion: {words}", name)
    return Finding("HOLD", f"may be worse than the champion by more than the margin: {words}", name)


def _beats_base(name: str, result: TaskResult, base: TaskResult | None, gates: GatesConfig) -> Finding:
    if base is None:
        return Finding("HOLD", "no evaluation of the untrained base; evaluate it on the same samples", name)
    if base.value is None or base.ci95 is None or result.value is None or result.ci95 is None:
        return Finding("HOLD", f"the base's {_title(base)} is undefined: {base.reason}", name)
    against = f"{_title(result)} {result.value:.4f} against the base's {base.value:.4f}"
    if result.ci95[0] > base.ci95[1]:
        return Finding("PASS", f"{against}, intervals apart", name)
    if result.ci95[1] < base.ci95[0]:
        return Finding("REJECT", f"worse than the untrained base: {against}, intervals apart", name)
    ceiling = result.best_attainable if result.best_attainable is not None else 1.0
    if base.value >= ceiling - gates.ceiling_gap:
        return Finding("PASS", f"{against}, which is at the ceiling of {ceiling:.4f}", name)
    return Finding("HOLD", f"{against}, intervals overlap; train longer or score more samples", name)


def _calibration(name: str, result: TaskResult, gates: GatesConfig) -> Iterator[Finding]:
    limits = gates.calibration_ratio
    if limits is not None and "calibration_ratio" in result.more:
        value, interval = result.more["calibration_ratio"], result.intervals.get("calibration_ratio")
        if value is None or interval is None:
            yield Finding("HOLD", "the calibration ratio is undefined", name)
        else:
            words = f"calibration ratio {value:.3f}, 95 % interval {_pair(interval)}, limits {_pair(limits)}"
            apart = interval[1] < limits[0] or interval[0] > limits[1]
            yield Finding("PASS" if limits[0] <= value <= limits[1] else "REJECT" if apart else "HOLD", words, name)
    if gates.max_ece is not None:
        if result.ece is None:
            yield Finding("HOLD", "the calibration error is undefined", name)
        else:
            words = f"calibration error {result.ece:.4f}, limit {gates.max_ece:g}"
            yield Finding("PASS" if result.ece <= gates.max_ece else "REJECT", words, name)


def _lost_tasks(candidate: EvaluationReport, answered: Iterable[str], gates: GatesConfig) -> Iterator[Finding]:
    for name in dict.fromkeys(answered):
        if name not in candidate.tasks and name not in gates.retired:
            yield Finding(
                "HOLD",
                f"the champion answers task {name!r}, the candidate was not evaluated on it; train it too or name it "
                "in promotion.gates.retired",
            )


def _gain(comparison: Comparison | None, gates: GatesConfig) -> Iterator[Finding]:
    """A gain is shown where the two-sided 95 % interval (macro) or the Holm-adjusted p-value (tasks) excludes none."""
    if gates.gain == "none":
        return
    if comparison is None:
        yield Finding("HOLD", "no paired comparison with the champion; compare both on the same samples")
        return
    if gates.gain == "macro":
        macro = comparison.macro
        if macro.difference is None or macro.ci95 is None:
            yield Finding("HOLD", f"the macro difference is undefined: {macro.reason}")
            return
        words = f"macro {macro.difference:+.4f} against the champion, 95 % interval {_pair(macro.ci95)}"
        shown, lost = macro.ci95[0] > 0, macro.ci95[1] < 0
        yield Finding("PASS" if shown else "REJECT" if lost else "HOLD", words if shown else f"no gain shown: {words}")
        return
    for name in gates.gain:
        found = comparison.tasks.get(name)
        if found is None or found.p_holm is None:
            yield Finding("HOLD", f"a gain is asked of task {name!r}, whose difference is missing or undefined")
        elif found.verdict != "better":
            verdict: Verdict = "REJECT" if found.verdict == "worse" else "HOLD"
            yield Finding(verdict, f"no gain shown on {name}: {found.difference:+.4f}, adjusted p = {found.p_holm:.3g}")
        else:
            yield Finding("PASS", f"{name} {found.difference:+.4f}, adjusted p = {found.p_holm:.3g}")


def _latency(candidate: EvaluationReport, champion: EvaluationReport | None, gates: GatesConfig) -> Iterator[Finding]:
    if gates.max_latency_ms is None:
        return
    for report, whose in ((candidate, "the candidate's"), (champion, "the champion's")):
        if report is not None and report.latency_ms is None:
            yield Finding("HOLD", f"{whose} latency was not measured, the gate allows {gates.max_latency_ms:g} ms")
    if candidate.latency_ms is None:
        return
    against = f", the champion's {champion.latency_ms:.1f} ms" if champion and champion.latency_ms is not None else ""
    words = f"{candidate.latency_ms:.1f} ms a row{against}, limit {gates.max_latency_ms:g} ms"
    yield Finding("PASS" if candidate.latency_ms <= gates.max_latency_ms else "REJECT", words)


def _title(result: TaskResult) -> str:
    return {"auc": "AUC", "macro_f1": "macro-F1", "f1": "F1"}.get(result.metric, result.metric)


def _pair(interval: tuple[float, float]) -> str:
    return f"{interval[0]:.4g} to {interval[1]:.4g}"
