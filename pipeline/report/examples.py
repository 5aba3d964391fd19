"""Samples whose answers are written, or that show an image, to be read: the best, the worst, and those that changed
against the base."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import NamedTuple

import numpy as np

from pipeline.contracts import TaskSpec
from pipeline.evaluation.score_table import Floats, TaskScores
from pipeline.evaluation.summary import metric_of
from pipeline.images import decoded

BEST, WORST, CHANGED = 3, 3, 4
"""Examples shown of each sort, at most."""
SHOWN_CHARACTERS = 400
"""Longer texts lose their middle."""
SHOWN_PIXELS = 128
"""Longer side of an image as it is shown; smaller ones stay as they are."""
PROBABILITY = "probability"
"""What tells samples of a task with label words apart: the right answer's."""
ImagesOf = Callable[[str, Collection[str]], Mapping[str, bytes]]
"""Encoded images of a task's samples by key, for the keys that are asked for."""


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
    image: str | None = None
    """The image that was shown, as the address of a PNG within the page."""


class _Said(NamedTuple):
    """What a model said on each sample."""

    values: Floats
    texts: list[str]
    references: list[str]


def has_examples(spec: TaskSpec) -> bool:
    """Whether a task's samples are shown: its answers are free texts, or one class of an image."""
    return spec.kind == "generation" or (spec.image_field is not None and spec.kind in ("binary", "multiclass"))


def examples(
    candidate: TaskScores,
    base: TaskScores | None,
    prompts: Mapping[tuple[str, str], str],
    images_of: ImagesOf | None = None,
) -> tuple[list[Example], str]:
    """Return examples of a task, and the metric by which they were chosen.

    Args:
        candidate: the model's scores, of a task with :func:`has_examples`.
        base: those of the model that it is held against, on the same samples; None where there is none.
        prompts: task and key → what was asked.
        images_of: gives the samples' images; None shows none.
    """
    spec = candidate.spec
    ours, metric = _said(candidate)
    there = base is not None and np.array_equal(base.keys, candidate.keys)
    before = _said(base)[0] if base is not None and there else None
    places = list(_chosen(ours.values, None if before is None else before.values))
    keys = [str(candidate.keys[place]) for _, place in places]
    images = images_of(spec.name, keys) if images_of and spec.image_field else {}
    return [
        Example(
            sort,
            key,
            _shown(prompts.get((spec.name, key), "")),
            _shown(ours.references[place]),
            _shown(ours.texts[place]),
            float(ours.values[place]),
            None if before is None else _shown(before.texts[place]),
            None if before is None else float(before.values[place]),
            _address(images[key]) if key in images else None,
        )
        for (sort, place), key in zip(places, keys, strict=True)
    ], metric


def _said(scores: TaskScores) -> tuple[_Said, str]:
    if scores.spec.kind == "generation":
        metric = metric_of(scores.spec)
        metric = "chrf" if metric == "bleu" else metric
        values: Floats = getattr(scores.answers, metric)
        return _Said(values, list(scores.answers.texts), [" | ".join(r) for r in scores.answers.references]), metric
    names = [name.strip() for name in scores.spec.class_names]
    given = [names[place] if place >= 0 else "" for place in scores.predicted]
    right = scores.probabilities[np.arange(len(scores)), scores.classes]
    return _Said(right, given, [names[place] for place in scores.classes]), PROBABILITY


def _address(image: bytes) -> str:
    """Return a small PNG of an image as a data URL."""
    pixels = decoded(image)
    pixels.thumbnail((SHOWN_PIXELS, SHOWN_PIXELS))
    buffer = io.BytesIO()
    pixels.save(buffer, "PNG")
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"


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
