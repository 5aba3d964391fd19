"""The adapter's shape as a run's configuration has it; needs no torch."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field


class AdapterConfig(BaseModel):
    """The adapter's shape; names as in PEFT and the paper (arXiv 2410.09437)."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    method: Literal["mtl_lora", "lora", "dora", "multilora", "moelora"] = "mtl_lora"
    r: int = Field(default=8, ge=1)
    """Rank."""
    lora_alpha: float = Field(default=16.0, gt=0)
    lora_dropout: float = Field(default=0.05, ge=0, lt=1)
    num_up_projections: int = Field(default=3, ge=1)
    """Shared up-projections (mtl_lora), parallel adapters (multilora) or experts (moelora)."""
    temperature: float = Field(default=0.1, gt=0)
    """Of the softmax over a task's mixing logits."""
    transform: Literal["full", "diagonal"] = "full"
    """Form of a task's Λ."""
    target_modules: tuple[str, ...] | str = ("q_proj", "k_proj", "v_proj", "o_proj")
    """As PEFT takes them: names (the last parts of a module's path), a regular expression on its full path, or
    ``all-linear`` for every linear layer but the output head."""
