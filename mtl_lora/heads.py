"""One classification head a task, for bases that answer by states instead of words.

All heads are one weight and one bias, the rows of a task after those of the task before: each parameter takes part in
every step whatever tasks are in it, which is what keeps gradients exact where they are partitioned over ranks, and no
row is there for nothing.

Axes: K scores, H hidden size, V rows of all heads.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mtl_lora.errors import TaskError

__all__ = ["HEADS", "TaskHeads"]

HEADS = "task_heads"
"""Name of the heads among the base's modules."""
_STD = 0.02
"""Of fresh weights, as in BERT and its like."""


class TaskHeads(nn.Module):
    """Scores hidden states by rows of heads.

    Args:
        hidden_size: H.
        classes: rows of each task's head, in the order of ids: its classes, or 1 where each answer is scored alone.
        device: of the parameters.
        dtype: of the parameters.

    Attributes:
        weight: (V, H), normal(0.02) at first.
        bias: (V,), zero at first.
        trainable_tasks: ids of the tasks whose rows get gradients; None for all.
    """

    task_parameter_names = ("weight", "bias")
    trainable_tasks: tuple[int, ...] | None = None

    def __init__(self, hidden_size: int, classes: Sequence[int], **kind: Any) -> None:
        super().__init__()
        self.hidden_size, self.classes = hidden_size, tuple(classes)
        self.weight = nn.Parameter(torch.empty(sum(self.classes), hidden_size, **kind))
        self.bias = nn.Parameter(torch.empty(sum(self.classes), **kind))
        self.reset_heads()

    @torch.no_grad()
    def reset_heads(self) -> None:
        """Give all heads their initial values."""
        nn.init.normal_(self.weight, std=_STD)
        nn.init.zeros_(self.bias)

    def rows(self, task: int) -> slice:
        """Return where the rows of a task's head stand."""
        start = sum(self.classes[:task])
        return slice(start, start + self.classes[task])

    def forward(self, states_KH: Tensor, rows_K: Tensor) -> Tensor:
        """Return the score (K,), at least fp32, of each state by one row of the heads.

        Args:
            states_KH: a state a score.
            rows_K: which row scores it.
        """
        weight, bias = self._trained(self.weight), self._trained(self.bias)
        dtype = torch.promote_types(torch.promote_types(weight.dtype, states_KH.dtype), torch.float32)
        picked = torch.nn.functional.embedding(rows_K, weight).to(dtype)  # the gather whose backward adds up fastest
        return (states_KH.to(dtype) * picked).sum(-1) + bias.to(dtype)[rows_K]

    def _trained(self, parameter: Tensor) -> Tensor:
        if self.trainable_tasks is None:
            return parameter
        kept = torch.zeros(parameter.shape[0], dtype=torch.bool, device=parameter.device)
        for task in self.trainable_tasks:
            kept[self.rows(task)] = True
        return torch.where(kept.view(-1, *[1] * (parameter.dim() - 1)), parameter, parameter.detach())

    @torch.no_grad()
    def add_task(self, classes: int, source: int | None = None) -> None:
        """Add a head at the end, fresh or a copy of another task's; the parameters become new ones.

        Raises:
            TaskError: the source has another number of rows.
        """
        fresh = TaskHeads(self.hidden_size, (classes,), device=self.weight.device, dtype=self.weight.dtype)
        if source is not None and self.classes[source] != classes:
            raise TaskError(
                f"a head that is copied must have the new task's rows, {classes}, got {self.classes[source]}; "
                "start from the mean, which begins with a fresh head"
            )
        for name in self.task_parameter_names:
            new = getattr(fresh, name) if source is None else getattr(self, name)[self.rows(source)]
            self._replace(name, torch.cat([getattr(self, name), new]))
        self.classes = (*self.classes, classes)

    @torch.no_grad()
    def remove_task(self, task: int) -> None:
        """Take a task's head out; the parameters become new ones."""
        gone = self.rows(task)
        for name in self.task_parameter_names:
            old = getattr(self, name)
            self._replace(name, torch.cat([old[: gone.start], old[gone.stop :]]))
        self.classes = self.classes[:task] + self.classes[task + 1 :]

    def _replace(self, name: str, value: Tensor) -> None:
        old: nn.Parameter = getattr(self, name)
        setattr(self, name, nn.Parameter(value.clone(), requires_grad=old.requires_grad))

    def extra_repr(self) -> str:
        """Describe the sizes."""
        return f"hidden_size={self.hidden_size}, classes={list(self.classes)}"
