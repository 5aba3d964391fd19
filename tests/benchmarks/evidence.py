"""Can the evidence for a promotion be fooled: by small falls, few positives, few groups, many looks, small samples?"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import yaml
from scipy.special import expit, ndtri

from jobs.config_file import PACKAGED
from pipeline.contracts import Comparison, EvaluationReport, MacroResult, TaskResult, TaskSpec
from pipeline.evaluation.compare import compare_tasks
from pipeline.evaluation.delong import auc_interval
from pipeline.evaluation.paired import rarer_class
from pipeline.evaluation.ranking import auc
from pipeline.evaluation.score_table import TaskScores
from pipeline.promotion.evidence import Evidence, Opponent
from pipeline.promotion.gates import GatesConfig
from pipeline.promotion.policy import decide
from tests.benchmarks.timing import hardware, row, side_by_side, versions

DATA = {"manifest_sha256": "0" * 64, "split": "test"}
WEEKS, START, STEP = 26, 0.85, 0.4
NAMES = ("ad", "keyword", "page", "offer")
RATE = 0.3


@dataclass(frozen=True)
class Holdout:
    """Samples of some tasks, and how models see them.

    Args:
        num: samples a task.
        tasks: how many tasks.
        positives: how many of them are positives; None for a share of :data:`RATE`.
        groups: how many groups the samples fall into, in turn; 0 for none.
        groups_with_positives: groups that hold all positives; 0 for any.
        is_shared: whether all tasks have the same groups.
        shared_error: share of a model's error, as a variance, that every model has.
    """

    num: int = 400
    tasks: int = 1
    positives: int | None = None
    groups: int = 0
    groups_with_positives: int = 0
    is_shared: bool = False
    shared_error: float = 0.8

    def draw(self, rng: np.random.Generator, models: Sequence[Sequence[float]]) -> list[dict[str, TaskScores]]:
        """Return each model's scores on fresh samples.

        Both classes are normal around means as far apart as the AUC asks. With groups, half of a model's own error is a
        group's, the same in every task that has it, and of either sign for positives and negatives.

        Args:
            rng: where the samples come from.
            models: (models, tasks) true AUCs.
        """
        found: list[dict[str, TaskScores]] = [{} for _ in models]
        size, own = max(self.groups, 1), math.sqrt(1 - self.shared_error)
        effects = rng.normal(size=(len(models), 2, size))
        for task, name in enumerate(NAMES[: self.tasks]):
            if not self.is_shared:
                effects = rng.normal(size=(len(models), 2, size))
            group = np.arange(self.num) % size
            labels = self._labels(rng, group)
            common = math.sqrt(self.shared_error) * rng.normal(size=self.num)
            for model, aucs in enumerate(models):
                error = rng.normal(size=self.num)
                if self.groups:
                    error = math.sqrt(0.5) * (error + effects[model, labels.astype(int), group])
                found[model][name] = self._scores(
                    name, labels, math.sqrt(2) * ndtri(aucs[task]) * labels + common + own * error, group
                )
        return found

    def _labels(self, rng: np.random.Generator, group: np.ndarray) -> np.ndarray:
        if self.positives is None and not self.groups_with_positives:
            return (rng.random(self.num) < RATE).astype(float)
        labels = np.zeros(self.num)
        allowed = np.flatnonzero(group < (self.groups_with_positives or max(self.groups, 1)))
        count = len(allowed) // 2 if self.positives is None else self.positives
        labels[rng.choice(allowed, count, replace=False)] = 1.0
        return labels

    def _scores(self, name: str, labels: np.ndarray, logits: np.ndarray, group: np.ndarray) -> TaskScores:
        p = expit(logits)
        codes = group if self.groups else None
        clusters = tuple(f"{'' if self.is_shared else name}{g}" for g in range(self.groups))
        keys = _KEYS[: self.num]
        return TaskScores(SPECS[name], keys, labels, np.stack([1 - p, p], axis=1), codes, clusters)


_KEYS = np.array([f"{i:06d}" for i in range(20_000)], dtype=object)
SPECS = {name: TaskSpec(name=name, template="{x}", label_words=(" no", " yes")) for name in NAMES}


def gates_of(name: str) -> GatesConfig:
    """Return the default gates, or those of the packaged weekly configuration; the base is beaten anyway."""
    packaged = yaml.safe_load((PACKAGED / "ads_weekly.yaml").read_text())["promotion"]["gates"]
    return GatesConfig(**{**(packaged if name == "weekly" else {}), "beat_base": False})


def compared(ours: Mapping[str, TaskScores], theirs: Mapping[str, TaskScores]) -> Comparison:
    """Compare two models' scores by the project's own statistics."""
    return compare_tasks(ours, theirs, candidate_name="candidate", reference_name="other", data=DATA)


def reported(scores: Mapping[str, TaskScores], name: str) -> EvaluationReport:
    """Return what the gates read of an evaluation: values and counts."""
    tasks = {}
    for task, sample in scores.items():
        value = auc(sample.labels, sample.score)
        few, n = rarer_class(sample), len(sample)
        tasks[task] = TaskResult(n=n, metric="auc", value=value, ci95=None, auc=value, rarer_class=few)
    return EvaluationReport(model=name, data=DATA, tasks=tasks, macro=MacroResult(value=None, ci95=None))


def judged(scores: Sequence[Mapping[str, TaskScores]], gates: GatesConfig, looks: int = 0) -> tuple[bool, bool]:
    """Return whether a candidate is promoted, and whether it becomes the anchor.

    Args:
        scores: of candidate, champion and, where it is another, anchor.
        gates: the limits.
        looks: earlier ones at this holdout.
    """
    others = [
        Opponent(name, reported(theirs, name), compared(scores[0], theirs))
        for name, theirs in zip(("champion", "anchor"), scores[1:], strict=False)
    ]
    decision = decide(reported(scores[0], "candidate"), Evidence(None, *others, looks=looks), gates)  # type: ignore[arg-type]
    return decision.verdict == "PROMOTE", decision.becomes_anchor


def season(rng: np.random.Generator, gates: GatesConfig, num: int, steps: Sequence[float]) -> np.ndarray:
    """Return how far each task's true AUC has fallen from its start, at most over the weeks of a season.

    Args:
        rng: of the season.
        gates: the limits.
        num: samples a task.
        steps: what each week's challenger is better than the champion, a task.
    """
    holdout = Holdout(num, len(steps))
    champion = anchor = start = np.full(len(steps), START)
    fall = np.zeros(len(steps))
    for _ in range(WEEKS):
        candidate = np.minimum(champion + steps, 0.97)
        models = [candidate, champion] + ([] if anchor is champion else [anchor])
        is_promoted, becomes_anchor = judged(holdout.draw(rng, models), gates)
        if is_promoted:
            champion = candidate
            anchor = candidate if becomes_anchor else anchor
        fall = np.maximum(fall, start - champion)
    return fall


def _goal(value: float, goal: float, count: int, is_least: bool = False) -> tuple[bool, dict[str, Any]]:
    """Return whether a share keeps its goal within twice its standard error, and how sure it is."""
    error = math.sqrt(max(value * (1 - value), 1e-12) / count)
    met = value >= goal - 2 * error if is_least else value <= goal + 2 * error
    return met, {"simulations": count, "standard_error": round(error, 4)}


def creep(gates_name: str, num: int, who: str, seasons: int) -> dict[str, Any]:
    """Say in how many seasons no task's champion falls by more than one margin."""
    gates = gates_of(gates_name)
    worse, better = -STEP * gates.margin, 0.006
    steps = {"all tasks": (worse,) * 3, "one task, two better": (worse, better, better), "one task": (worse, 0.0, 0.0)}
    rng = np.random.default_rng([11, num])
    falls = np.array([season(rng, gates, num, steps[who]).max() for _ in range(seasons)])
    value = float((falls <= gates.margin + 1e-9).mean())
    measure = f"{gates_name} gates, 26 challengers worse by 0.4 margins on {who}, {num} samples: fall <= one margin"
    met, details = _goal(value, 0.95, seasons, is_least=True)
    details |= {"median_fall": round(float(np.median(falls)), 4), "largest_fall": round(float(falls.max()), 4)}
    return row(measure, ">= 0.95", value, met, **details)


