"""Scoring samples with a model: the table that every metric starts from."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from typing import Protocol

import numpy as np
import pandas as pd

from pipeline.contracts import Sample
from pipeline.errors import InputError
from pipeline.evaluation.score_table import COLUMNS, check_scores

CHUNK = 512
"""Samples handed to the scorer at once: enough for it to batch by length, few enough to show progress."""


class Scorer(Protocol):
    """What predicts: class probabilities a sample, in label order, batched by length inside."""

    def probabilities(self, samples: Sequence[Sample]) -> list[np.ndarray]:
        """Return one array of class probabilities a sample, in the order given."""
        ...


def predict(
    scorer: Scorer, samples: Iterable[Sample], progress: Callable[[int], object] | None = None, chunk: int = CHUNK
) -> pd.DataFrame:
    """Score every sample once, tasks mixed as they come.

    Args:
        scorer: the model.
        samples: what to score; read lazily, ``chunk`` at a time.
        progress: called with the number of samples just scored.
        chunk: samples handed to the scorer at once.

    Raises:
        InputError: a task's key comes twice.
    """
    answered: list[Sample] = []
    probabilities: list[np.ndarray] = []
    for part in _chunks(samples, chunk):
        answered += part
        probabilities += scorer.probabilities(part)
        if progress is not None:
            progress(len(part))
    return score_table(answered, probabilities)


def score_table(
    samples: Sequence[Sample], probabilities: Sequence[np.ndarray], texts: Sequence[str | None] = ()
) -> pd.DataFrame:
    """Return one row a sample, in the order given: what :func:`pipeline.evaluation.write_scores` writes.

    Args:
        samples: what was scored.
        probabilities: one array of class probabilities each, in label order.
        texts: what the model wrote, None for a label whose words were scored; empty where nothing was written.

    Raises:
        InputError: a task's key comes twice.
    """
    rows = [
        (sample.key, sample.task, sample.label, np.asarray(row, np.float64), sample.group)
        for sample, row in zip(samples, probabilities, strict=True)
    ]
    table = pd.DataFrame(rows, columns=list(COLUMNS))
    table["group"] = table["group"].astype(object)
    if any(text is not None for text in texts):
        table["text"] = pd.Series(list(texts), dtype=object)
        table["references"] = pd.Series([list(s.answers) or None for s in samples], dtype=object)
    return check_scores(table)


def latency_ms(scorer: Scorer, samples: Sequence[Sample], warm_up: int = 3) -> float:
    """Return the median time to answer one row alone, in milliseconds.

    Args:
        scorer: the model, on the device it serves from.
        samples: rows to answer, one at a time; some 30 of all tasks give a steady median.
        warm_up: rows answered beforehand and not counted.

    Raises:
        InputError: there is no sample.
    """
    if not samples:
        raise InputError("latency needs at least one sample, got none; name a split that holds some")
    for sample in [*samples[:1]] * warm_up:
        scorer.probabilities([sample])
    times = []
    for sample in samples:
        start = time.perf_counter()
        scorer.probabilities([sample])
        times.append(time.perf_counter() - start)
    return 1000 * float(np.median(times))


def evenly_spaced(samples: Sequence[Sample], per_task: int) -> list[Sample]:
    """Return up to ``per_task`` samples of each task, at equal distances in the order given."""
    by_task: dict[str, list[Sample]] = {}
    for sample in samples:
        by_task.setdefault(sample.task, []).append(sample)
    return [
        part[len(part) * i // count]
        for part in by_task.values()
        for count in (min(per_task, len(part)),)
        for i in range(count)
    ]


def _chunks(samples: Iterable[Sample], size: int) -> Iterator[list[Sample]]:
    iterator = iter(samples)
    while part := list(islice(iterator, size)):
        yield part
