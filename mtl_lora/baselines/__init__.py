"""The methods that MTL-LoRA is compared with, under the same interface; one name picks.

* ``lora``, ``dora``: one adapter for all tasks, through PEFT.
* ``lora_per_task``: one LoRA a task, nothing shared.
* ``multilora``: parallel LoRAs with learned scales (arXiv 2311.11501).
* ``moelora``: experts gated by the task (arXiv 2310.18339), as in the MTL-LoRA paper's comparison.
"""

import os
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from mtl_lora.baselines.lora_per_task import LoRAPerTaskModel
from mtl_lora.baselines.moelora import MoELoRAModel
from mtl_lora.baselines.multilora import MultiLoRAModel
from mtl_lora.baselines.peft_lora import PeftDoRAModel, PeftLoRAModel
from mtl_lora.config import MTLLoRAConfig
from mtl_lora.errors import AdapterFileError, ConfigError
from mtl_lora.files import read_description
from mtl_lora.model import AdapterModel, MTLLoRAModel

__all__ = [
    "METHODS",
    "LoRAPerTaskModel",
    "MoELoRAModel",
    "MultiLoRAModel",
    "PeftDoRAModel",
    "PeftLoRAModel",
    "build_adapter",
    "load_adapter",
]

METHODS: dict[str, type[AdapterModel]] = {
    cls.method: cls
    for cls in (MTLLoRAModel, PeftLoRAModel, LoRAPerTaskModel, PeftDoRAModel, MultiLoRAModel, MoELoRAModel)
}
"""Classes by the name that a ``method:`` key gives."""


def build_adapter(
    method: str,
    base: nn.Module,
    task_names: Sequence[str],
    adapter_dtype: torch.dtype | None = None,
    **options: Any,
) -> AdapterModel:
    """Put a fresh adapter of any method on a base.

    Args:
        method: a key of :data:`METHODS`.
        base: any torch module; changed in place.
        task_names: one name a task.
        adapter_dtype: see :class:`mtl_lora.model.AdapterModel`.
        **options: the other fields of :class:`mtl_lora.config.MTLLoRAConfig`. ``num_up_projections`` is the number of
            parallel LoRAs (multilora) or of experts (moelora); a method leaves fields aside that it has no use for.

    Raises:
        ConfigError: the method or a field is unknown, or a value is out of range.
        TargetError: a target matches nothing.
    """
    if method not in METHODS:
        raise ConfigError(f"method must be one of {sorted(METHODS)}, got {method!r}; 'mtl_lora' is this library's own")
    return METHODS[method](base, MTLLoRAConfig.from_dict({"task_names": task_names, **options}), adapter_dtype)


def load_adapter(
    base: nn.Module,
    folder: str | os.PathLike[str],
    task_names: Sequence[str] | None = None,
    adapter_dtype: torch.dtype | None = None,
) -> AdapterModel:
    """Load an adapter of whichever method the folder holds onto its base.

    Raises:
        AdapterFileError: the folder is incomplete or does not fit; see ``from_pretrained``.
    """
    method = read_description(folder).get("method")
    if not isinstance(method, str) or method not in METHODS:
        raise AdapterFileError(f"an adapter's method must be one of {sorted(METHODS)}, got {method!r} in {folder}")
    return METHODS[method].from_pretrained(base, folder, task_names, adapter_dtype)