def promoted(
    gates_name: str, holdout: Holdout, gain: float, count: int, what: str, goal: float, looks: int = 0
) -> dict[str, Any]:
    """Say how often a challenger better by ``gain`` on every task is promoted; champion and anchor are equal."""
    rng, gates = np.random.default_rng([12, holdout.num]), gates_of(gates_name)
    models = [[START + gain] * holdout.tasks, [START] * holdout.tasks, [START] * holdout.tasks]
    value = float(np.mean([judged(holdout.draw(rng, models), gates, looks)[0] for _ in range(count)]))
    is_least = gain >= 0
    met, details = _goal(value, goal, count, is_least)
    shown = f"{'>=' if is_least else '<='} {goal}"
    return row(f"{gates_name} gates, challenger {gain:+.2f}, {what}: promoted", shown, value, met, **details)


def false_better(what: str, holdout: Holdout, count: int) -> dict[str, Any]:
    """Say how often the macro difference of two equal models excludes zero, where it has an interval."""
    rng = np.random.default_rng([13, holdout.num, holdout.groups])
    models = [[START] * holdout.tasks] * 2
    found = [compared(*holdout.draw(rng, models)).macro for _ in range(count)]
    shown = [d.p_value <= 0.05 for d in found if d.p_value is not None]
    value = float(np.mean(shown)) if shown else 0.0
    met, details = _goal(value, 0.05, max(1, len(shown)))
    details["defined"] = round(len(shown) / count, 3)
    found_row = row(f"false difference, two equal models, {what}", "<= 0.05 or held", value, met, **details)
    return found_row if shown else found_row | {"value": None}


