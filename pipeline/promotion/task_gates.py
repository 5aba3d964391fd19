"""What the gates find on one task: its own numbers, the champion's, the anchor's, the untrained base's."""

from __future__ import annotations

from collections.abc import Iterator

from pipeline.contracts import TaskResult
from pipeline.generation import TEXT_METRICS
from pipeline.promotion.evidence import ALPHA, ANCHOR_ALPHA, Evidence, Finding, Opponent, interval_at, pair, percent
from pipeline.promotion.gates import GatesConfig

ANY_FALL = 1.0
"""A margin from which on every fall is allowed: metrics lie between 0 and 1."""


def task_findings(name: str, result: TaskResult, evidence: Evidence, gates: GatesConfig) -> Iterator[Finding]:
    """Hold one task to every gate that is for single tasks."""
    if result.value is None:
        yield Finding("HOLD", f"{_title(result)} is undefined: {result.reason}", name)
        return
    yield from _counts(name, result, gates)
    champion, anchor = evidence.champion, evidence.anchor
    if champion is not None and name in champion.report.tasks:
        yield _not_worse(name, champion, "the champion", gates.margin_of(name), evidence.alpha)
    if anchor is not None and name in anchor.report.tasks:
        alpha = ANCHOR_ALPHA * evidence.alpha / ALPHA
        words = f"version {anchor.name}, the anchor"
        yield _not_worse(name, anchor, words, gates.cumulative_margin_of(name), alpha, "cumulative margin")
    if gates.beat_base:
        yield _beats_base(name, result, evidence, gates)
    yield from _calibration(name, result, gates)


def _counts(name: str, result: TaskResult, gates: GatesConfig) -> Iterator[Finding]:
    if result.n < gates.min_samples:
        yield Finding("HOLD", f"{result.n} test samples, the gate asks for {gates.min_samples}", name)
    few, least = result.rarer_class, gates.min_rarer_class
    if few is None:
        return
    words = f"{few} of the rarer class among {result.n} test samples"
    yield Finding("PASS", words, name) if few >= least else Finding("HOLD", f"{words}, the gate asks for {least}", name)


def _not_worse(
    name: str, other: Opponent, who: str, margin: float, alpha: float, margin_words: str = "margin"
) -> Finding:
    """Non-inferiority: the whole paired interval lies above minus the margin. Each task is held to it at the full
    level, since all of them must pass."""
    if margin >= ANY_FALL:
        return Finding("PASS", f"any fall against {who} is allowed, {margin_words} {margin:g}", name)
    found = other.comparison.tasks.get(name) if other.comparison else None
    if found is None:
        return Finding("HOLD", f"no paired comparison with {who}; compare both on the same samples", name)
    if found.difference is None or found.ci95 is None:
        return Finding("HOLD", f"the difference to {who} is undefined: {found.reason}", name)
    interval = interval_at(found, alpha)
    words = (
        f"{found.difference:+.4f} against {who}, {percent(alpha)} interval {pair(interval)}, {margin_words} {margin:g}"
    )
    if interval[0] >= -margin:
        return Finding("PASS", words, name)
    if interval[1] < 0:
        return Finding("REJECT", f"worse than {who}: {words}", name)
    return Finding("HOLD", f"may be worse than {who} by more than the {margin_words}: {words}", name)


def _beats_base(name: str, result: TaskResult, evidence: Evidence, gates: GatesConfig) -> Finding:
    base = evidence.base.report.tasks.get(name) if evidence.base else None
    if evidence.base is None or base is None:
        return Finding("HOLD", "no evaluation of the untrained base; evaluate it on the same samples", name)
    if base.value is None or result.value is None:
        return Finding("HOLD", f"the base's {_title(base)} is undefined: {base.reason}", name)
    against = f"{_title(result)} {result.value:.4f} against the base's {base.value:.4f}"
    ceiling = result.best_attainable if result.best_attainable is not None else 1.0
    if base.value >= ceiling - gates.ceiling_gap and not _apart(result, base):
        found = _not_worse(name, evidence.base, "the untrained base", gates.margin_of(name), evidence.alpha)
        return Finding(found.verdict, f"{against}, at the ceiling of {ceiling:.4f}: {found.words}", name)
    if base.ci95 is None or result.ci95 is None:
        return Finding("HOLD", f"{against}, without an interval: {result.reason or base.reason}", name)
    if result.ci95[0] > base.ci95[1]:
        return Finding("PASS", f"{against}, intervals apart", name)
    if result.ci95[1] < base.ci95[0]:
        return Finding("REJECT", f"worse than the untrained base: {against}, intervals apart", name)
    return Finding("HOLD", f"{against}, intervals overlap; train longer or score more samples", name)


def _apart(one: TaskResult, other: TaskResult) -> bool:
    if one.ci95 is None or other.ci95 is None:
        return False
    return one.ci95[0] > other.ci95[1] or one.ci95[1] < other.ci95[0]


def _calibration(name: str, result: TaskResult, gates: GatesConfig) -> Iterator[Finding]:
    limits = gates.calibration_ratio
    if limits is not None and "calibration_ratio" in result.more:
        value, interval = result.more["calibration_ratio"], result.intervals.get("calibration_ratio")
        if value is None or interval is None:
            yield Finding("HOLD", "the calibration ratio is undefined", name)
        else:
            words = f"calibration ratio {value:.3f}, 95 % interval {pair(interval)}, limits {pair(limits)}"
            within = limits[0] <= interval[0] and interval[1] <= limits[1]
            apart = interval[1] < limits[0] or interval[0] > limits[1]
            yield Finding("PASS" if within else "REJECT" if apart else "HOLD", words, name)
    # What is written has no probabilities, of which alone this gate asks.
    if gates.max_ece is not None and result.metric not in TEXT_METRICS and "answered" not in result.more:
        if result.ece is None:
            yield Finding("HOLD", "the calibration error is undefined", name)
        else:
            words = f"calibration error {result.ece:.4f}, limit {gates.max_ece:g}"
            yield Finding("PASS" if result.ece <= gates.max_ece else "REJECT", words, name)


def _title(result: TaskResult) -> str:
    metric: str = result.metric
    named = {"auc": "AUC", "macro_f1": "macro-F1", "f1": "F1", "token_f1": "token F1", "bleu": "BLEU", "chrf": "chrF"}
    return named.get(metric, metric)
