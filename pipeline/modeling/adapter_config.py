"""The adapter's shape as a run's configuration has it; needs no torch."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from pipeline.settings import Settings


class AdapterConfig(Settings):
    """The adapter's shape; names as in PEFT and the paper (arXiv 2410.09437)."""

    method: Literal["mtl_lora", "lora", "dora", "multilora", "moelora"] = "mtl_lora"
    """MTL-LoRA, or one of the rivals that the paper compares it with."""
    r: int = Field(default=8, ge=1)
    """Rank."""
    lora_alpha: float = Field(default=16.0, gt=0)
    """The update is scaled by ``lora_alpha / r``."""
    lora_dropout: float = Field(default=0.05, ge=0, lt=1)
    """Probability that an input of the adapter is dropped in training."""
    num_up_projections: int = Field(default=3, ge=1)
    """Shared up-projections (mtl_lora), parallel adapters (multilora) or experts (moelora)."""
    temperature: float = Field(default=0.1, gt=0)
    """Of the softmax over a task's mixing logits."""
    transform: Literal["full", "diagonal"] = "full"
    """Form of a task's Λ."""
    target_modules: tuple[str, ...] | str = ("q_proj", "k_proj", "v_proj", "o_proj")
    """As PEFT takes them: names (the last parts of a module's path), a regular expression on its full path, or
    ``all-linear`` for every linear layer but the output head."""
