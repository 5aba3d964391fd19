"""One task as an ordinary PEFT LoRA folder that vLLM, LoRAX, TGI and PEFT itself serve unchanged.

A task is exactly a LoRA: ``lora_A = A``, ``lora_B = s (Σᵢ αᵢ Bᵢ) Λ_t``. Folding is done in fp32. The folder is written
aside, read back, compared with the model by outputs, and only then put in place by one rename.
"""

import json
import os
import re
import shutil
import tempfile
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor, nn

from mtl_lora.core import AdapterCore
from mtl_lora.files import WEIGHTS_FILE, WeightsElsewhere
from mtl_lora.hashes import write_hashes
from mtl_lora.layer import is_conv1d
from mtl_lora.patterns import is_of_images, layer_number
from mtl_lora.serving import ServedBase, base_name, serving_notice, write_serving
from mtl_lora.verification import verify_export

__all__ = ["export_all", "export_task", "lora_config", "lora_ranks", "lora_tensors", "put_in_place"]


def _trained_biases(model: AdapterCore) -> dict[str, Tensor]:
    """Return the biases of adapted layers that trained, by the layer's path."""
    names = {name.removesuffix(".bias").removesuffix(".base_layer"): name for name in model.extra_parameter_names}
    return {path: model.base_model.get_parameter(names[path]) for path in model.plain_layers() if path in names}


def _modules_to_save(model: AdapterCore) -> list[str]:
    """Return the paths of the other modules with parameters that trained: heads, normalisation layers."""
    layers = model.plain_layers()
    owners = {name.rpartition(".")[0].removesuffix(".base_layer") for name in model.extra_parameter_names}
    return sorted(path for path in owners if path not in layers)


def lora_tensors(model: AdapterCore, task: int, elsewhere: WeightsElsewhere | None = None) -> dict[str, Tensor]:
    """Return a task's tensors under PEFT's names; factors in fp32, the scaling inside ``lora_B``."""
    prefix = "base_model.model."
    tensors: dict[str, Tensor] = {}
    for path, pair in model.lora_pairs(task).items():
        tensors |= {f"{prefix}{path}.{suffix}": tensor for suffix, tensor in pair.items()}
    tensors |= {f"{prefix}{path}.base_layer.bias": bias for path, bias in _trained_biases(model).items()}
    for path in _modules_to_save(model):
        for name, tensor in model.base_model.get_submodule(path).state_dict(keep_vars=True).items():
            # Of a module of which a part trains, the rest is the base's own.
            tensors[f"{prefix}{path}.{name}"] = elsewhere.read(tensor) if elsewhere and tensor.is_meta else tensor
    return {name: tensor.detach().to("cpu").clone().contiguous() for name, tensor in tensors.items()}


def _targets(base: nn.Module, layers: dict[str, nn.Module]) -> dict[str, list[Any]]:
    """Return by PEFT's keys what selects exactly the adapted layers: last parts of their paths where these do, alone
    or with the numbers of layers; else full paths, as where layers read images, which servers must be told."""
    if any(map(is_of_images, layers)):
        return {"target_modules": sorted(layers)}
    names = sorted({path.rsplit(".", 1)[-1] for path in layers})
    selected = {path: layer_number(path) for path, _ in base.named_modules() if path.rsplit(".", 1)[-1] in names}
    if set(selected) == set(layers):
        return {"target_modules": names}
    numbers = {layer_number(path) for path in layers}
    if {path for path, number in selected.items() if number in numbers} == set(layers) and None not in numbers:
        return {"target_modules": names, "layers_to_transform": sorted(n for n in numbers if n is not None)}
    return {"target_modules": sorted(layers)}


def _served_base(model: AdapterCore) -> ServedBase:
    """Return the base by the name that it was loaded by, an empty one where it has none."""
    reference = getattr(getattr(model.base_model, "config", None), "_name_or_path", None)
    digest = model.base_fingerprint()
    return ServedBase(base_name(reference) if reference else "", digest["sha256"] if digest else None)


def lora_ranks(tensors: Mapping[str, Tensor]) -> dict[str, int]:
    """Return each layer's rank by its path, from exported tensors."""
    suffix = ".lora_A.weight"
    pairs = {name.removesuffix(suffix): t.shape[0] for name, t in tensors.items() if name.endswith(suffix)}
    return {name.removeprefix("base_model.model."): rank for name, rank in pairs.items()}


def _rank_pattern(ranks: Mapping[str, int], most: int) -> dict[str, int]:
    """Return PEFT's pattern for the layers whose rank is not the most: by last parts of paths where these tell it."""
    others = {path: rank for path, rank in ranks.items() if rank != most}
    short: dict[str, set[int]] = {}
    for path, rank in ranks.items():
        short.setdefault(path.rsplit(".", 1)[-1], set()).add(rank)
    if all(len(found) == 1 for found in short.values()):
        return {re.escape(name): rank for name, (rank,) in sorted(short.items()) if rank != most}
    # A whole path would match as the end of a longer one, too: the longest come first.
    return {re.escape(path): others[path] for path in sorted(others, key=lambda p: (-len(p), p))}