def many_looks(gain: float, goal: float, gates: GatesConfig, looks: int, count: int) -> dict[str, Any]:
    """Say how often one of many challengers that are better by ``gain`` is promoted on one and the same holdout."""
    rng = np.random.default_rng(14)
    holdout = Holdout(1000, 3)
    hits = []
    for _ in range(count):
        champion, *others = holdout.draw(rng, [[START] * 3] + [[START + gain] * 3] * looks)
        hits.append(any(judged([other, champion], gates, k)[0] for k, other in enumerate(others)))
    value = float(np.mean(hits))
    met, details = _goal(value, goal, count)
    what = f"gain {gates.gain}, margin {gates.margin:g}"
    return row(
        f"best of {looks} challengers {gain:+.2f} on one holdout promoted, {what}", f"<= {goal}", value, met, **details
    )


def coverage(area: float, other: float | None, count: int) -> list[dict[str, Any]]:
    """Say how often an AUC's interval, or that of a paired difference, holds the truth, for few to many positives."""
    rows = []
    for positives in (2, 5, 9, 10, 20, 50, 100, 200):
        rng, holdout = np.random.default_rng([15, positives]), Holdout(400 + positives, 1, positives)
        intervals, truth = [], area if other is None else area - other
        for _ in range(count):
            first, *second = (m[NAMES[0]] for m in holdout.draw(rng, [[area]] + ([] if other is None else [[other]])))
            if other is None:
                intervals.append(auc_interval(first.labels, first.score))
            else:
                intervals.append(compared({NAMES[0]: first}, {NAMES[0]: second[0]}).tasks[NAMES[0]].ci95)
        known = [i for i in intervals if i is not None]
        value = float(np.mean([i[0] <= truth <= i[1] for i in known])) if known else 0.0
        error = math.sqrt(max(value * (1 - value), 1e-12) / max(1, len(known)))
        what = f"AUC {area}" if other is None else f"paired difference of AUC {area} and {other}"
        met = len(known) < 0.5 * count or 0.93 - 2 * error <= value <= 0.97 + 2 * error
        details = {"defined": round(len(known) / count, 3), "standard_error": round(error, 4), "simulations": count}
        goal = "0.93 to 0.97 or undefined"
        found = row(f"coverage, {what}, {positives} positives of {holdout.num}", goal, value, met, **details)
        rows.append(found if known else found | {"value": None})
    return rows


