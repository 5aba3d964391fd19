"""A model's adapter to a folder, and from a folder onto a base."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from mtl_lora.config import MTLLoRAConfig
from mtl_lora.core import AdapterCore
from mtl_lora.errors import AdapterFileError, ConfigError, MTLLoRAError
from mtl_lora.files import CONFIG_FILE, check_base, check_tensors, read_adapter, write_adapter

__all__ = ["load", "save"]

ModelT = TypeVar("ModelT", bound=AdapterCore)


def save(model: AdapterCore, folder: str | os.PathLike[str], state_dict: Mapping[str, Tensor] | None = None) -> None:
    """Write a model's adapter; see :meth:`mtl_lora.model.AdapterModel.save_pretrained`."""
    if model.merged_task is not None:
        raise MTLLoRAError("a merged model cannot be saved as an adapter; unmerge() first")
    tensors: Mapping[str, Tensor] = model.adapter_state_dict()
    if state_dict is not None:
        if set(state_dict) != set(tensors):
            check_tensors(tensors, state_dict)
        tensors = state_dict
    description = {
        "method": model.method,
        "config": model.adapter_config.to_dict(),
        "base": model.base_fingerprint(),
    }
    write_adapter(folder, tensors, description)


def _config_of(description: Mapping[str, Any], folder: str | os.PathLike[str]) -> MTLLoRAConfig:
    try:
        return MTLLoRAConfig.from_dict(description["config"])
    except (ConfigError, TypeError) as error:
        raise AdapterFileError(f"{Path(folder) / CONFIG_FILE} must hold a valid configuration: {error}") from error


def load(
    cls: type[ModelT],
    base: nn.Module,
    folder: str | os.PathLike[str],
    task_names: Sequence[str] | None,
    adapter_dtype: torch.dtype | None,
) -> ModelT:
    """Load an adapter onto its base; see :meth:`mtl_lora.model.AdapterModel.from_pretrained`."""
    tensors, description = read_adapter(folder)
    if description.get("method") != cls.method:
        raise AdapterFileError(
            f"the adapter's method must be {cls.method!r}, got {description.get('method')!r}; use load_adapter()"
        )
    config = _config_of(description, folder)
    if task_names is not None and tuple(task_names) != tuple(config.task_names):
        raise AdapterFileError(
            f"the adapter's tasks must be {list(task_names)}, got {list(config.task_names)}; "
            "ids follow the order of names"
        )
    model = cls(base, config, adapter_dtype)
    check_base(description["base"], model.base_fingerprint())
    model.load_adapter_state_dict(tensors)
    return model
