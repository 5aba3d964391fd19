"""Whether a candidate takes over: a pure function of what was measured and of the gates.

Evidence is the paired comparison on the same fresh samples. Missing or undefined evidence holds, evidence against
rejects, and nothing is assumed in a candidate's favour.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from pipeline.contracts import Comparison, EvaluationReport, PromotionDecision, TaskDifference, TaskResult

Verdict = Literal["PASS", "HOLD", "REJECT"]


class GatesConfig(BaseModel):
    """The gates a candidate must pass."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    beat_base: bool = True
    """Every task not at its ceiling must beat the untrained base with intervals that do not overlap."""
    ceiling_gap: float = Field(default=0.02, ge=0)
    """A base within this of the best attainable (or of 1) leaves a task nothing to gain: it may not get worse."""
    margin: float = Field(default=0.01, ge=0)
    """How much worse than the champion a task's metric may be: the paired interval must lie above its negative."""
    margins: dict[str, float] = Field(default_factory=dict)
    """Margins of single tasks, where they differ."""
    gain: Literal["macro", "none"] | tuple[str, ...] = "macro"
    """What must be better than the champion: the macro mean, each task named, or nothing (non-inferiority alone)."""
    retired: tuple[str, ...] = ()
    """Tasks that ended: the champion answers them still, a candidate need not."""
    min_samples: int = Field(default=50, ge=1)
    """Fewest test samples a task."""
    calibration_ratio: tuple[float, float] | None = None
    """Limits of expected over observed positives of each binary task, for example [0.8, 1.25]."""
    max_ece: float | None = Field(default=None, gt=0, le=1)
    """Largest expected calibration error a task."""
    max_latency_ms: float | None = Field(default=None, gt=0)
    """Largest median time to answer one row, in milliseconds."""


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
) -> PromotionDecision:
    """Decide on a candidate.

    Args:
        candidate: what it scored.
        base: what the untrained model scored on the same samples.
        champion: what the present champion scored on the same samples; None where there is none yet.
        gates: the limits.
        against_champion: the paired comparison of candidate and champion.

    Returns:
        PROMOTE where all gates pass, REJECT where one finds against the candidate, else HOLD.
    """
    findings = list(_same_holdout(candidate, base, champion, against_champion))
    for name, result in candidate.tasks.items():
        findings += _task_findings(name, result, base, champion, against_champion, gates)
    findings += _missing_tasks(candidate, champion, gates)
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


def _missing_tasks(
    candidate: EvaluationReport, champion: EvaluationReport | None, gates: GatesConfig
) -> Iterator[Finding]:
    for name in champion.tasks if champion else ():
        if name not in candidate.tasks and name not in gates.retired:
            yield Finding("HOLD", f"the champion answers task {name!r}, the candidate was not evaluated on it")


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
