"""One task as an ordinary PEFT LoRA folder that vLLM, LoRAX, TGI and PEFT itself serve unchanged.

A task is exactly a LoRA: ``lora_A = A``, ``lora_B = s (Σᵢ αᵢ Bᵢ) Λ_t``. Folding is done in fp32. The folder is written
aside, read back, compared with the model by outputs, and only then put in place by one rename.
"""

import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor, nn

from mtl_lora.core import AdapterCore
from mtl_lora.files import WEIGHTS_FILE
from mtl_lora.hashes import write_hashes
from mtl_lora.layer import is_conv1d
from mtl_lora.verification import verify_export

__all__ = ["export_all", "export_task", "lora_config", "lora_tensors"]

_VLLM_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""The values that vLLM accepts for ``--max-lora-rank``."""


def _trained_biases(model: AdapterCore) -> dict[str, Tensor]:
    """Return the biases of adapted layers that trained, by the layer's path."""
    names = {name.removesuffix(".bias").removesuffix(".base_layer"): name for name in model.extra_parameter_names}
    return {path: model.base_model.get_parameter(names[path]) for path in model.plain_layers() if path in names}


def _modules_to_save(model: AdapterCore) -> list[str]:
    """Return the paths of the other modules with parameters that trained: heads, normalisation layers."""
    layers = model.plain_layers()
    owners = {name.rpartition(".")[0].removesuffix(".base_layer") for name in model.extra_parameter_names}
    return sorted(path for path in owners if path not in layers)


def lora_tensors(model: AdapterCore, task: int) -> dict[str, Tensor]:
    """Return a task's tensors under PEFT's names; factors in fp32, the scaling inside ``lora_B``."""
    prefix = "base_model.model."
    tensors: dict[str, Tensor] = {}
    for path, pair in model.lora_pairs(task).items():
        tensors |= {f"{prefix}{path}.{suffix}": tensor for suffix, tensor in pair.items()}
    tensors |= {f"{prefix}{path}.base_layer.bias": bias for path, bias in _trained_biases(model).items()}
    for path in _modules_to_save(model):
        for name, parameter in model.base_model.get_submodule(path).state_dict().items():
            tensors[f"{prefix}{path}.{name}"] = parameter
    return {name: tensor.detach().to("cpu").clone().contiguous() for name, tensor in tensors.items()}


def _target_names(base: nn.Module, layers: dict[str, nn.Module]) -> list[str]:
    """Return the shortest names that select exactly the adapted layers: last parts where they do, else full paths."""
    names = sorted({path.rsplit(".", 1)[-1] for path in layers})
    selected = {path for path, _ in base.named_modules() if path.rsplit(".", 1)[-1] in names}
    return names if selected == set(layers) else sorted(layers)


def lora_config(model: AdapterCore, rank: int) -> dict[str, Any]:
    """Return PEFT's ``adapter_config.json``; ``lora_alpha = r`` because the scaling is inside the tensors."""
    layers = model.plain_layers()
    base_config = getattr(model.base_model, "config", None)
    is_causal = type(model.base_model).__name__.endswith("ForCausalLM")
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM" if is_causal else None,
        "base_model_name_or_path": getattr(base_config, "_name_or_path", None) or None,
        "r": rank,
        "lora_alpha": rank,
        "lora_dropout": 0.0,
        "use_rslora": False,
        "use_dora": model.method == "dora",
        "bias": "lora_only" if _trained_biases(model) else "none",
        "fan_in_fan_out": any(is_conv1d(layer) for layer in layers.values()),
        "modules_to_save": _modules_to_save(model) or None,
        "target_modules": _target_names(model.base_model, layers),
        "inference_mode": True,
    }


def _model_card(model: AdapterCore, task: int, config: dict[str, Any], verdict: str) -> str:
    name, base = model.task_names[task], config["base_model_name_or_path"]
    head = ["---", "library_name: peft", *([f"base_model: {base}"] if base else []), "tags: [lora, mtl-lora]", "---"]
    facts = [
        f"* One of {len(model.task_names)} tasks trained together with the method `{model.method}`.",
        f"* Rank {config['r']}; the scaling is inside `lora_B`, hence `lora_alpha = r`.",
        f"* Adapted modules: {', '.join(config['target_modules'][:12])}",
        f"* Verified before it was written: {verdict}",
        "* `sha256sum -c SHA256SUMS` tells whether the files are still what was written.",
    ]
    if config["modules_to_save"] or config["bias"] != "none":
        facts.append("* Holds trained modules or biases besides the LoRA pairs: PEFT serves it, vLLM and LoRAX do not.")
    use = ["```python", "from peft import PeftModel", "model = PeftModel.from_pretrained(base, FOLDER)", "```"]
    return "\n".join([*head, f"# LoRA for the task `{name}`", "", *facts, "", *use]) + "\n"


