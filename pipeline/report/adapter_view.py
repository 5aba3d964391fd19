"""What a saved MTL-LoRA adapter shows of its tasks: mixing weights and distances of their transformations.

Read off the safetensors alone; the base model is not loaded.
Axes: T tasks, N up-projections, R rank.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mtl_lora import MTLLoRAError
from pipeline.errors import InputError
from pipeline.evaluation.score_table import Floats

MIXING, TRANSFORM, TEMPERATURE = "lora_mixing", "lora_transform", "lora_temperature"


@dataclass(frozen=True)
class AdapterView:
    """How an adapter's tasks share it.

    Args:
        mixing: task → weight of each up-projection, mean over the adapted layers.
        lambda_distance: task → task → Frobenius distance of their Λ over the mean of their norms, mean over layers.
    """

    mixing: dict[str, list[float]]
    lambda_distance: dict[str, dict[str, float]]


def adapter_view(folder: Path) -> AdapterView | None:
    """Return the view of a saved adapter; None where its method has no mixing weights or transformations.

    Raises:
        InputError: the folder holds no adapter, a damaged one, or one of another version.
    """
    from mtl_lora.files import read_adapter  # takes torch along; numpy alone has no bfloat16

    try:
        loaded, described = read_adapter(folder)
    except MTLLoRAError as error:
        raise InputError(f"adapter folder {folder}: {error}") from error
    if described["method"] != "mtl_lora":
        return None
    config: dict[str, Any] = described["config"]
    tasks = list(config["task_names"])
    tensors = {path: tensor.double().numpy() for path, tensor in loaded.items()}
    mixing = []
    for path, tensor in tensors.items():
        if path.endswith(MIXING):
            factor = np.exp(tensors.get(path.removesuffix(MIXING) + TEMPERATURE, np.zeros(1)))
            mixing.append(_softmax(tensor / (config["temperature"] * factor)))
    transforms = [tensor for path, tensor in tensors.items() if path.endswith(TRANSFORM)]
    if not mixing or not transforms:
        return None
    mean = np.mean(mixing, axis=0)
    distances = np.mean([_distances(tensor) for tensor in transforms], axis=0)
    return AdapterView(
        {task: mean[t].tolist() for t, task in enumerate(tasks)},
        {a: {b: float(distances[i, j]) for j, b in enumerate(tasks)} for i, a in enumerate(tasks)},
    )


def _softmax(logits_TN: Floats) -> Floats:
    powers = np.exp(logits_TN - logits_TN.max(axis=1, keepdims=True))
    return powers / powers.sum(axis=1, keepdims=True)


def _distances(transform: Floats) -> Floats:
    """Return the (T, T) distances of one layer's transformations, (T, R, R) or their diagonals (T, R)."""
    flat = transform.reshape(len(transform), -1)
    norms = np.linalg.norm(flat, axis=1)
    apart = np.linalg.norm(flat[:, None] - flat[None], axis=2)
    return apart / np.maximum((norms[:, None] + norms[None]) / 2, 1e-12)
