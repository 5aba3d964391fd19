"""Which adapter is put on the base model: one ``method`` key picks it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field
from torch import nn

import mtl_lora
from mtl_lora import AdapterModel, MTLLoRAError
from mtl_lora.tasks import add_task, remove_task
from pipeline.errors import InputError

METHODS_WITH_TASK_PARTS = ("mtl_lora", "moelora")
"""Methods in which something belongs to one task alone."""


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


def warm_adapter(config: AdapterConfig, base: nn.Module, folder: Path, task_names: Sequence[str]) -> AdapterModel:
    """Load a trained adapter and fit it to other tasks: new ones start from the mean of all, others are taken out.

    Args:
        config: the shape that the adapter must have.
        base: the model it was trained on.
        folder: of the trained adapter.
        task_names: tasks asked for, those that it knows in its own order, then the new ones.

    Raises:
        InputError: the adapter has another shape or base, lacks a tensor, or the tasks stand in another order.
    """
    check_shape(config, folder)
    model = load_adapter(base, folder)
    for name in [name for name in task_names if name not in model.task_names]:
        add_task(model, name)
    for name in [name for name in model.task_names if name not in task_names]:
        remove_task(model, name)
    if list(model.task_names) != list(task_names):
        raise InputError(
            f"tasks must stand in the order of the adapter to begin with, then new ones: {list(model.task_names)}, "
            f"got {list(task_names)}; reorder them"
        )
    return model


def check_shape(config: AdapterConfig, folder: Path) -> None:
    """Refuse a folder that holds no adapter, or one that training cannot begin with.

    Raises:
        InputError: it is missing, or of another method or shape than the configured one.
    """
    path = folder / "mtl_lora_config.json"
    if not path.is_file():
        raise InputError(
            f"training.warm_start must be the folder of a trained adapter, {path} is missing; mend the path"
        )
    described = json.loads(path.read_text())
    saved = {"method": described.get("method", "mtl_lora"), **described["config"]}
    fresh = config.model_dump(mode="json")
    other = {key: (saved[key], value) for key, value in fresh.items() if key in saved and not _alike(saved[key], value)}
    if other:
        words = ", ".join(f"{key} is {old!r} there and {new!r} here" for key, (old, new) in other.items())
        raise InputError(
            f"an adapter to begin with must have the configured shape, {folder}: {words}; "
            "configure the same shape, or train from scratch"
        )


def _alike(saved: Any, asked: Any) -> bool:
    return list(saved) == list(asked) if isinstance(asked, (list, tuple)) else bool(saved == asked)


def load_adapter(base: nn.Module, folder: Path, task_names: Sequence[str] | None = None) -> AdapterModel:
    """Load a saved adapter onto its base model.

    Raises:
        InputError: the folder holds none, or one of another base or other tasks.
    """
    try:
        return mtl_lora.load_adapter(base, folder, task_names)
    except (MTLLoRAError, FileNotFoundError) as error:
        raise InputError(f"adapter folder {folder}: {error}") from error
