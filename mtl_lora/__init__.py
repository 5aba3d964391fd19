"""MTL-LoRA (arXiv 2410.09437): one low-rank adapter for many tasks, exact, fast, on any torch model."""

from mtl_lora.config import MTLLoRAConfig
from mtl_lora.errors import MTLLoRAError
from mtl_lora.model import AdapterModel, MTLLoRAModel

__all__ = ["AdapterModel", "MTLLoRAConfig", "MTLLoRAError", "MTLLoRAModel"]
