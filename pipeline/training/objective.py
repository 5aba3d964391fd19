"""What is minimised: each example's loss, smoothed and weighted by sample and task.

Axes: E examples, C classes, T tasks.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from mtl_lora.analysis import up_projection_overlap
from pipeline.modeling.packing import Batch
from pipeline.modeling.scoring import ClassScorer, even_target, label_loss
from pipeline.training.config import TrainingConfig


class Objective(nn.Module):
    """The loss of each example of a mixed-task batch.

    Args:
        scorer: returns log-probabilities of the classes.
        tasks: names of the tasks in index order.
        config: of the training.

    Attributes:
        log_variance: s (T,), trained with ``uncertainty_weighting``: a task's loss L counts as exp(-s) L + s / 2, so
            that tasks that stay noisy count less (arXiv 1705.07115, eq. 10 for classification). The weights of tasks
            and samples multiply the whole: within L they would be undone by s.
    """

    def __init__(self, scorer: ClassScorer, tasks: Sequence[str], config: TrainingConfig) -> None:
        super().__init__()
        self.scorer, self.label_smoothing = scorer, config.label_smoothing
        weights = [config.task_weights.get(task, 1.0) for task in tasks]
        self._task_weight_T = torch.tensor(weights, device=next(scorer.parameters()).device)
        self.orthogonality = config.orthogonality
        self.log_variance = nn.Parameter(torch.zeros(len(tasks))) if config.uncertainty_weighting else None

    def forward(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """Return what each example adds to the objective (E,) and, without gradient, its plain loss (E,) and what the
        scorer returned (E, C)."""
        log_probabilities_EC = self.scorer(batch)
        plain_E = label_loss(log_probabilities_EC, batch)
        losses_E = plain_E
        if self.label_smoothing:
            even_E = label_loss(log_probabilities_EC, batch, even_target(batch))
            losses_E = plain_E.lerp(even_E, self.label_smoothing)
        if self.log_variance is not None:
            s_E = self.log_variance.float()[batch.example_task]
            losses_E = losses_E * torch.exp(-s_E) + s_E / 2
        losses_E = losses_E * batch.example_weight * self._task_weight_T[batch.example_task]
        if self.orthogonality:  # of each example, so that the mean over a step has it once
            losses_E = losses_E + self.orthogonality * up_projection_overlap(self.scorer.adapted)  # type: ignore[arg-type]
        return losses_E, plain_E.detach(), log_probabilities_EC.detach()
