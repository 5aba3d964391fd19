"""MTL-LoRA (arXiv 2410.09437): one low-rank adapter for many tasks, exact, fast, on any torch model.

    >>> import torch
    >>> from mtl_lora import MTLLoRAConfig, MTLLoRAModel, parameter_groups
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
Configurations and errors need no torch: what does is imported when its name is first asked for.
"""

import importlib
from typing import TYPE_CHECKING, Any

from mtl_lora.config import MTLLoRAConfig
from mtl_lora.errors import MTLLoRAError

if TYPE_CHECKING:
    from mtl_lora.baselines import METHODS, build_adapter, load_adapter
    from mtl_lora.model import AdapterModel, MTLLoRAModel
    from mtl_lora.tasks import parameter_groups
else:  # hidden from type checkers, for which a module's __getattr__ gives every name there is not

    def __getattr__(name: str) -> Any:
        if name not in _MODULES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        value = getattr(importlib.import_module(_MODULES[name]), name)
        globals()[name] = value
        return value


_MODULES = {
    "METHODS": "mtl_lora.baselines",
    "AdapterModel": "mtl_lora.model",
    "MTLLoRAModel": "mtl_lora.model",
    "build_adapter": "mtl_lora.baselines",
    "load_adapter": "mtl_lora.baselines",
    "parameter_groups": "mtl_lora.tasks",
}

__version__ = "0.1.0"
"""The one place of the version: pyproject.toml reads it here, and so do packaged models, which have no metadata."""

__all__ = [
    "METHODS",
    "AdapterModel",
    "MTLLoRAConfig",
    "MTLLoRAError",
    "MTLLoRAModel",
    "__version__",
    "build_adapter",
    "load_adapter",
    "parameter_groups",
]


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