def lora_config(model: AdapterCore, ranks: Mapping[str, int], name: str = "") -> dict[str, Any]:
    """Return PEFT's ``adapter_config.json``; every alpha is its rank because the scaling is inside the tensors.

    Args:
        model: any adapted model.
        ranks: of its exported pairs, by the layer's path. ``r`` is the largest, which is what servers make room for.
        name: of the base.
    """
    rank = max(ranks.values())
    pattern = _rank_pattern(ranks, rank)
    layers = model.plain_layers()
    is_causal = type(model.base_model).__name__.endswith("ForCausalLM")
    kind = "CAUSAL_LM" if is_causal else "FEATURE_EXTRACTION" if model.task_heads is not None else None
    return {
        "peft_type": "LORA",
        "task_type": kind,
        "base_model_name_or_path": name or None,
        "r": rank,
        "lora_alpha": rank,
        **({"rank_pattern": pattern, "alpha_pattern": pattern} if pattern else {}),
        "lora_dropout": 0.0,
        "use_rslora": False,
        "use_dora": model.method == "dora",
        "bias": "lora_only" if _trained_biases(model) else "none",
        "fan_in_fan_out": any(is_conv1d(layer) for layer in layers.values()),
        "modules_to_save": _modules_to_save(model) or None,
        **_targets(model.base_model, layers),
        "inference_mode": True,
    }


def _model_card(
    model: AdapterCore, task: int, config: dict[str, Any], base: ServedBase, further: list[str], verdict: str
) -> str:
    name = model.task_names[task]
    head = ["---", "library_name: peft", *([f"base_model: {base.name}"] if base.name else [])]
    head += ["tags: [lora, mtl-lora]", "---"]
    at_most = " or less, by `rank_pattern`" if "rank_pattern" in config else ""
    facts = [
        f"* One of {len(model.task_names)} tasks trained together with the method `{model.method}`.",
        f"* Rank {config['r']}{at_most}; the scaling is inside `lora_B`, hence `lora_alpha = r`.",
        f"* Adapted modules: {', '.join(config['target_modules'][:12])}",
        f"* Verified before it was written: {verdict}",
        "* `sha256sum -c SHA256SUMS` tells whether the files are still what was written.",
    ]
    facts += [f"* Base: {base.note}"] if base.note else []
    facts += [f"* `{file}` stands beside the adapter." for file in further]
    if config["modules_to_save"] or config["bias"] != "none" or config["use_dora"]:
        facts.append("* Holds more than plain LoRA pairs: PEFT serves it, vLLM and LoRAX do not.")
    use = ["```python", "from peft import PeftModel", "model = PeftModel.from_pretrained(base, FOLDER)", "```"]
    return "\n".join([*head, f"# LoRA for the task `{name}`", "", *facts, "", *use]) + "\n"


def export_task(
    model: AdapterCore,
    task: int | str,
    folder: str | os.PathLike[str],
    example_inputs: Any = None,
    base: ServedBase | None = None,
    further_files: Mapping[str, str | bytes] | None = None,
    elsewhere: WeightsElsewhere | None = None,
) -> Path:
    """Write one task as a PEFT LoRA folder: tensors, configuration, model card, and ``SHA256SUMS`` of these.

    Args:
        model: any adapted model, not merged.
        task: name or id.
        folder: replaced as a whole once the new one is verified.
        example_inputs: a dict of keyword or a tuple of positional inputs of the base, on which outputs are compared.
            None makes token ids for a Hugging Face language model; other bases are then compared layer by layer.
        base: how the base is called elsewhere; None takes the name that it was loaded by, of a folder the last part.
        further_files: texts or bytes by file name that belong to the folder, listed in ``SHA256SUMS`` too.
        elsewhere: where the base's weights lie, where it has no memory for them.

    Raises:
        ExportMismatchError: the folder does not reproduce the model; what stood at ``folder`` is left as it was.
    """
    target, index, base = Path(folder), model.task_id(task), base or _served_base(model)
    further = dict(further_files or {})
    target.parent.mkdir(parents=True, exist_ok=True)
    staged = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}-"))
    try:
        tensors = lora_tensors(model, index, elsewhere)
        config = lora_config(model, lora_ranks(tensors), base.name)
        save_file(tensors, staged / WEIGHTS_FILE, metadata={"format": "pt"})
        (staged / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        verdict = verify_export(model, index, staged, example_inputs, elsewhere)
        card = _model_card(model, index, config, base, list(further), verdict)
        for name, text in {**further, "README.md": card}.items():
            (staged / name).write_bytes(text if isinstance(text, bytes) else text.encode())
        write_hashes(staged, WEIGHTS_FILE, "adapter_config.json", "README.md", *further)
        put_in_place(staged, target)
    finally:
        shutil.rmtree(staged, ignore_errors=True)
    return target


def put_in_place(staged: Path, target: Path) -> None:
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


def export_all(
    model: AdapterCore, folder: str | os.PathLike[str], example_inputs: Any = None, base: ServedBase | None = None
) -> dict[str, Path]:
    """Write every task to ``FOLDER/TASK``, ``serving.json`` last; return the folders by task.

    What keeps vLLM from serving them is a warning; :func:`mtl_lora.serving.write_serving` says what the file holds.

    Raises:
        ExportMismatchError: as :func:`export_task`.
    """
    root, base = Path(folder), base or _served_base(model)
    root.mkdir(parents=True, exist_ok=True)
    folders = {name: export_task(model, name, root / name, example_inputs, base) for name in model.task_names}
    if notice := serving_notice(write_serving(root, list(folders), base)):
        warnings.warn(notice, stacklevel=2)
    return folders