def export_task(
    model: AdapterCore, task: int | str, folder: str | os.PathLike[str], example_inputs: Any = None
) -> Path:
    """Write one task as a PEFT LoRA folder: tensors, configuration, model card, and ``SHA256SUMS`` of these.

    Args:
        model: any adapted model, not merged.
        task: name or id.
        folder: replaced as a whole once the new one is verified.
        example_inputs: a dict of keyword or a tuple of positional inputs of the base, on which outputs are compared.
            None makes token ids for a Hugging Face language model; other bases are then compared layer by layer.

    Raises:
        ExportMismatchError: the folder does not reproduce the model; what stood at ``folder`` is left as it was.
    """
    target, index = Path(folder), model.task_id(task)
    target.parent.mkdir(parents=True, exist_ok=True)
    staged = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}-"))
    try:
        tensors = lora_tensors(model, index)
        rank = next(t.shape[0] for name, t in tensors.items() if name.endswith("lora_A.weight"))
        config = lora_config(model, rank)
        save_file(tensors, staged / WEIGHTS_FILE, metadata={"format": "pt"})
        (staged / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        verdict = verify_export(model, index, staged, example_inputs)
        (staged / "README.md").write_text(_model_card(model, index, config, verdict), encoding="utf-8")
        write_hashes(staged, WEIGHTS_FILE, "adapter_config.json", "README.md")
        _put_in_place(staged, target)
    finally:
        shutil.rmtree(staged, ignore_errors=True)
    return target


def _put_in_place(staged: Path, target: Path) -> None:
    """Rename the new folder to its place; an old one is moved aside first and comes back if that fails."""
    staged.chmod(0o755)
    if not target.exists():
        staged.replace(target)
        return
    aside = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}-old-"))
    target.replace(aside / "old")
    try:
        staged.replace(target)
    except OSError:
        (aside / "old").replace(target)
        raise
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def export_all(model: AdapterCore, folder: str | os.PathLike[str], example_inputs: Any = None) -> dict[str, Path]:
    """Write every task to ``FOLDER/TASK`` and the serving files; return the folders by task.

    ``serving.json``, written last, lists the adapters and the commands: vLLM's ``--lora-modules``, and for LoRAX,
    which loads adapters on request, the request parameters of each task. Paths in it are relative to ``FOLDER``.

    Raises:
        ExportMismatchError: as :func:`export_task`.
    """
    root = Path(folder)
    root.mkdir(parents=True, exist_ok=True)
    folders = {name: export_task(model, name, root / name, example_inputs) for name in model.task_names}
    configs = {name: json.loads((path / "adapter_config.json").read_text()) for name, path in folders.items()}
    rank = max(config["r"] for config in configs.values())
    base = next(iter(configs.values()))["base_model_name_or_path"] or "BASE_MODEL"
    allowed = next((value for value in _VLLM_RANKS if value >= rank), rank)
    vllm = ["vllm", "serve", base, "--enable-lora", "--max-lora-rank", str(allowed)]
    vllm += ["--max-loras", str(len(folders)), "--lora-modules", *[f"{name}={name}" for name in folders]]
    serving = {
        "schema": 1,
        "base_model": base,
        "adapters": [{"name": name, "path": name, "r": config["r"]} for name, config in configs.items()],
        "vllm": {"command": vllm, "request": {"model": "TASK"}},
        "lorax": {
            "command": ["lorax-launcher", "--model-id", base, "--adapter-source", "local"],
            "requests": {name: {"adapter_id": name, "adapter_source": "local"} for name in folders},
        },
    }
    staged = root / ".serving.json"
    staged.write_text(json.dumps(serving, indent=2) + "\n", encoding="utf-8")
    staged.replace(root / "serving.json")
    return folders
