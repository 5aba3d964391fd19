"""Whether a candidate takes over: a pure function of what was measured and of the gates.

Evidence is the paired comparison on the same fresh samples. Missing or undefined evidence holds, evidence against
rejects, and nothing is assumed in a candidate's favour.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from pipeline.contracts import EvaluationReport, PromotionDecision
from pipeline.errors import did_you_mean
from pipeline.promotion.entries import Entry
from pipeline.promotion.evidence import Evidence, Finding, Opponent, interval_at, pair, percent
from pipeline.promotion.gates import GatesConfig
from pipeline.promotion.provenance import Provenance
from pipeline.promotion.task_gates import task_findings


def decide(candidate: EvaluationReport, evidence: Evidence, gates: GatesConfig) -> PromotionDecision:
    """Decide on a candidate.

    Args:
        candidate: what it scored.
        evidence: what it is held against.
        gates: the limits.

    Returns:
        PROMOTE where all gates pass, REJECT where one finds against the candidate, else HOLD.
    """
    findings = [*_same_holdout(candidate, evidence), *_names(candidate, evidence, gates)]
    for name, result in candidate.tasks.items():
        findings += task_findings(name, result, evidence, gates)
    findings += _lost_tasks(candidate, evidence.champion, gates)
    findings += _gain(evidence, gates)
    findings += _latency(candidate, evidence.champion, gates)
    anchor = evidence.anchor or evidence.champion
    rejects = [f for f in findings if f.verdict == "REJECT"]
    holds = [f for f in findings if f.verdict == "HOLD"]
    passed = [f.words for f in findings if f.verdict == "PASS" and not f.task]
    against = (
        "champion, anchor and base" if evidence.anchor else "champion and base" if evidence.champion else "the base"
    )
    passed.append(f"all {len(candidate.tasks)} tasks pass against {against}")
    return PromotionDecision(
        verdict="REJECT" if rejects else "HOLD" if holds else "PROMOTE",
        reasons=tuple(f"{f.task}: {f.words}" if f.task else f.words for f in rejects + holds) or tuple(passed),
        candidate=candidate.model,
        champion=evidence.champion.name if evidence.champion else None,
        tasks={name: "; ".join(f.words for f in findings if f.task == name) for name in candidate.tasks},
        evidence=evidence.words,
        anchor=anchor.name if anchor else None,
        becomes_anchor=becomes_anchor(candidate, evidence),
    )


def becomes_anchor(candidate: EvaluationReport, evidence: Evidence) -> bool:
    """Whether a candidate, once champion, is what later ones are held against for good.

    It is where there is no anchor yet, where it answers a task that the anchor does not, or where it is no worse on any
    task, shown by each paired interval. Else the anchor stays: a fall that a margin allowed is no new starting point.
    """
    anchor = evidence.anchor or evidence.champion
    if anchor is None or not candidate.tasks.keys() <= anchor.report.tasks.keys():
        return True
    found = [anchor.comparison.tasks.get(name) for name in candidate.tasks] if anchor.comparison else [None]
    return all(d is not None and d.ci95 is not None and interval_at(d, evidence.alpha)[0] >= 0 for d in found)


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


def _same_holdout(candidate: EvaluationReport, evidence: Evidence) -> Iterator[Finding]:
    """Everything that is compared must have been scored on one manifest, split and set of samples a task."""
    ours = candidate.data
    if not ours.get("manifest_sha256"):
        yield Finding("HOLD", "the evaluation must name its data, manifest_sha256 is missing; evaluate again")
    others = (
        (evidence.base, "the untrained base"),
        (evidence.champion, "the champion"),
        (evidence.anchor, "the anchor"),
    )
    for other, what in others:
        if other is None:
            continue
        if not _same_data(ours, other.report.data):
            yield Finding("HOLD", f"{what} was evaluated on another holdout; score both on the same samples")
        if other.comparison is not None and not _same_data(ours, other.comparison.data):
            yield Finding("HOLD", f"the comparison with {what} is of another holdout; score both on the same samples")


def _same_data(ours: dict, theirs: dict) -> bool:
    keys = ("manifest_sha256", "split")
    mine, other = ours.get("keys_sha256") or {}, theirs.get("keys_sha256") or {}
    shared = mine.keys() & other.keys()
    return all(ours.get(k) == theirs.get(k) for k in keys) and all(mine[k] == other[k] for k in shared)


def _names(candidate: EvaluationReport, evidence: Evidence, gates: GatesConfig) -> Iterator[Finding]:
    """A gate for a task that nobody knows guards nothing, and without a task there is nothing to guard."""
    if not candidate.tasks:
        yield Finding("HOLD", "no task was evaluated; configure tasks and evaluate again")
    elif (unknown := gates.unknown_names(candidate.tasks)) is not None:
        yield Finding("HOLD", unknown)
    known = {*evidence.ever_answered, *(evidence.champion.tasks if evidence.champion else ())}
    for name in gates.retired:
        if evidence.ever_answered and name not in known:
            yield Finding(
                "HOLD",
                f"promotion.gates.retired must name tasks that a version answered, got {name!r}"
                f"{did_you_mean(name, known)}; correct the name or leave it out",
            )


def _lost_tasks(candidate: EvaluationReport, champion: Opponent | None, gates: GatesConfig) -> Iterator[Finding]:
    for name in dict.fromkeys((*champion.report.tasks, *champion.tasks)) if champion else ():
        if name not in candidate.tasks and name not in gates.retired:
            yield Finding(
                "HOLD",
                f"the champion answers task {name!r}, the candidate was not evaluated on it; train it too or name it "
                "in promotion.gates.retired",
            )


def _gain(evidence: Evidence, gates: GatesConfig) -> Iterator[Finding]:
    """A gain is shown where the two-sided interval (macro) or the Holm-adjusted p-value (tasks) excludes none."""
    if gates.gain == "none" or evidence.champion is None:
        return
    comparison, alpha = evidence.champion.comparison, evidence.alpha
    if comparison is None:
        yield Finding("HOLD", "no paired comparison with the champion; compare both on the same samples")
        return
    if gates.gain == "macro":
        macro = comparison.macro
        if macro.difference is None or macro.ci95 is None:
            yield Finding("HOLD", f"the macro difference is undefined: {macro.reason}")
            return
        low, high = interval_at(macro, alpha)
        words = f"macro {macro.difference:+.4f} against the champion, {percent(alpha)} interval {pair((low, high))}"
        yield Finding(
            "PASS" if low > 0 else "REJECT" if high < 0 else "HOLD", words if low > 0 else f"no gain shown: {words}"
        )
        return
    for name in gates.gain:
        found = comparison.tasks.get(name)
        if found is None or found.p_holm is None or found.difference is None:
            yield Finding("HOLD", f"a gain is asked of task {name!r}, whose difference is missing or undefined")
            continue
        words = f"{name}: {found.difference:+.4f}, adjusted p = {found.p_holm:.3g}, level {alpha:.3g}"
        if found.p_holm > alpha or found.difference == 0:
            yield Finding("HOLD", f"no gain shown on {words}")
        else:
            yield Finding(
                "PASS" if found.difference > 0 else "REJECT",
                words if found.difference > 0 else f"no gain shown on {words}",
            )


def _latency(candidate: EvaluationReport, opponent: Opponent | None, gates: GatesConfig) -> Iterator[Finding]:
    champion = opponent.report if opponent else None
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
