"""MultiLoRA: parallel LoRAs, each with a learned scale an output feature (arXiv 2311.11501, section 3).

    h = W x + s · Σₙ diag(cₙ) Bₙ Aₙ x

B starts Kaiming-uniform and c at zero, so that the parallel parts do not start alike and the layer starts as the base.
One adapter serves all tasks. Axes as in :mod:`mtl_lora.layer`; N is the number of parallel LoRAs.
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

__all__ = ["MultiLoRALinear", "MultiLoRAModel"]


class MultiLoRALinear(AdaptedLinear):
    """A linear layer with N parallel LoRAs.

    Attributes:
        lora_A: A (N, R, I).
        lora_B: B (N, O, R).
        lora_scaling: c (N, O).
    """

    adapter_parameter_names = ("lora_A", "lora_B", "lora_scaling")

    def __init__(
        self, base: nn.Module, config: MTLLoRAConfig, router: Router, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__(base, router)
        r, parts = config.r, config.num_up_projections
        self.r, self.parts, self.scaling, self.dropout = r, parts, config.scaling, config.lora_dropout
        kind: dict[str, Any] = {"device": self.weight.device, "dtype": dtype or self.weight.dtype}
        self.lora_A = nn.Parameter(torch.empty(parts, r, self.in_features, **kind))
        self.lora_B = nn.Parameter(torch.empty(parts, self.out_features, r, **kind))
        self.lora_scaling = nn.Parameter(torch.empty(parts, self.out_features, **kind))
        self.reset_adapter()

    @torch.no_grad()
    def reset_adapter(self) -> None:
        """Initialise as the authors do: A and B Kaiming-uniform, scales zero."""
        for part in range(self.parts):
            nn.init.kaiming_uniform_(self.lora_A[part], a=math.sqrt(5))
            nn.init.kaiming_uniform_(self.lora_B[part], a=math.sqrt(5))
        nn.init.zeros_(self.lora_scaling)

    def _joint(self) -> tuple[Tensor, Tensor]:
        """Return all parts as one LoRA of rank N·R: (N·R, I) and (O, N·R)."""
        up_NOR = self.lora_B * (self.lora_scaling * self.scaling).unsqueeze(-1)
        return self.lora_A.flatten(0, 1), up_NOR.transpose(0, 1).reshape(self.out_features, -1)

    def _adapted(self, rows: Tensor, ids: Tensor) -> Tensor:
        dtype = self._compute_dtype(rows)
        rows = rows.to(dtype)
        down, up = (factor.to(dtype) for factor in self._joint())
        dropped = F.dropout(rows, self.dropout, self.training)
        return self._base_forward(rows) + F.linear(F.linear(dropped, down), up)

    @torch.no_grad()
    def factors(self, task: int) -> tuple[Tensor, Tensor]:
        """Return the joint LoRA of rank N·R, the same for every task."""
        down, up = self._joint()
        dtype = torch.promote_types(down.dtype, torch.float32)
        return down.to(dtype), up.to(dtype)


class MultiLoRAModel(AdapterModel):
    """MultiLoRA on any model; see :class:`mtl_lora.model.AdapterModel` for the interface."""

    method = "multilora"

    def _make_layer(self, layer: nn.Module, config: MTLLoRAConfig, dtype: torch.dtype) -> AdaptedLinear:
        return MultiLoRALinear(layer, config, self.router, dtype)
