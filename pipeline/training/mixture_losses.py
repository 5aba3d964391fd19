"""The tasks' losses for a mixture that follows them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from pipeline.errors import InputError
from pipeline.modeling.packing import Batch
from pipeline.stream import LossDriven, MixedStream
from pipeline.training.engine import reduce_sum

_LEAST_LOSS = 1e-6
"""A task that is learnt perfectly counts as having this loss: shares are ratios of losses."""


class MixtureLosses:
    """Tells a loss-driven stream each task's mean loss at its update steps; idle under every other mixture.

    Sums are taken over all ranks step by step and travel with the checkpoint, as the stream's updates do: a resumed
    run tells the same losses at the same steps.
    """

    def __init__(self, stream: MixedStream, tasks: Sequence[str], where: torch.device) -> None:
        self._stream, self._tasks = stream, tasks
        self._every_steps = stream.mixture.every_steps if isinstance(stream.mixture, LossDriven) else None
        self._step_T2 = torch.zeros(len(tasks), 2, device=where, dtype=torch.float64)
        self._sums_T2 = torch.zeros(len(tasks), 2, dtype=torch.float64)

    def add(self, batch: Batch, losses_E: Tensor, counts_E: Tensor) -> None:
        """Take the losses of one micro-batch, and which of them count."""
        if self._every_steps is not None:
            values = torch.stack([losses_E * counts_E, counts_E], 1).to(self._step_T2.dtype)
            self._step_T2.index_add_(0, batch.example_task, values)

    def end_step(self, done: int) -> None:
        """End a step, ``done`` of which are done; called by every rank.

        Raises:
            InputError: a task had no sample before the first update.
        """
        if self._every_steps is None:
            return
        self._sums_T2 += reduce_sum(self._step_T2).cpu()
        self._step_T2.zero_()
        if done % self._every_steps == 0:
            self._stream.update_mixture(done, self._means())
            self._sums_T2.zero_()

    def _means(self) -> dict[str, float]:
        updates = self._stream.state_dict()["updates"]
        losses = dict(updates[-1]["losses"]) if updates else {}  # of a task without a sample since
        for task, (total, count) in zip(self._tasks, self._sums_T2.tolist(), strict=True):
            if count:
                losses[task] = max(total / count, _LEAST_LOSS)
        if unseen := sorted(set(self._tasks) - set(losses)):
            raise InputError(
                f"every task must give a sample before the first update of its mixture, {unseen} gave none in "
                f"{self._every_steps} steps; raise mixture.every_steps or training.global_batch_size"
            )
        return losses

    def state_dict(self) -> dict[str, Any]:
        """Return what resuming needs: the stream's state and the sums since its last update."""
        return {"stream": self._stream.state_dict(), "sums": self._sums_T2.tolist()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over the state of an earlier run of any number of ranks.

        Raises:
            InputError: it belongs to other data or settings.
        """
        self._stream.load_state_dict(state["stream"])
        self._sums_T2 = torch.tensor(state["sums"], dtype=torch.float64)
