"""How often is a challenger promoted that is no better than the champion, and how often one that is?"""

from typing import Any

import numpy as np
import pandas as pd
from scipy.special import expit

from pipeline.contracts import TaskSpec
from pipeline.evaluation.compare import compare
from pipeline.evaluation.summary import summarize
from pipeline.promotion.evidence import Evidence, Opponent
from pipeline.promotion.gates import GatesConfig
from pipeline.promotion.policy import decide
from tests.benchmarks.timing import hardware, row, side_by_side, versions

WEEKS, POWER_WEEKS, CHAMPION = 1000, 300, 0.8
TASKS = tuple(TaskSpec(name=n, template="{x}", label_words=(" no", " yes")) for n in ("ad", "keyword", "page"))
DATA = {"manifest_sha256": "0" * 64, "split": "test"}


def _week(rng: np.random.Generator, num: int, noises: tuple[float, float]) -> list[pd.DataFrame]:
    """Return the scores of two models on one fresh holdout: labels by a logit that each sees through its own noise."""
    parts: list[list[pd.DataFrame]] = [[], []]
    for task in TASKS:
        logit = 2.0 * rng.normal(size=num) - 0.5
        labels = (rng.random(num) < expit(logit)).astype(float)
        for part, noise in zip(parts, noises, strict=True):
            p = expit(logit + noise * rng.normal(size=num))
            scores = list(np.stack([1 - p, p], axis=1))
            keys = [f"{i:05d}" for i in range(num)]
            part.append(
                pd.DataFrame({"key": keys, "task": task.name, "label": labels, "scores": scores, "group": None})
            )
    return [pd.concat(part, ignore_index=True) for part in parts]


def promotions(weeks: int, num: int, challenger: float, champion: float, gates: GatesConfig) -> dict[str, float]:
    """Return the share of weeks with each verdict."""
    rng, verdicts = np.random.default_rng(5), []
    for _ in range(weeks):
        ours, theirs = _week(rng, num, (challenger, champion))
        against = compare(ours, theirs, TASKS, candidate_name="c", reference_name="h", data=DATA)
        reports = [summarize(f, TASKS, model=m, data=DATA, replicates=40) for m, f in (("c", ours), ("h", theirs))]
        evidence = Evidence(champion=Opponent("h", reports[1], against))
        verdicts.append(decide(reports[0], evidence, gates).verdict)
    return {name: verdicts.count(name) / weeks for name in ("PROMOTE", "HOLD", "REJECT")}


def false_promotions(what: str, gain: Any, weeks: int) -> dict[str, Any]:
    """Promote no challenger whose distribution is the champion's."""
    gates = GatesConfig(beat_base=False, gain=gain, margin=0.02, min_samples=50)
    shares = promotions(weeks, 500, CHAMPION, CHAMPION, gates)
    value = shares["PROMOTE"]
    measure = f"false promotions, gain asked of {what}, 3 tasks of 500 samples"
    return row(measure, "<= 0.05", value, value <= 0.05, shares=shares, weeks=weeks)


def power(num: int, challenger: float) -> dict[str, Any]:
    """Say how often a real gain is seen."""
    gates = GatesConfig(beat_base=False, margin=0.02, min_samples=50)
    shares = promotions(POWER_WEEKS, num, challenger, CHAMPION, gates)
    ours, theirs = _week(np.random.default_rng(6), 60_000, (challenger, CHAMPION))
    found = compare(ours, theirs, TASKS, candidate_name="c", reference_name="h", data=DATA)
    measure = f"power: promoted with a true macro AUC gain of {found.macro.difference:+.4f}, 3 tasks of {num} samples"
    return row(measure, "reported", shares["PROMOTE"], None, shares=shares, weeks=POWER_WEEKS)


def run() -> dict[str, Any]:
    """Simulate weeks of retraining."""
    parts: list[tuple[Any, ...]] = [
        (false_promotions, "the macro mean", "macro", WEEKS),
        (power, 2000, 0.6),
        (power, 500, 0.6),
        (power, 500, 0.4),
        (false_promotions, "one named task", ("ad",), POWER_WEEKS),
    ]
    return {
        "question": __doc__,
        "command": "python -m tests.benchmarks promotion_trust",
        "hardware": hardware(),
        "versions": versions("numpy", "scipy", "pandas"),
        "protocol": "fixed seeds; each week the policy decides on champion and challenger, scored on a fresh holdout",
        "rows": side_by_side(parts),
    }
