"""Stops a run before the optimizer step when a loss or a gradient is not finite, on every rank at once."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pipeline.errors import InputError
from pipeline.modeling.packing import Batch
from pipeline.training.engine import gather, reduce_sum


class NotFiniteError(InputError):
    """A loss or a gradient is not finite; the step was not taken."""


class FiniteGuard:
    """Watches the losses and gradients of one step's micro-batches.

    Nothing waits for the device before the step's end, where the ranks agree with one number.

    Args:
        module: its trainable parameters' gradients are watched, before they are summed up or shared out.
        where: device of the losses.
    """

    def __init__(self, module: nn.Module, where: torch.device) -> None:
        self._seen: list[tuple[Batch, Tensor, Tensor]] = []
        self._fine = self._gradients_fine = torch.ones((), dtype=torch.bool, device=where)
        for parameter in module.parameters():
            if parameter.requires_grad:
                parameter.register_hook(self._watch)

    def _watch(self, gradient: Tensor) -> None:
        self._gradients_fine = self._gradients_fine & torch.isfinite(gradient).all()

    def add(self, batch: Batch, losses_E: Tensor) -> None:
        """Take a micro-batch whose backward is done."""
        self._seen.append((batch, torch.isfinite(losses_E), self._gradients_fine))
        self._gradients_fine = self._fine

    def agree(self, step: int) -> None:
        """End a step: every rank raises where any has seen a number that is not finite.

        Raises:
            NotFiniteError: with the samples of all ranks in question.
        """
        seen, self._seen = self._seen, []
        fine = torch.stack([losses.all() & gradients for _, losses, gradients in seen])
        if not int(reduce_sum((~fine).sum())):
            return
        found: list[tuple[str, list[str]]] = []
        for batch, losses_E, gradients in seen:
            if not losses_E.all():
                found.append(("loss", [n for n, ok in zip(batch.names, losses_E.tolist(), strict=True) if not ok]))
            elif not gradients:
                found.append(("gradient", list(batch.names)))
        every = [item for items in gather(found) for item in items]
        told = "; ".join(f"a {what} of samples {', '.join(names)}" for what, names in every)
        raise NotFiniteError(
            f"every loss and gradient must be finite, at step {step} these are not: {told}. The step was not taken; "
            "lower training.learning_rate, or take the samples out"
        )
