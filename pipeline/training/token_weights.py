"""Tasks whose answers are written may let every token weigh alike in the loss, and not every sample."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from pipeline.contracts import TaskSpec
from pipeline.modeling.packing import Example, HeadExample
from pipeline.training.engine import reduce_sum

_Examples = Sequence[Example | HeadExample]


class TokenWeights:
    """Weighs the samples of a step by their answers' lengths, where a task's ``generation.loss`` is ``token``.

    An example's loss is the mean over its answer's n tokens. With the factor n / n̄, n̄ being the task's mean over the
    whole step, whatever ranks its samples are on, the sum over the task's samples is their number times the mean over
    all tokens. Idle where no task asks for it.

    Args:
        tasks: in the order of their indices.
        where: device of the ranks' common sums.
    """

    def __init__(self, tasks: Sequence[TaskSpec], where: torch.device) -> None:
        self._is_by_token = [task.is_written and task.generation.loss == "token" for task in tasks]
        self._where = where

    def weigh(self, examples: _Examples, counted: int) -> _Examples:
        """Return a rank's examples of one step with their weights; called by every rank.

        Args:
            examples: in the order of the samples.
            counted: how many of them, from the first on, belong to the step.
        """
        if not any(self._is_by_token):
            return examples
        return self.weighed(examples, reduce_sum(self.counts(examples[:counted]).to(self._where)))

    def counts(self, examples: _Examples) -> Tensor:
        """Return each task's samples and their answers' tokens, (T, 2) in fp64; zero for tasks that do not ask."""
        counts_T2 = torch.zeros(len(self._is_by_token), 2, dtype=torch.float64)
        for example in examples:
            if isinstance(example, Example) and self._is_by_token[example.task]:
                counts_T2[example.task] += counts_T2.new_tensor([1.0, len(example.words[0])])
        return counts_T2

    def weighed(self, examples: _Examples, counts_T2: Tensor) -> _Examples:
        """Return examples with their weights, given the :meth:`counts` of all examples of the step."""
        factors = [samples / tokens if tokens else None for samples, tokens in counts_T2.tolist()]
        return [
            replace(example, weight=example.weight * len(example.words[0]) * factor)
            if isinstance(example, Example) and (factor := factors[example.task]) is not None
            else example
            for example in examples
        ]
