"""Adapters on disk: tensors in safetensors, a versioned configuration, the base's fingerprint; no pickles.

``FOLDER/adapter_model.safetensors`` holds exactly the tensors that trained, under their path in the base.
``FOLDER/mtl_lora_config.json`` is ``{"version", "method", "config", "base"}`` and is written last: its presence marks
a complete adapter. ``FOLDER/SHA256SUMS`` tells damage (:mod:`mtl_lora.hashes`).
"""

import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from mtl_lora.config import CONFIG_VERSION
from mtl_lora.errors import AdapterFileError, BaseMismatchError
from mtl_lora.hashes import check_hashes, write_hashes

__all__ = [
    "CONFIG_FILE",
    "WEIGHTS_FILE",
    "WeightsElsewhere",
    "check_base",
    "check_tensors",
    "fingerprint",
    "quantization_of",
    "read_adapter",
    "read_description",
    "read_tensors",
    "write_adapter",
]

CONFIG_FILE = "mtl_lora_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
_SAMPLES_PER_TENSOR = 64


def quantization_of(tensor: Tensor) -> str | None:
    """Return the kind of codes that a tensor holds instead of numbers, ``4bit`` or ``8bit``; None for a plain one.

    bitsandbytes packs two codes of 4 bit into a byte, and keeps the matrix's shape beside them.
    """
    if tensor.is_floating_point():
        return None
    return "8bit" if getattr(tensor, "quant_state", None) is None else "4bit"


class WeightsElsewhere(Protocol):
    """Where the weights of a base lie that has no memory for them, its parameters being on the meta device."""

    def read(self, parameter: Tensor) -> Tensor:
        """Return a parameter's values."""

    def reading(self, model: nn.Module) -> AbstractContextManager[None]:
        """Let a model of these parameters be called within."""


@torch.no_grad()
def fingerprint(
    named: Iterable[tuple[str, Tensor]],
    gathers: bool = False,
    elsewhere: WeightsElsewhere | None = None,
    quantization: Callable[[Tensor], str | None] = quantization_of,
) -> dict[str, Any] | None:
    """Return what identifies a base: names and shapes, and a digest of values sampled evenly from each tensor.

    Values are rounded to bf16 first, so one checkpoint has one fingerprint whichever type it is loaded in. Of quantised
    tensors the kind of codes counts instead of values, which differ in the last bit between devices.
    None where values cannot be read now (meta device, or partitioned by ZeRO-3).

    Args:
        named: the tensors by name.
        gathers: tensors that ZeRO-3 has partitioned are gathered, one at a time; every rank calls it alike.
        elsewhere: where tensors of the meta device lie; one at a time is read.
        quantization: says of a tensor the kind of codes that it is to count by, None for its values.
    """
    shapes: dict[str, list[int]] = {}
    digest, kinds = hashlib.sha256(), set()
    for name, tensor in sorted(named):
        kind = quantization(tensor)
        if kind is not None:
            shapes[name] = list(getattr(getattr(tensor, "quant_state", None), "shape", tensor.shape))
            kinds.add(kind)
            digest.update(f"{name}{shapes[name]}{kind}".encode())
            continue
        is_split = hasattr(tensor, "ds_id")
        if tensor.is_meta and elsewhere is not None:
            tensor = elsewhere.read(tensor)
        if tensor.is_meta or (is_split and not gathers):
            return None
        with _whole(tensor) if is_split else nullcontext():
            shapes[name] = list(tensor.shape)
            flat = tensor.detach().reshape(-1)
            step = max(1, flat.numel() // _SAMPLES_PER_TENSOR)
            sample = flat[::step][:_SAMPLES_PER_TENSOR].to("cpu", torch.float32).to(torch.bfloat16)
        digest.update(f"{name}{shapes[name]}".encode())
        digest.update(sample.view(torch.int16).numpy().tobytes())
    found = {"sha256": digest.hexdigest(), "tensors": len(shapes), "shapes_sha256": _digest_of(shapes)}
    return found | ({"quantization": "+".join(sorted(kinds))} if kinds else {})


@contextmanager
def _whole(parameter: Any) -> Iterator[None]:
    """Gather a partitioned parameter within, by what ZeRO-3 puts on it."""
    parameter.all_gather([parameter])
    try:
        yield
    finally:
        parameter.partition([parameter])


def _digest_of(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def check_base(saved: Mapping[str, Any] | None, present: Mapping[str, Any] | None) -> None:
    """Compare two fingerprints; an unknown one (None) is not compared.

    Raises:
        BaseMismatchError: they differ; the message says whether in structure or in values.
    """
    if saved is None or present is None or saved["sha256"] == present["sha256"]:
        return
    then, now = (found.get("quantization", "none") for found in (saved, present))
    if then != now:
        difference = f"another quantization ({then} then, {now} now)"
    elif saved["shapes_sha256"] != present["shapes_sha256"]:
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
    """Write an adapter's tensors, the files' hashes, then its description, each replaced in one step.

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
        (staged / WEIGHTS_FILE).replace(target / WEIGHTS_FILE)
        write_hashes(target, WEIGHTS_FILE, CONFIG_FILE, written_in=staged)
        (staged / CONFIG_FILE).replace(target / CONFIG_FILE)


def read_description(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """Return what an adapter says of itself: ``method``, ``config``, ``base``.

    Raises:
        AdapterFileError: the file is missing or damaged, or its version is unknown.
    """
    path = _present(folder, CONFIG_FILE)
    try:
        description = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise AdapterFileError(f"{path} must be JSON, got {error}; save the adapter again") from error
    if not isinstance(description, dict) or description.get("version") != CONFIG_VERSION:
        version = description.get("version") if isinstance(description, dict) else description
        raise AdapterFileError(
            f"the adapter's version must be {CONFIG_VERSION}, got {version!r} in {path}; "
            "use the release of this library that wrote it"
        )
    if not isinstance(description.get("config"), dict) or not _is_base(description.get("base", "missing")):
        raise AdapterFileError(f"{path} must hold 'config' and 'base', got {description}; save the adapter again")
    return description


def _is_base(value: Any) -> bool:
    fields = {"sha256": str, "shapes_sha256": str, "tensors": int}
    return value is None or (
        isinstance(value, dict) and all(isinstance(value.get(name), kind) for name, kind in fields.items())
    )


def read_tensors(folder: str | os.PathLike[str]) -> dict[str, Tensor]:
    """Return the tensors of an adapter's or an exported task's folder.

    Raises:
        AdapterFileError: the file is missing or damaged.
    """
    path = _present(folder, WEIGHTS_FILE)
    try:
        return load_file(path)
    except (SafetensorError, ValueError, KeyError, RuntimeError) as error:
        raise AdapterFileError(f"{path} must be a safetensors file, got {error}; save the adapter again") from error


def read_adapter(folder: str | os.PathLike[str]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return an adapter's tensors and description.

    Raises:
        AdapterFileError: a file is missing or damaged, or the version is unknown.
    """
    description = read_description(folder)
    return read_tensors(folder), description


def _present(folder: str | os.PathLike[str], name: str) -> Path:
    """Return the path of a file that is there and is what its hash says."""
    path = Path(folder) / name
    if not path.is_file():
        raise AdapterFileError(f"an adapter's folder must hold {name}, got none in {folder}; was it saved completely?")
    check_hashes(folder, name)
    return path