def parts(scale: float = 1.0) -> list[tuple[Any, ...]]:
    """Return every measurement with its arguments; ``scale`` shortens all simulations alike."""

    def many(count: int) -> int:
        return max(2, round(count * scale))

    found: list[tuple[Any, ...]] = []
    for name, groups in (("weekly", ("all tasks", "one task")), ("default", ("all tasks", "one task, two better"))):
        for num, seasons in ((1000, 200), (4000, 200), (20_000, 40)):
            found += [(creep, name, num, who, many(seasons)) for who in groups]
    three = Holdout(2000, 3)
    found += [
        (promoted, "weekly", Holdout(4000, 3), 0.0, many(500), "3 tasks of 4000 samples", 0.8),
        (promoted, "default", three, 0.02, many(500), "3 tasks of 2000 samples", 0.85),
        (promoted, "weekly", three, 0.02, many(500), "3 tasks of 2000 samples", 0.85),
    ]
    settings = [(f"{p} positives of 400", Holdout(400, 1, p)) for p in (1, 2, 3, 5, 10, 20, 50)]
    settings += [(f"{g} groups of 10", Holdout(10 * g, 1, None, g)) for g in (3, 5, 10, 15, 30, 60)]
    settings += [("positives in 2 of 40 groups", Holdout(400, 1, None, 40, 2))]
    settings += [("positives in 12 of 40 groups", Holdout(400, 1, None, 40, 12))]
    settings += [("4 tasks over the same 60 groups of 5", Holdout(300, 4, None, 60, 0, True))]
    found += [(false_better, what, holdout, many(4000)) for what, holdout in settings]
    # With a margin that holds nobody, a gain alone decides.
    found += [(many_looks, 0.0, 0.05, GatesConfig(beat_base=False, margin=0.2), 20, many(800))]
    found += [(many_looks, -0.05, 0.01, gates_of(name), 20, many(200)) for name in ("weekly", "default")]
    for name in ("weekly", "default"):
        for what, holdout in (*settings, ("3 tasks of 1000", Holdout(1000, 3)), ("3 tasks of 4000", Holdout(4000, 3))):
            found.append((promoted, name, holdout, -0.05, many(1000), what, 0.01))
    found += [(coverage, area, None, many(4000)) for area in (0.7, 0.85, 0.95, 0.98)]
    pairs = ((0.7, 0.7), (0.85, 0.85), (0.98, 0.98), (0.85, 0.8), (0.7, 0.85), (0.98, 0.95))
    return found + [(coverage, *pair, many(4000)) for pair in pairs]


def run() -> dict[str, Any]:
    """Simulate seasons, looks and samples."""
    return {
        "question": __doc__,
        "command": "python -m tests.benchmarks evidence",
        "hardware": hardware(),
        "versions": versions("numpy", "scipy", "pandas"),
        "protocol": "fixed seeds; binormal scores, two models sharing 0.8 of their error's variance; comparisons by "
        "compare_tasks, decisions by decide with the default gates and those of jobs/configs/ads_weekly.yaml; goals "
        "within twice the standard error; an interval that is undefined in most draws keeps its goal",
        "rows": side_by_side(parts()),
        "not_measured": "other shapes of scores: where positives spread wider than negatives, coverage at an AUC of "
        "0.95 and more with 20 to 50 positives is lower; metrics other than AUC",
    }
