"""Adapters on disk: tensors in safetensors, a versioned configuration, the base's fingerprint; no pickles.

``FOLDER/adapter_model.safetensors`` holds exactly the tensors that trained, under their path in the base.
``FOLDER/mtl_lora_config.json`` is ``{"version", "method", "config", "base"}`` and is written last: its presence marks
a complete adapter.
"""

import hashlib
import json
import os
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from mtl_lora.config import CONFIG_VERSION
from mtl_lora.errors import AdapterFileError, BaseMismatchError

__all__ = ["CONFIG_FILE", "WEIGHTS_FILE", "check_base", "check_tensors", "fingerprint", "read_adapter", "write_adapter"]

CONFIG_FILE = "mtl_lora_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
_SAMPLES_PER_TENSOR = 64


@torch.no_grad()
def fingerprint(named: Iterable[tuple[str, Tensor]]) -> dict[str, Any] | None:
    """Return what identifies a base: names and shapes, and a digest of values sampled evenly from each tensor.

    Values are rounded to bf16 first, so one checkpoint has one fingerprint whichever type it is loaded in.
    None where values cannot be read now (meta device, or partitioned by ZeRO-3).
    """
    shapes: dict[str, list[int]] = {}
    digest = hashlib.sha256()
    for name, tensor in sorted(named):
        if tensor.is_meta or hasattr(tensor, "ds_id"):
            return None
        shapes[name] = list(tensor.shape)
        flat = tensor.detach().reshape(-1)
        step = max(1, flat.numel() // _SAMPLES_PER_TENSOR)
        sample = flat[::step][:_SAMPLES_PER_TENSOR].to("cpu", torch.float32).to(torch.bfloat16)
        digest.update(f"{name}{shapes[name]}".encode())
        digest.update(sample.view(torch.int16).numpy().tobytes())
    return {"sha256": digest.hexdigest(), "tensors": len(shapes), "shapes_sha256": _digest_of(shapes)}


def _digest_of(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def check_base(saved: Mapping[str, Any] | None, present: Mapping[str, Any] | None) -> None:
    """Compare two fingerprints; an unknown one (None) is not compared.

    Raises:
        BaseMismatchError: they differ; the message says whether in structure or in values.
    """
    if saved is None or present is None or saved["sha256"] == present["sha256"]:
        return
    if saved["shapes_sha256"] != present["shapes_sha256"]:
        difference = f"other tensors or shapes ({saved['tensors']} tensors then, {present['tensors']} now)"
    else:
        difference = "the same shapes with other values"
    raise BaseMismatchError(
        f"an adapter must be loaded onto the base it was trained on, got a base with {difference}: fingerprint "
        f"{present['sha256'][:12]}, expected {saved['sha256'][:12]}; load the original base"
    )


def check_tensors(expected: Mapping[str, Tensor], given: Mapping[str, Tensor]) -> None:
    """Check that two sets of tensors have the same names and shapes.

    Raises:
        AdapterFileError: names the missing, the surplus and the differently shaped tensors.
    """
    missing, surplus = sorted(set(expected) - set(given)), sorted(set(given) - set(expected))
    shapes = [
        f"{name} {tuple(given[name].shape)} instead of {tuple(expected[name].shape)}"
        for name in sorted(set(expected) & set(given))
        if given[name].shape != expected[name].shape
    ]
    found = {"missing": missing, "surplus": surplus, "of another shape": shapes}
    problems = [f"{len(names)} {what} ({', '.join(names[:3])})" for what, names in found.items() if names]
    if problems:
        raise AdapterFileError(
            f"an adapter must hold exactly the model's adapter tensors, got {'; '.join(problems)}; "
            "load it with the configuration it was saved with"
        )


def write_adapter(
    folder: str | os.PathLike[str], tensors: Mapping[str, Tensor], description: Mapping[str, Any]
) -> None:
    """Write an adapter's tensors, then its description, each replaced in one step.

    Args:
        folder: made when missing.
        tensors: by name.
        description: ``method``, ``config``, ``base``; the version is added here.
    """
    target = Path(folder)
    target.mkdir(parents=True, exist_ok=True)
    (target / CONFIG_FILE).unlink(missing_ok=True)
    plain = {name: tensor.detach().to("cpu").contiguous().clone() for name, tensor in tensors.items()}
    with tempfile.TemporaryDirectory(dir=target) as temporary:
        staged = Path(temporary)
        save_file(plain, staged / WEIGHTS_FILE, metadata={"format": "pt"})
        text = json.dumps({"version": CONFIG_VERSION, **description}, indent=2, sort_keys=True)
        (staged / CONFIG_FILE).write_text(text + "\n", encoding="utf-8")
        for name in (WEIGHTS_FILE, CONFIG_FILE):
            (staged / name).replace(target / name)


def read_adapter(folder: str | os.PathLike[str]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return an adapter's tensors and description.

    Raises:
        AdapterFileError: a file is missing or the version is unknown.
    """
    source = Path(folder)
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        if not (source / name).is_file():
            raise AdapterFileError(
                f"an adapter's folder must hold {name}, got none in {source}; was it saved completely?"
            )
    try:
        description: dict[str, Any] = json.loads((source / CONFIG_FILE).read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise AdapterFileError(f"{source / CONFIG_FILE} must be JSON, got {error}; save the adapter again") from error
    if description.get("version") != CONFIG_VERSION:
        raise AdapterFileError(
            f"the adapter's version must be {CONFIG_VERSION}, got {description.get('version')!r}; "
            "use the release of this library that wrote it"
        )
    return load_file(source / WEIGHTS_FILE), description
