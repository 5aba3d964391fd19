"""Which live requests a challenger sees, and when it is taken back: functions of what was counted, without effects."""

from __future__ import annotations

import hashlib
import math
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from pipeline.answer import Answer
from pipeline.serving.server_config import CanaryConfig

_RECENT = 2000
"""Requests whose times are looked at."""
_FREE_MS = 20.0
"""A difference in time that no ratio counts."""
_SIGMAS = 4.0
"""How far beyond chance a mean must lie: some 6 in 100,000 looks are wrong."""


def part_of(salt: str, key: str) -> float:
    """Return where a key stands between 0 and 1, always the same place; another salt shuffles the keys anew."""
    return int.from_bytes(hashlib.sha256(f"{salt}|{key}".encode(errors="replace")).digest()[:8], "big") / 2**64


@dataclass
class Seen:
    """What a version did with live requests."""

    requests: int = 0
    errors: int = 0
    seconds: deque[float] = field(default_factory=lambda: deque(maxlen=_RECENT))
    scores: dict[str, list[float]] = field(default_factory=dict)
    """Binary task → rows, sum and sum of squares of P(class 1)."""

    def note(self, seconds: float, answers: Sequence[Answer] | None) -> None:
        """Count a request; one without answers failed."""
        self.requests += 1
        if answers is None:
            self.errors += 1
            return
        self.seconds.append(seconds)
        for answer in answers:
            task, score, probabilities = answer[0], answer[1], answer[4]
            if len(probabilities) == 2 and score is not None:
                sums = self.scores.setdefault(task, [0.0, 0.0, 0.0])
                sums[0] += 1
                sums[1] += score
                sums[2] += score * score


def fault(canary: Seen, champion: Seen, limits: CanaryConfig) -> str | None:
    """Say why a canary is to be taken back, None where it may stay.

    Both saw keys that a hash has drawn, so that what they were asked is alike.
    """
    if canary.requests < limits.min_requests or champion.requests < limits.min_requests:
        return None
    shares = [seen.errors / seen.requests for seen in (canary, champion)]
    if shares[0] > shares[1] + limits.max_error_share:
        return f"it fails at {shares[0]:.2%} of its requests, the champion at {shares[1]:.2%}"
    if canary.seconds and champion.seconds:
        ours, theirs = (1000 * float(np.quantile(list(seen.seconds), 0.95)) for seen in (canary, champion))
        if ours > limits.max_latency_ratio * theirs + _FREE_MS:
            return f"its 95th percentile is {ours:.0f} ms, the champion's {theirs:.0f} ms"
    for task in canary.scores.keys() & champion.scores.keys():
        if (found := _shifted(canary.scores[task], champion.scores[task], limits.score_ratio)) is not None:
            return f"its mean score of {task!r} is {found[0]:.3g}, the champion's {found[1]:.3g} on like requests"
    return None


def _shifted(ours: Sequence[float], theirs: Sequence[float], limits: tuple[float, float]) -> tuple[float, float] | None:
    means, variances = [], []
    for rows, total, squares in (ours, theirs):
        means.append(total / rows)
        variances.append(max(squares / rows - (total / rows) ** 2, 0.0) / rows)
    is_beyond = not limits[0] * means[1] <= means[0] <= limits[1] * means[1]
    is_sure = abs(means[0] - means[1]) > _SIGMAS * math.sqrt(sum(variances))
    return (means[0], means[1]) if is_beyond and is_sure else None


def miscalibrated(
    scores: Mapping[str, Sequence[float]],
    labels: Mapping[str, Sequence[float]],
    least: int,
    limits: tuple[float, float],
) -> str | None:
    """Say which binary task's expected positives lie too far from those that were observed, None where none does.

    Args:
        scores: task → P(class 1) of each labelled row.
        labels: task → 0 or 1 of each.
        least: rows of a task, before it is judged.
        limits: of expected over observed.
    """
    for task, known in scores.items():
        p, observed = np.asarray(known), float(np.sum(labels[task]))
        if len(p) < least:
            continue
        expected, spread = float(p.sum()), math.sqrt(float((p * (1 - p)).sum()))
        is_beyond = not limits[0] * observed <= expected <= limits[1] * observed
        if is_beyond and abs(expected - observed) > _SIGMAS * max(spread, 1.0):
            return f"it expects {expected:.0f} positives of {task!r} among {len(p)} rows, {observed:.0f} came"
    return None
