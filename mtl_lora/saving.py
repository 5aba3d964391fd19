"""A model's adapter to a folder, and from a folder onto a base."""

import os
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from mtl_lora.config import MTLLoRAConfig
from mtl_lora.core import AdapterCore
from mtl_lora.errors import AdapterFileError, ConfigError, MTLLoRAError
from mtl_lora.files import CONFIG_FILE, check_base, check_tensors, read_adapter, write_adapter
from mtl_lora.layer import linear_sizes
from mtl_lora.targets import find_targets

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


def _check_sizes(cls: type[AdapterCore], base: nn.Module, config: MTLLoRAConfig, tensors: Mapping[str, Tensor]) -> None:
    """Check that the configuration asks for about as many parameters as there are, before any of them is made."""
    shapes = Counter(
        (*linear_sizes(base.get_submodule(path)), config.for_layer(path).r) for path in find_targets(base, config)
    )
    plain = config.replace(
        target_modules=("0",),
        layers_to_transform=(),
        layers_pattern=(),
        rank_pattern={},
        alpha_pattern={},
        modules_to_save=(),
        bias="none",
        train_layer_norms=False,
        extras_within=(),
        head_classes=(),
    )
    asked = sum(config.head_classes) * getattr(getattr(base, "config", None), "hidden_size", 1)
    try:
        for (in_features, out_features, r), number in shapes.items():
            layer = nn.Sequential(nn.Linear(in_features, out_features, bias=False, device="meta"))
            asked += number * cls(layer, plain.replace(r=r)).count_parameters()[0]
    except (TypeError, RuntimeError, OverflowError) as error:  # torch's, of sizes beyond any memory
        raise AdapterFileError(f"an adapter's configuration must ask for sizes that can be, got {config}") from error
    held = sum(tensor.numel() for tensor in tensors.values())
    if asked > 2 * held:  # less is named tensor by tensor once it is made
        raise AdapterFileError(
            f"an adapter must hold the parameters that its configuration asks for, {asked:,}, it holds {held:,}; "
            "load it with the configuration it was saved with"
        )


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
    _check_sizes(cls, base, config, tensors)
    model = cls(base, config, adapter_dtype)
    check_base(description["base"], model.base_fingerprint())
    model.load_adapter_state_dict(tensors)
    return model
