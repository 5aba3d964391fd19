"""Samples whose answers are written, to be read: the best, the worst, and those that changed against the base."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import NamedTuple

import numpy as np

from pipeline.evaluation.score_table import Floats, TaskScores
from pipeline.evaluation.summary import metric_of

BEST, WORST, CHANGED = 3, 3, 4
"""Examples shown of each sort, at most."""
SHOWN_CHARACTERS = 400
"""Longer texts lose their middle."""


class Example(NamedTuple):
    """One sample."""

    sort: str
    """``best``, ``worst`` or ``changed``."""
    key: str
    prompt: str
    reference: str
    """The right answer, or the several that are."""
    text: str
    """What the candidate wrote."""
    value: float
    """The candidate's metric on this sample; chrF where the task's own is of the whole corpus."""
    base_text: str | None = None
    base_value: float | None = None


def examples(
    candidate: TaskScores, base: TaskScores | None, prompts: Mapping[tuple[str, str], str]
) -> tuple[list[Example], str]:
    """Return examples of a task that is answered by free texts, and the metric by which they were chosen.

    Args:
        candidate: the model's scores.
        base: those of the model that it is held against, on the same samples; None where there is none.
        prompts: task and key → what was asked.
    """
    metric = metric_of(candidate.spec)
    metric = "chrf" if metric == "bleu" else metric
    values: Floats = getattr(candidate.answers, metric)
    before: Floats | None = None
    if base is not None and np.array_equal(base.keys, candidate.keys):
        before = getattr(base.answers, metric)
    found = []
    for sort, place in _chosen(values, before):
        base_text = None if base is None or before is None or base.texts is None else _shown(base.texts[place])
        base_value = None if before is None else float(before[place])
        key = str(candidate.keys[place])
        texts, references = candidate.answers.texts[place], candidate.answers.references[place]
        asked = _shown(prompts.get((candidate.spec.name, key), ""))
        said = _shown(" | ".join(references))
        found.append(Example(sort, key, asked, said, _shown(texts), float(values[place]), base_text, base_value))
    return found, metric


def _chosen(values: Floats, before: Floats | None) -> Iterator[tuple[str, int]]:
    """Yield places, each once: ties go to the first key."""
    order = np.argsort(-values, kind="stable")
    best = order[:BEST].tolist()
    worst = [place for place in np.argsort(values, kind="stable")[:WORST].tolist() if place not in best]
    yield from (("best", place) for place in best)
    yield from (("worst", place) for place in worst)
    if before is not None:
        change = np.abs(values - before)
        furthest = [p for p in np.argsort(-change, kind="stable").tolist() if change[p] > 0 and p not in best + worst]
        yield from (("changed", place) for place in furthest[:CHANGED])


def _shown(text: str) -> str:
    half = SHOWN_CHARACTERS // 2
    return text if len(text) <= SHOWN_CHARACTERS else f"{text[:half]} … {text[-half:]}"
