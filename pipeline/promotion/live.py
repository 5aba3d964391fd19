"""What the gates find in live traffic: the candidate against the champion on labelled rows that both have scored."""

from __future__ import annotations

from collections.abc import Collection

from pipeline.contracts import Comparison
from pipeline.promotion.evidence import Finding, pair
from pipeline.promotion.gates import LiveConfig


def live_finding(comparison: Comparison | None, tasks: Collection[str], config: LiveConfig) -> Finding:
    """Hold a candidate to the gates of live traffic.

    Args:
        comparison: paired, candidate less champion; None where both have scored no labelled row.
        tasks: that the candidate answers.
        config: the limits.

    Returns:
        PASS where no task may be worse by more than the margin, REJECT where one is, else HOLD.
    """
    wanted = config.tasks or tuple(tasks)
    holds: list[str] = []
    rejects: list[str] = []
    passed: list[str] = []
    for name in wanted:
        found = comparison.tasks.get(name) if comparison is not None else None
        if found is None or found.n < config.min_samples:
            holds.append(
                f"{name}: {found.n if found else 0} labelled live rows, the gate asks for {config.min_samples}"
            )
        elif found.difference is None or found.ci95 is None:
            holds.append(f"{name}: the difference on live rows is undefined: {found.reason}")
        else:
            words = f"{name}: {found.difference:+.4f} on {found.n} live rows, 95 % interval {pair(found.ci95)}"
            where = rejects if found.ci95[1] < 0 else passed if found.ci95[0] >= -config.margin else holds
            where.append(f"{words}, margin {config.margin:g}")
    if rejects:
        return Finding("REJECT", "worse than the champion on live traffic: " + "; ".join(rejects))
    if holds:
        return Finding("HOLD", "not shown on live traffic: " + "; ".join(holds))
    return Finding("PASS", f"no worse than the champion on live traffic: {'; '.join(passed)}")
