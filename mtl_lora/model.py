"""The models that users meet: an adapter on a base, with its files, tasks and exports as methods."""

import os
from collections.abc import Sequence
from typing import Self

import torch
from torch import Tensor, nn

from mtl_lora import export, saving, tasks
from mtl_lora.config import MTLLoRAConfig
from mtl_lora.core import AdapterCore
from mtl_lora.layer import AdaptedLinear, MTLLoRALinear

__all__ = ["AdapterModel", "MTLLoRAModel"]


class AdapterModel(AdapterCore):
    """A base model whose targets are adapted layers; the base of every method in this library.

    Construction, running and merging: :class:`mtl_lora.core.AdapterCore`.
    """

    def save_pretrained(self, folder: str | os.PathLike[str], state_dict: dict[str, Tensor] | None = None) -> None:
        """Write the adapter: safetensors, versioned configuration, the base's fingerprint.

        Args:
            folder: made when missing.
            state_dict: the adapter's tensors where the parameters are partitioned and were gathered by the caller.

        Raises:
            MTLLoRAError: the model is merged.
            AdapterFileError: ``state_dict`` does not cover the adapter exactly.
        """
        saving.save(self, folder, state_dict)

    @classmethod
    def from_pretrained(
        cls,
        base: nn.Module,
        folder: str | os.PathLike[str],
        task_names: Sequence[str] | None = None,
        adapter_dtype: torch.dtype | None = None,
    ) -> Self:
        """Load an adapter onto its base.

        Args:
            base: the base that the adapter was trained on.
            folder: written by :meth:`save_pretrained`.
            task_names: the tasks expected, in order; None takes what the folder holds.
            adapter_dtype: as in the constructor.

        Raises:
            BaseMismatchError: the base's fingerprint differs.
            AdapterFileError: tensors are missing, surplus or of another shape, or the method or tasks differ.
        """
        return saving.load(cls, base, folder, task_names, adapter_dtype)

    # --- tasks and export: functions of modules of their own, as methods ----------------------------------------------

    add_task = tasks.add_task
    remove_task = tasks.remove_task
    rename_task = tasks.rename_task
    freeze_shared = tasks.freeze_shared
    unfreeze = tasks.unfreeze
    export_task = export.export_task
    export_all = export.export_all


class MTLLoRAModel(AdapterModel):
    """MTL-LoRA on any model (arXiv 2410.09437); see :class:`AdapterModel` for the interface.

    Example:
        >>> import torch
        >>> from mtl_lora import MTLLoRAConfig, MTLLoRAModel
        >>> base = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 4))
        >>> config = MTLLoRAConfig(task_names=["clicks", "relevance"], r=2, target_modules=["0", "2"])
        >>> model = MTLLoRAModel(base, config)
        >>> model.print_trainable_parameters()
        trainable params: 196 || all params: 408 || trainable%: 48.0392
        >>> y = model(torch.randn(3, 8), task_ids=torch.tensor([0, 1, 1]))
        >>> y.shape
        torch.Size([3, 4])
        >>> type(model.merge_and_unload("clicks")[0]).__name__
        'Linear'
    """

    method = "mtl_lora"

    def _make_layer(self, layer: nn.Module, config: MTLLoRAConfig, dtype: torch.dtype) -> AdaptedLinear:
        return MTLLoRALinear(layer, config, self.router, dtype)
