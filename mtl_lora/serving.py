"""How exported tasks are served: ``serving.json`` beside them, and what a server would refuse. Needs no torch.

vLLM's rules are those of its ``vllm/lora/peft_helper.py`` (``_validate_features``, ``validate_legal``) and
``vllm/config/lora.py``; it makes room for one rank, ``r``, in which a layer's pair may be smaller. LoRAX
(``server/lorax_server/adapters/lora.py``) reads the LoRA pairs and nothing else, stacks those of all layers, and passes
over a kind of module that lacks its pair in any layer.
"""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mtl_lora.patterns import is_of_images, layer_number

__all__ = ["SERVING_FILE", "ServedBase", "base_name", "serving_notice", "write_serving"]

SERVING_FILE = "serving.json"
_VLLM_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""The values that vLLM accepts for ``--max-lora-rank``."""
_VLLM_DEFAULT_RANK = 16
_UNNAMED = "BASE_MODEL"


@dataclass(frozen=True)
class ServedBase:
    """The base under exported tasks, as other machines know it.

    Args:
        name: of the model, never a path of this machine; empty where it has none.
        fingerprint: sha256 of :func:`mtl_lora.files.fingerprint`; None where it was not taken.
        folder: what servers load instead of the name, relative to the folder of all exports: the model of that name
            would answer otherwise.
        command: writes that folder; run in the folder of all exports.
        note: why the name alone does not do.
    """

    name: str
    fingerprint: str | None = None
    folder: str | None = None
    command: tuple[str, ...] = ()
    note: str = ""


def base_name(reference: str) -> str:
    """Return the name of a model that was loaded by a Hub's name or from a folder: never a path of this machine.

    A folder gives its own name, a snapshot in a Hub's cache (``models--OWNER--NAME/snapshots/COMMIT``) the Hub's.

    Example:
        >>> from mtl_lora.serving import base_name
        >>> base_name("/data/models/llama-3-8b/")
        'llama-3-8b'
        >>> base_name("owner/name")
        'owner/name'
    """
    path = Path(reference).expanduser()
    if not (path.is_absolute() or path.is_dir() or reference.startswith(".")):
        return reference
    path = path.resolve()
    repository = path.parent.parent.name
    if path.parent.name == "snapshots" and repository.startswith("models--"):
        return repository.removeprefix("models--").replace("--", "/")
    return path.name


def _beyond_pairs(config: Mapping[str, Any]) -> list[str]:
    """Return what an export holds besides LoRA pairs, by the keys of its ``adapter_config.json``."""
    found = ["DoRA (use_dora)"] if config["use_dora"] else []
    if config["bias"] != "none":
        found.append(f"trained biases (bias: {config['bias']})")
    if config["modules_to_save"]:
        found.append(f"trained modules (modules_to_save: {', '.join(config['modules_to_save'])})")
    if any(is_of_images(path) for path in config.get("target_modules", ())):
        found.append("adapted layers of a vision tower or a connector (target_modules)")
    if config.get("task_type") == "FEATURE_EXTRACTION":
        found.append("a head beside the adapter (task_type: FEATURE_EXTRACTION)")
    return found


def _vllm(base: str, configs: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    rank = max(config["r"] for config in configs.values())
    refused = {what: None for config in configs.values() for what in _beyond_pairs(config)}
    if rank > _VLLM_RANKS[-1]:
        refused[f"rank {rank} (its --max-lora-rank is at most {_VLLM_RANKS[-1]})"] = None
    if refused:
        return {"command": None, "refuses": list(refused), "request": None}
    allowed = next(value for value in _VLLM_RANKS if value >= rank)
    command = ["vllm", "serve", base, "--enable-lora", "--max-lora-rank", str(allowed)]
    command += ["--max-loras", str(len(configs)), "--lora-modules", *[f"{name}={name}" for name in configs]]
    found: dict[str, Any] = {"command": command, "refuses": [], "request": {"model": "TASK"}}
    if rank > _VLLM_DEFAULT_RANK:
        found["note"] = (
            f"rank {rank} is above vLLM's default --max-lora-rank of {_VLLM_DEFAULT_RANK}, at which it refuses these "
            f"adapters: keep the command's --max-lora-rank {allowed}"
        )
    return found


def _is_partial(config: Mapping[str, Any]) -> bool:
    paths = config.get("target_modules", ())
    return bool(config.get("layers_to_transform")) or any(layer_number(f"{path}.") is not None for path in paths)


def _lorax(base: str, configs: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    ignored = {what: None for config in configs.values() for what in _beyond_pairs(config)}
    if any(config.get("rank_pattern") for config in configs.values()):
        ignored["ranks that differ between layers (rank_pattern), which it stacks"] = None
    if any(map(_is_partial, configs.values())):
        ignored["adapters in some layers only, without which it leaves a module out everywhere"] = None
    if ignored:
        return {"command": None, "ignores": list(ignored), "requests": {}}
    return {
        "command": ["lorax-launcher", "--model-id", base, "--adapter-source", "local"],
        "ignores": [],
        "requests": {name: {"adapter_id": name, "adapter_source": "local"} for name in configs},
    }


def _peft(base: str, configs: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    kinds = {config.get("task_type") for config in configs.values()}
    if "SEQ_CLS" in kinds:  # each with a number of labels of its own
        return {"python": [], "request": {"python": "each task by itself, as the README.md in its folder says"}}
    auto = "AutoModel" if "FEATURE_EXTRACTION" in kinds else "AutoModelForCausalLM"
    first, *others = configs
    lines = [
        "from peft import PeftModel",
        f"from transformers import {auto}",
        f"base = {auto}.from_pretrained({base!r})",
        f"model = PeftModel.from_pretrained(base, {first!r}, adapter_name={first!r})",
        *[f"model.load_adapter({name!r}, adapter_name={name!r})" for name in others],
    ]
    return {"python": lines, "request": {"python": "model.set_adapter('TASK')"}}


def write_serving(
    folder: str | os.PathLike[str], names: Sequence[str], base: ServedBase | None = None
) -> dict[str, Any]:
    """Write ``serving.json`` beside exported tasks, in one step, and return what it holds.

    It lists the adapters and what starts vLLM (``--lora-modules``), LoRAX (which loads adapters on request: the
    parameters of each task's) and PEFT. Paths in it are relative to the folder, and commands are run there; a command
    is null where the server would refuse the adapters or answer otherwise, and ``refuses`` or ``ignores`` says why.

    Args:
        folder: that holds a folder of each name.
        names: of the exported tasks, at least one.
        base: what they stand on; None takes the name from their ``adapter_config.json``.
    """
    root = Path(folder)
    configs = {name: json.loads((root / name / "adapter_config.json").read_text(encoding="utf-8")) for name in names}
    base = base or ServedBase(next(iter(configs.values()))["base_model_name_or_path"] or "")
    name = base.name or _UNNAMED
    loaded = base.folder or name
    document = {
        "schema": 2,
        "base_model": name,
        "base": {
            "name": name,
            "fingerprint": base.fingerprint,
            "load": loaded,
            "command": list(base.command) or None,
            "note": base.note,
        },
        "adapters": [{"name": name, "path": name, "r": config["r"]} for name, config in configs.items()],
        "vllm": _vllm(loaded, configs),
        "lorax": _lorax(loaded, configs),
        "peft": _peft(loaded, configs),
    }
    staged = root / f".{SERVING_FILE}"
    staged.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    staged.replace(root / SERVING_FILE)
    return document


def serving_notice(document: Mapping[str, Any]) -> str:
    """Return in one line what a person must know to serve the adapters with vLLM, or an empty text.

    Args:
        document: what :func:`write_serving` returned.
    """
    if refused := document["vllm"]["refuses"]:
        return (
            f"vLLM refuses these adapters because of {' and '.join(refused)}: serve them with PEFT, or train an "
            "adapter without"
        )
    note: str = document["vllm"].get("note", "")
    return note
