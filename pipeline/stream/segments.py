"""The stretches of a stream between two changes of its mixture."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from pipeline.errors import InputError, did_you_mean
from pipeline.stream.interleaving import Interleaving
from pipeline.stream.mixture import AnyMixture, LossDriven, Quotas, loss_driven_quotas

FOREVER = 1 << 62


@dataclass(frozen=True)
class _Segment:
    first_step: int
    interleaving: Interleaving


class Segments:
    """Draws by step; a mixture that never changes is one segment."""

    def __init__(self, mixture: AnyMixture, quotas: Quotas, seed: int, global_batch_size: int) -> None:
        self._mixture, self._first, self._seed, self._batch = mixture, quotas, seed, global_batch_size
        self.updates: list[dict[str, Any]] = []
        """Step and losses of each update so far."""
        self._segments = [_Segment(0, Interleaving(quotas, seed))]

    def draws(self, step: int, part: slice) -> tuple[np.ndarray, np.ndarray]:
        """Return task index and number of the draw of the samples in a part of a step's batch, each (N,).

        Raises:
            InputError: the losses that decide about the step have not been told.
        """
        segment, (first, last, _) = self._of(step), part.indices(self._batch)
        return segment.interleaving.draws((step - segment.first_step) * self._batch + first, last - first)

    def known_until(self, step: int) -> int:
        """Return the first step after ``step`` whose mixture another update decides."""
        if not isinstance(self._mixture, LossDriven):
            return FOREVER
        self._of(step)
        return (step // self._mixture.every_steps + 1) * self._mixture.every_steps

    def update(self, step: int, losses: Mapping[str, float]) -> None:
        """Begin a segment at a step with the shares that the losses call for."""
        mixture = self._mixture
        if not isinstance(mixture, LossDriven):
            raise InputError(f"only a loss_driven mixture takes losses, this one is {mixture.kind!r}; do not tell any")
        due = self._segments[-1].first_step + mixture.every_steps
        if step != due:
            raise InputError(f"the next losses must be told for step {due}, got {step}; updates come in order")
        for task in losses:
            if task not in self._first.tasks:
                raise InputError(
                    f"losses must name the stream's tasks, got {task!r}{did_you_mean(task, self._first.tasks)}"
                )
        values = [losses.get(task, math.nan) for task in self._first.tasks]
        if not all(value > 0 and math.isfinite(value) for value in values):
            raise InputError(f"losses must be finite and > 0 for every task, got {dict(losses)}; stop or fix the run")
        self.updates.append({"step": step, "losses": {t: float(losses[t]) for t in self._first.tasks}})
        first = self.updates[0]["losses"]
        ratios = np.array([losses[task] / first[task] for task in self._first.tasks])
        shares = np.array(self._first.requested)
        quotas = loss_driven_quotas(mixture, self._first.tasks, shares, ratios)
        before = self._segments[-1]
        drawn = before.interleaving.drawn((step - before.first_step) * self._batch)
        self._segments.append(_Segment(step, Interleaving(quotas, self._seed + step, drawn_before=drawn)))

    def restore(self, updates: Sequence[Mapping[str, Any]]) -> None:
        """Repeat the updates of an earlier run."""
        self.updates, self._segments = [], self._segments[:1]
        for update in updates:
            self.update(int(update["step"]), update["losses"])

    def _of(self, step: int) -> _Segment:
        if isinstance(self._mixture, LossDriven):
            place = step // self._mixture.every_steps
            if place >= len(self._segments):
                raise InputError(
                    f"the losses for step {len(self._segments) * self._mixture.every_steps} must be told before step "
                    f"{step} is read; call update_mixture, or load the state of the run that is resumed"
                )
            return self._segments[place]
        return self._segments[0]
