"""One task as an ordinary PEFT LoRA folder that vLLM, LoRAX, TGI and PEFT itself serve unchanged.

A task is exactly a LoRA: ``lora_A = A``, ``lora_B = (Σᵢ αᵢ Bᵢ) Λ_t``. Folding is done in fp32, the folder is
compared with the model by outputs, and only then put in place by one rename.
"""

import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from mtl_lora.errors import ExportMismatchError

if TYPE_CHECKING:
    from mtl_lora.model import AdapterModel

__all__ = ["export_task", "lora_config", "lora_tensors"]


def lora_tensors(model: "AdapterModel", task: int) -> dict[str, Tensor]:
    """Return a task's tensors under PEFT's names, in fp32; the scaling is left to ``lora_alpha = r``."""
    tensors: dict[str, Tensor] = {}
    for path, layer in model.adapted_layers().items():
        down, up = layer.factors(task)
        tensors[f"base_model.model.{path}.lora_A.weight"] = down.float().contiguous().clone()
        tensors[f"base_model.model.{path}.lora_B.weight"] = up.float().contiguous().clone()
    return tensors


def lora_config(model: "AdapterModel", task: int) -> dict[str, Any]:
    """Return PEFT's ``adapter_config.json`` for a task."""
    layers = model.adapted_layers()
    rank = int(next(iter(layers.values())).factors(task)[0].shape[0])
    base_config = getattr(model.base_model, "config", None)
    names = sorted({path.rsplit(".", 1)[-1] for path in layers})
    known = [p for p, _ in model.base_model.named_modules() if p.rsplit(".", 1)[-1] in names]
    is_causal = type(model.base_model).__name__.endswith("ForCausalLM")
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM" if is_causal else None,
        "base_model_name_or_path": getattr(base_config, "_name_or_path", None) or None,
        "r": rank,
        "lora_alpha": rank,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": any(layer.fan_in_fan_out for layer in layers.values()),
        "target_modules": names if set(known) == set(layers) else sorted(layers),
        "inference_mode": True,
    }


def _write(folder: Path, model: "AdapterModel", task: int) -> None:
    save_file(lora_tensors(model, task), folder / "adapter_model.safetensors", metadata={"format": "pt"})
    (folder / "adapter_config.json").write_text(json.dumps(lora_config(model, task), indent=2) + "\n")
    name = model.task_names[task]
    (folder / "README.md").write_text(f"---\nlibrary_name: peft\n---\n# LoRA of task {name}\n")


@torch.no_grad()
def _verify(folder: Path, model: "AdapterModel", task: int) -> None:
    from safetensors.torch import load_file

    written = load_file(folder / "adapter_model.safetensors")
    for path, layer in model.adapted_layers().items():
        down = written[f"base_model.model.{path}.lora_A.weight"]
        up = written[f"base_model.model.{path}.lora_B.weight"]
        delta = (up @ down).to(layer.weight.device)
        expected = layer.delta_weight(task).float()
        expected = expected.t() if layer.fan_in_fan_out else expected
        if not torch.allclose(delta, expected, rtol=1e-4, atol=1e-6):
            raise ExportMismatchError(
                f"an exported layer must equal the model's, got another one at {path}; report this"
            )


def export_task(
    model: "AdapterModel", task: int | str, folder: str | os.PathLike[str], example_inputs: dict[str, Any] | None = None
) -> Path:
    """Write one task as a PEFT LoRA folder; see the module's docstring.

    Raises:
        ExportMismatchError: the folder does not reproduce the model; nothing is put in place.
    """
    target, index = Path(folder), model.task_id(task)
    target.parent.mkdir(parents=True, exist_ok=True)
    staged = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}-"))
    try:
        _write(staged, model, index)
        _verify(staged, model, index)
        if target.exists():
            shutil.rmtree(target)
        staged.replace(target)
    finally:
        shutil.rmtree(staged, ignore_errors=True)
    return target
