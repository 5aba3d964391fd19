"""MTL-LoRA (arXiv 2410.09437): one low-rank adapter for many tasks, exact, fast, on any torch model.

    >>> import torch
    >>> from mtl_lora import MTLLoRAConfig, MTLLoRAModel
    >>> base = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 4))
    >>> model = MTLLoRAModel(base, MTLLoRAConfig(["clicks", "relevance"], r=2, target_modules="all-linear"))
    >>> optimizer = torch.optim.AdamW(parameter_groups(model, weight_decay=0.01), lr=1e-3)
    >>> x, task_ids = torch.randn(6, 8), torch.tensor([0, 1, 1, 0, 0, 1])
    >>> model(x, task_ids=task_ids).square().mean().backward()
    >>> optimizer.step()
    >>> plain = model.merge_and_unload("clicks")
    >>> plain(x).shape
    torch.Size([6, 4])

Needs torch and safetensors alone; PEFT is used where it is installed, to verify exports and for two baselines.
"""

from mtl_lora.baselines import METHODS, build_adapter, load_adapter
from mtl_lora.config import MTLLoRAConfig
from mtl_lora.errors import MTLLoRAError
from mtl_lora.model import AdapterModel, MTLLoRAModel
from mtl_lora.tasks import parameter_groups

__all__ = [
    "METHODS",
    "AdapterModel",
    "MTLLoRAConfig",
    "MTLLoRAError",
    "MTLLoRAModel",
    "build_adapter",
    "load_adapter",
    "parameter_groups",
]
