"""Which adapter is put on the base model: one ``method`` key picks it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field
from torch import nn

import mtl_lora
from mtl_lora import AdapterModel, MTLLoRAError
from pipeline.errors import InputError


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
    target_modules: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj")


def build_adapter(config: AdapterConfig, base: nn.Module, task_names: Sequence[str]) -> AdapterModel:
    """Put a fresh adapter on a base model, whose weights are frozen.

    Raises:
        InputError: a target module matches nothing, or a value is out of range.
    """
    try:
        return mtl_lora.build_adapter(config.method, base, tuple(task_names), **config.model_dump(exclude={"method"}))
    except MTLLoRAError as error:
        raise InputError(f"adapter: {error}") from error


def load_adapter(base: nn.Module, folder: Path, task_names: Sequence[str] | None = None) -> AdapterModel:
    """Load a saved adapter onto its base model.

    Raises:
        InputError: the folder holds none, or one of another base or other tasks.
    """
    try:
        return mtl_lora.load_adapter(base, folder, task_names)
    except (MTLLoRAError, FileNotFoundError) as error:
        raise InputError(f"adapter folder {folder}: {error}") from error
