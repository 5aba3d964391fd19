"""What a decision rests on, gathered by others, and how sure it must be."""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass
from typing import Literal

from scipy.special import stdtrit

from pipeline.contracts import Comparison, Difference, EvaluationReport

Verdict = Literal["PASS", "HOLD", "REJECT"]

ALPHA = 0.05
"""Level of a first look at a holdout, two-sided: that of the intervals in comparisons."""
ANCHOR_ALPHA = 0.01
"""Level of the comparison with the anchor, two-sided. It is made anew each week against the same anchor, and one slip
is for good: of 26 candidates in a row that lie at the cumulative margin, one is let through in at most 12 % of seasons;
the further beyond it they lie, the fewer."""


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


@dataclass(frozen=True)
class Opponent:
    """A model that a candidate is held against.

    Args:
        name: of the model, a version's number for one.
        report: what it scored on the candidate's samples.
        comparison: the paired differences, candidate less this model; None where they were not made.
        tasks: every task that it answers, also those it was not scored on here.
    """

    name: str
    report: EvaluationReport
    comparison: Comparison | None = None
    tasks: Collection[str] = ()


@dataclass(frozen=True)
class Evidence:
    """What a candidate is held against.

    Args:
        base: the untrained model; None where it was not evaluated.
        champion: the present champion; None where there is none yet.
        anchor: the best earlier champion; None where the champion is the anchor itself.
        looks: how many other candidates were judged on this holdout before.
        ever_answered: tasks that any version answers or answered.
    """

    base: Opponent | None = None
    champion: Opponent | None = None
    anchor: Opponent | None = None
    looks: int = 0
    ever_answered: Collection[str] = ()

    @property
    def alpha(self) -> float:
        """Level of this look, two-sided.

        The first look has ``ALPHA``, the k-th ``ALPHA / (k (k - 1))``. All together spend twice ``ALPHA``, half of it
        to either side: however often a holdout is looked at, the chance that a candidate no better than the champion is
        ever called better stays at ``ALPHA``.
        """
        return ALPHA if self.looks == 0 else ALPHA / (self.looks * (self.looks + 1))

    @property
    def words(self) -> tuple[str, ...]:
        """What it is, for a reader."""
        champion = f"champion: version {self.champion.name}" if self.champion else "champion: none yet"
        anchor = f"anchor: version {self.anchor.name}, the best earlier champion" if self.anchor else ""
        if self.champion and not self.anchor:
            anchor = "anchor: the champion itself"
        look = f"look {self.looks + 1} at this holdout, intervals of {percent(self.alpha)}"
        return tuple(words for words in (champion, anchor, look) if words)


def interval_at(found: Difference, alpha: float) -> tuple[float, float]:
    """Return a difference's interval at another level than 95 %, each half stretched as Student's t is.

    Raises:
        ValueError: it has no interval.
    """
    if found.difference is None or found.ci95 is None:
        raise ValueError(f"a difference must have an interval to stretch, got none: {found.reason}")
    free = math.inf if found.degrees_of_freedom is None else found.degrees_of_freedom
    stretch = float(stdtrit(free, 1 - alpha / 2) / stdtrit(free, 1 - ALPHA / 2))
    d, (low, high) = found.difference, found.ci95
    return d - (d - low) * stretch, d + (high - d) * stretch


def percent(alpha: float) -> str:
    """Return the confidence of a level, in percent."""
    return f"{100 * (1 - alpha):.4g} %"


def pair(interval: tuple[float, float]) -> str:
    """Return both ends of an interval in words."""
    return f"{interval[0]:.4g} to {interval[1]:.4g}"
