"""A model that answers at once, by the length of the text, so that what surrounds a model can be tried on its own."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Sequence

from pipeline.contracts import Sample, TaskSpec
from pipeline.errors import InputError

TASKS = (
    TaskSpec(name="clicks", template="{text}\nClick:", label_words=(" no", " yes")),
    TaskSpec(name="topic", kind="multiclass", template="{text}\nTopic:", label_words=(" a", " b", " c")),
)


class NullModel:
    """Answers ``clicks`` and ``topic``; refuses texts with the word ``unspeakable``, as an encoder would."""

    def __init__(self, pause_s: float = 0.0) -> None:
        self.pause_s = pause_s

    def answer(self, samples: Sequence[Sample]) -> list[tuple[str, float, int, str, list[float]]]:
        """Return an answer a sample."""
        time.sleep(self.pause_s)
        if any("unspeakable" in sample.fields["text"] for sample in samples):
            raise InputError("a prompt's tokens must be the model's, got one that is not; take it out of the text")
        return [self._answer(sample) for sample in samples]

    def explain(self, samples: Sequence[Sample]) -> list[tuple[str, float, int, str, list[float], list[float]]]:
        """Return an answer a sample, with the logarithms of its probabilities where they are not 0."""
        return [(*found, [math.log(p) for p in found[-1] if p]) for found in self.answer(samples)]

    def _answer(self, sample: Sample) -> tuple[str, float, int, str, list[float]]:
        share = len(sample.fields["text"]) % 101 / 101
        rest = [] if sample.task == "clicks" else [0.0]
        return sample.task, share, int(share > 0.5), " yes" if share > 0.5 else " no", [1 - share, share, *rest]


def load(pause_s: float = 0.0) -> NullModel:
    """Return the model, as a worker does."""
    return NullModel(pause_s)


def load_and_die_once(marker: str) -> NullModel:
    """Return the model; the first process that asks dies while it answers."""

    class Mortal(NullModel):
        def answer(self, samples: Sequence[Sample]) -> list[tuple[str, float, int, str, list[float]]]:
            try:
                os.close(os.open(marker, os.O_CREAT | os.O_EXCL))
            except FileExistsError:
                return super().answer(samples)
            os._exit(1)

    return Mortal()
