"""LoRA and DoRA through PEFT, under this library's interface: one adapter that all tasks share.

PEFT is imported only when a model is made. Its layers are put into the base in place; task ids are checked and then
have no effect.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from mtl_lora.config import MTLLoRAConfig
from mtl_lora.errors import MTLLoRAError
from mtl_lora.model import AdapterModel
from mtl_lora.routing import Router
from mtl_lora.targets import find_named, find_targets, replace_module

__all__ = ["PeftDoRAModel", "PeftLoRAModel"]

_ADAPTER = "default"


class PeftLoRAModel(AdapterModel):
    """LoRA (arXiv 2106.09685) by PEFT; see :class:`mtl_lora.model.AdapterModel` for the interface."""

    method = "lora"
    use_dora = False

    def __init__(self, base: nn.Module, config: MTLLoRAConfig, adapter_dtype: torch.dtype | None = None) -> None:
        nn.Module.__init__(self)
        from peft import LoraConfig, inject_adapter_in_model

        self.router, self.adapter_config, self.base_model = Router(), config, base
        self.paths = find_targets(base, config)
        saved_paths = find_named(base, config.modules_to_save)
        base.requires_grad_(False)
        peft_config = LoraConfig(
            r=config.r,
            lora_alpha=config.lora_alpha,  # type: ignore[arg-type]
            lora_dropout=config.lora_dropout,
            target_modules=self.paths,
            use_rslora=config.use_rslora,
            rank_pattern=dict(config.rank_pattern),
            alpha_pattern=dict(config.alpha_pattern),
            use_dora=self.use_dora,
        )
        inject_adapter_in_model(peft_config, base)
        for path in self.paths:
            self._cast(base.get_submodule(path), adapter_dtype)
        self._unmerged: dict[str, Tensor] = {}
        self._finish(saved_paths)

    @staticmethod
    def _cast(layer: Any, dtype: torch.dtype | None) -> None:
        dtype = dtype or torch.promote_types(layer.get_base_layer().weight.dtype, torch.float32)
        for name, parameter in layer.named_parameters():
            if "lora_" in name:
                parameter.data = parameter.data.to(dtype)

    def _layers(self) -> dict[str, Any]:
        return {path: self.base_model.get_submodule(path) for path in self.paths}

    def _adapter_parameter_ids(self) -> set[int]:
        named = (item for layer in self._layers().values() for item in layer.named_parameters())
        return {id(p) for name, p in named if "lora_" in name}

    def _bias_modules(self) -> list[nn.Module]:
        return [layer.get_base_layer() for layer in self._layers().values()]

    @property
    def merged_task(self) -> int | None:
        """0 where the adapter is merged, else None: a merged LoRA serves every task."""
        return 0 if self._unmerged else None

    def _ids_for(self, task_ids: Any) -> Tensor:
        if self.merged_task is not None and task_ids is None:
            return torch.tensor(0)
        return self._checked_ids(task_ids)

    def merge(self, task: int | str) -> None:
        """Merge the adapter, the same for every task."""
        self.task_id(task)
        if self._unmerged:
            raise MTLLoRAError("a model merges once, got a merged one; unmerge() first")
        for path, layer in self._layers().items():
            self._unmerged[path] = layer.get_base_layer().weight.data.clone()
            layer.merge(safe_merge=True)

    def merges(self, task: int) -> dict[str, Callable[[Tensor], Tensor]]:
        """Return what merges each layer's weight, the same for every task."""
        return {path: partial(self._merged_weight, layer) for path, layer in self._layers().items()}

    @staticmethod
    @torch.no_grad()
    def _merged_weight(layer: Any, weight: Tensor) -> Tensor:
        base = layer.get_base_layer()
        kept = base.weight
        base.weight = nn.Parameter(weight.clone(), requires_grad=False)
        try:
            layer.merge(safe_merge=True)
            return base.weight.detach()
        finally:
            base.weight = kept
            layer.merged_adapters.clear()

    def unmerge(self) -> None:
        """Take the adapter out again; the kept weights make it exact, where PEFT subtracts."""
        for path, layer in self._layers().items():
            if path in self._unmerged:
                layer.unmerge()
                layer.get_base_layer().weight.data.copy_(self._unmerged[path])
        self._unmerged = {}

    def merge_and_unload(self, task: int | str) -> nn.Module:
        """Return the base with the adapter merged in and ordinary layers again; this model is used up."""
        if not self._unmerged:
            self.merge(task)
        for path, layer in self.plain_layers().items():
            replace_module(self.base_model, path, layer)
        vars(self.base_model).pop("peft_config", None)
        return self.base_model

    def plain_layers(self) -> dict[str, nn.Module]:
        """Return the base's own layers by path."""
        return {path: layer.get_base_layer() for path, layer in self._layers().items()}

    @torch.no_grad()
    def lora_pairs(self, task: int) -> dict[str, dict[str, Tensor]]:
        """Return each layer's tensors by PEFT's suffixes, scaling inside ``lora_B``."""
        pairs = {}
        for path, layer in self._layers().items():
            pairs[path] = {
                "lora_A.weight": layer.lora_A[_ADAPTER].weight.float(),
                "lora_B.weight": layer.lora_B[_ADAPTER].weight.float() * layer.scaling[_ADAPTER],
            }
            if self.use_dora:
                pairs[path]["lora_magnitude_vector"] = layer.lora_magnitude_vector[_ADAPTER].weight.float()
        return pairs

    @contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """Run as the base inside."""
        for layer in self._layers().values():
            layer.enable_adapters(False)
        try:
            yield
        finally:
            for layer in self._layers().values():
                layer.enable_adapters(True)


class PeftDoRAModel(PeftLoRAModel):
    """DoRA (arXiv 2402.09353) by PEFT; exported tasks are DoRA folders, which PEFT serves."""

    method = "dora"
    use_dora = True
