"""What is a right answer, and what a model answers to one row: columns of batch scoring, of requests and of a
registered model's ``predict``."""

from __future__ import annotations

from collections.abc import Sequence

from pipeline.contracts import Sample, TaskSpec

ANSWER = ("task", "score", "label", "label_word", "probabilities")
"""Columns of every answer."""
GENERATED = "generated_text"
"""Further column of a model of which a task's answers are written."""
Answer = tuple[str, float | None, int, str, list[float]] | tuple[str, float | None, int, str, list[float], str | None]
"""One row's values of the columns."""


def answer_columns(tasks: Sequence[TaskSpec]) -> tuple[str, ...]:
    """Return the columns of an answer of a model of these tasks."""
    return (*ANSWER, GENERATED) if any(task.is_written for task in tasks) else ANSWER


def answer_texts(spec: TaskSpec, sample: Sample) -> tuple[str, ...]:
    """Return the texts that are right answers to a sample: its references, or the word of its label."""
    if spec.kind == "generation":
        return sample.answers
    words = sample.choices if spec.kind == "choice" else spec.class_names
    return (words[int(sample.label)].strip(),)


def written_class(text: str, words: tuple[str, ...]) -> int | None:
    """Return the class whose word a written answer is, capitals and outer spaces aside; None for any other text."""
    wanted = text.strip().casefold()
    return next((at for at, word in enumerate(words) if word.strip().casefold() == wanted), None)
