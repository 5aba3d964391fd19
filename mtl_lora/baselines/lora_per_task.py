"""One LoRA a task, side by side in one model: nothing is shared, each row goes through its own task's adapter.

    h = W x + s · B_t A_t x

Trained together on mixed batches they are what they would be alone on the same samples, since no gradient of one task
reaches another's. Axes as in :mod:`mtl_lora.layer`.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mtl_lora.config import MTLLoRAConfig
from mtl_lora.layer import AdaptedLinear
from mtl_lora.model import AdapterModel
from mtl_lora.routing import Router

__all__ = ["LoRAPerTaskLinear", "LoRAPerTaskModel"]


class LoRAPerTaskLinear(AdaptedLinear):
    """A linear layer with a LoRA a task.

    Attributes:
        lora_A: A (T, R, I), Kaiming-uniform(√5) at first.
        lora_B: B (T, O, R), zero at first.
    """

    adapter_parameter_names = ("lora_A", "lora_B")
    task_parameter_names = ("lora_A", "lora_B")

    def __init__(
        self, base: nn.Module, config: MTLLoRAConfig, router: Router, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__(base, router)
        tasks, r = config.num_tasks, config.r
        self.r, self.scaling, self.dropout = r, config.scaling, config.lora_dropout
        kind: dict[str, Any] = {"device": self.weight.device, "dtype": dtype or self.weight.dtype}
        self.lora_A = nn.Parameter(torch.empty(tasks, r, self.in_features, **kind))
        self.lora_B = nn.Parameter(torch.empty(tasks, self.out_features, r, **kind))
        self.reset_adapter()

    @torch.no_grad()
    def reset_adapter(self) -> None:
        """Initialise each task's LoRA as LoRA is."""
        for down_RI in self.lora_A:
            nn.init.kaiming_uniform_(down_RI, a=math.sqrt(5))
        nn.init.zeros_(self.lora_B)

    def _trained(self, parameter: Tensor) -> Tensor:
        if self.trainable_tasks is None:
            return parameter
        kept = torch.zeros(parameter.shape[0], 1, 1, dtype=torch.bool, device=parameter.device)
        kept[list(self.trainable_tasks)] = True
        return torch.where(kept, parameter, parameter.detach())

    def _adapted(self, rows: Tensor, ids: Tensor) -> Tensor:
        dtype = self._compute_dtype(rows)
        rows = rows.to(dtype)
        down_TRI, up_TOR = (self._trained(p).to(dtype) for p in (self.lora_A, self.lora_B))
        dropped = F.dropout(rows, self.dropout, self.training)
        if ids.dim() == 0:
            task = int(ids)
            return self._base_forward(rows) + self.scaling * F.linear(F.linear(dropped, down_TRI[task]), up_TOR[task])
        # All tasks' ranks side by side, and of each row its own task's alone: two products of LoRA's size.
        own = F.one_hot(ids.reshape(-1), down_TRI.shape[0]).to(dtype).repeat_interleave(self.r, dim=1) * self.scaling
        down = F.linear(dropped, down_TRI.flatten(0, 1)) * (own if ids.dim() == 2 else own.unsqueeze(1))
        return self._base_forward(rows) + F.linear(down, up_TOR.transpose(0, 1).flatten(1))

    @torch.no_grad()
    def factors(self, task: int) -> tuple[Tensor, Tensor]:
        """Return the task's A (R, I) and B (O, R)."""
        dtype = torch.promote_types(self.lora_A.dtype, torch.float32)
        return self.lora_A[task].to(dtype), self.lora_B[task].to(dtype) * self.scaling


class LoRAPerTaskModel(AdapterModel):
    """One LoRA a task on any model; see :class:`mtl_lora.model.AdapterModel` for the interface."""

    method = "lora_per_task"

    def _make_layer(self, layer: nn.Module, config: MTLLoRAConfig, dtype: torch.dtype) -> AdaptedLinear:
        return LoRAPerTaskLinear(layer, config, self.router, dtype)
