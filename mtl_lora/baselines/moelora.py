"""MoELoRA: LoRA experts, mixed by a gate that sees the task (arXiv 2310.18339, section 3.4).

    h = W x + s · Σₑ softmax(G e_t)ₑ Bₑ Aₑ x

The E experts share the rank R between them, as evenly as it goes, so the size is LoRA's but for the gate. The gate
depends on the task alone, so a task is exactly a LoRA of rank R. Axes as in :mod:`mtl_lora.layer`; E experts,
D features of a task's embedding.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mtl_lora.config import MTLLoRAConfig
from mtl_lora.errors import ConfigError
from mtl_lora.layer import AdaptedLinear
from mtl_lora.model import AdapterModel
from mtl_lora.routing import Router

__all__ = ["TASK_EMBEDDING_SIZE", "MoELoRALinear", "MoELoRAModel"]

TASK_EMBEDDING_SIZE = 64
"""D; the authors' default."""


class MoELoRALinear(AdaptedLinear):
    """A linear layer with task-gated LoRA experts.

    Attributes:
        lora_A: all experts' A, one above the other (R, I); normal(0.01) at first.
        lora_B: all experts' B side by side (O, R); zero at first.
        lora_gate: G (E, D).
        lora_task_embedding: e (T, D).
        rank_shares: how many of the R ranks each expert has.
    """

    adapter_parameter_names = ("lora_A", "lora_B", "lora_gate", "lora_task_embedding")
    task_parameter_names = ("lora_task_embedding",)

    def __init__(
        self, base: nn.Module, config: MTLLoRAConfig, router: Router, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__(base, router)
        r, experts = config.r, config.num_up_projections
        if experts > r:
            raise ConfigError(f"r must be >= num_up_projections (experts), got {r} < {experts}; each needs a rank")
        self.rank_shares = [r // experts + (index < r % experts) for index in range(experts)]
        self.scaling, self.dropout = config.scaling, config.lora_dropout
        kind: dict[str, Any] = {"device": self.weight.device, "dtype": dtype or self.weight.dtype}
        self.lora_A = nn.Parameter(torch.empty(r, self.in_features, **kind))
        self.lora_B = nn.Parameter(torch.empty(self.out_features, r, **kind))
        self.lora_gate = nn.Parameter(torch.empty(experts, TASK_EMBEDDING_SIZE, **kind))
        self.lora_task_embedding = nn.Parameter(torch.empty(config.num_tasks, TASK_EMBEDDING_SIZE, **kind))
        self.reset_adapter()

    @torch.no_grad()
    def reset_adapter(self) -> None:
        """Initialise as the authors do: A normal(0.01), B zero, the gate and embeddings as torch's own layers."""
        nn.init.normal_(self.lora_A, std=0.01)
        nn.init.zeros_(self.lora_B)
        nn.init.kaiming_uniform_(self.lora_gate, a=math.sqrt(5))
        nn.init.normal_(self.lora_task_embedding)

    def gates(self) -> Tensor:
        """Return each task's weight on each of the R ranks, (T, R), in at least fp32."""
        embedding: Tensor = self.lora_task_embedding
        if self.trainable_tasks is not None:
            kept = torch.zeros(embedding.shape[0], 1, dtype=torch.bool, device=embedding.device)
            kept[list(self.trainable_tasks)] = True
            embedding = torch.where(kept, embedding, embedding.detach())
        dtype = torch.promote_types(embedding.dtype, torch.float32)
        share_TE = torch.softmax(embedding.to(dtype) @ self.lora_gate.to(dtype).t(), dim=-1)
        return torch.cat([share_TE[:, e : e + 1].expand(-1, n) for e, n in enumerate(self.rank_shares)], dim=1)

    def _adapted(self, rows: Tensor, ids: Tensor) -> Tensor:
        dtype = self._compute_dtype(rows)
        rows = rows.to(dtype)
        down = F.linear(F.dropout(rows, self.dropout, self.training), self.lora_A.to(dtype))
        gate = (self.gates() * self.scaling).to(dtype).index_select(0, ids.reshape(-1))
        gated = down * (gate if ids.dim() == 2 else gate.unsqueeze(1))
        return self._base_forward(rows) + F.linear(gated, self.lora_B.to(dtype))

    @torch.no_grad()
    def factors(self, task: int) -> tuple[Tensor, Tensor]:
        """Return A (R, I) and the gated B (O, R)."""
        gate_R = self.gates()[task] * self.scaling
        return self.lora_A.detach().to(gate_R.dtype), self.lora_B.detach().to(gate_R.dtype) * gate_R


class MoELoRAModel(AdapterModel):
    """MoELoRA on any model; see :class:`mtl_lora.model.AdapterModel` for the interface."""

    method = "moelora"

    def _make_layer(self, layer: nn.Module, config: MTLLoRAConfig, dtype: torch.dtype) -> AdaptedLinear:
        return MoELoRALinear(layer, config, self.router, dtype)
