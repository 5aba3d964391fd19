"""Whether a candidate takes over: a pure function of what was measured and of the gates.

Anything missing or undefined holds; nothing is assumed in a candidate's favour.
"""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field

from pipeline.contracts import EvaluationReport, PromotionDecision, TaskResult


class GatesConfig(BaseModel):
    """The gates a candidate must pass."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    beat_base: bool = True
    """Every task not at its ceiling must beat the untrained base with intervals that do not overlap."""
    ceiling_gap: float = Field(default=0.02, ge=0)
    """A base within this of the best attainable (or of 1) leaves a task nothing to gain: it may not get worse."""
    margin: float = Field(default=0.01, ge=0)
    """How much worse than the champion a task's metric may be (non-inferiority)."""
    min_samples: int = Field(default=50, ge=1)
    """Fewest test samples a task."""


def decide(
    candidate: EvaluationReport,
    base: EvaluationReport | None,
    champion: EvaluationReport | None,
    gates: GatesConfig,
) -> PromotionDecision:
    """Decide on a candidate.

    Args:
        candidate: what it scored.
        base: what the untrained model scored on the same samples.
        champion: what the present champion scored on the same samples; None where there is none yet.
        gates: the limits.

    Returns:
        PROMOTE where all gates pass, REJECT where a task is measurably worse, HOLD where evidence is missing.
    """
    holds: list[str] = []
    rejects: list[str] = []
    tasks: dict[str, str] = {}
    for other, what in ((base, "the untrained base"), (champion, "the champion")):
        if other is not None and other.data != candidate.data:
            holds.append(f"{what} was evaluated on another holdout; score both on the same samples")
    if gates.beat_base and base is None:
        holds.append("no evaluation of the untrained base; evaluate it on the same samples")
    for name, result in candidate.tasks.items():
        verdict, why = _judge(name, result, _task(base, name), _task(champion, name), gates)
        tasks[name] = why
        if verdict == "HOLD":
            holds.append(f"{name}: {why}")
        elif verdict == "REJECT":
            rejects.append(f"{name}: {why}")
    passed = f"all {len(tasks)} tasks pass against " + ("the champion and the base" if champion else "the base")
    return PromotionDecision(
        verdict="REJECT" if rejects else "HOLD" if holds else "PROMOTE",
        reasons=tuple(rejects + holds) or (passed,),
        candidate=candidate.model,
        champion=champion.model if champion else None,
        tasks=tasks,
    )


def _task(report: EvaluationReport | None, name: str) -> TaskResult | None:
    return report.tasks.get(name) if report else None


def _judge(
    name: str, result: TaskResult, base: TaskResult | None, champion: TaskResult | None, gates: GatesConfig
) -> tuple[str, str]:
    if result.value is None or result.ci95 is None:
        return "HOLD", f"{result.metric} is undefined: {result.reason}"
    if result.n < gates.min_samples:
        return "HOLD", f"{result.n} test samples, fewer than {gates.min_samples}"
    if champion is not None and champion.value is not None and champion.value - result.value > gates.margin:
        drop = champion.value - result.value
        return "REJECT", f"{result.metric} {drop:.4f} below the champion's {champion.value:.4f}, margin {gates.margin}"
    if gates.beat_base and base is not None:
        if base.value is None or base.ci95 is None:
            return "HOLD", f"the base's {base.metric} is undefined: {base.reason}"
        ceiling = result.best_attainable if result.best_attainable is not None else 1.0
        if result.ci95[0] > base.ci95[1]:
            return "PASS", f"{result.metric} {result.value:.4f} beats the base's {base.value:.4f}, intervals apart"
        if base.value < ceiling - gates.ceiling_gap:
            return "HOLD", f"{result.metric} {result.value:.4f} does not clear the base's {base.value:.4f} and interval"
        return "PASS", f"{result.metric} {result.value:.4f}; the base is at the ceiling with {base.value:.4f}"
    return "PASS", f"{result.metric} {result.value:.4f}"
