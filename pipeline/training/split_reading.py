"""Under ZeRO 3 each rank reads of a base's files what is its own: no tensor is whole on any rank while it is read.

transformers reads a tensor on one rank, gathers its place on all, sends it to all, and each keeps its part. The tensors
of safetensors files are mapped, not read, so a rank that copies its part of one touches nothing else of it. What is
whole for a moment all the same is each tensor's place, when DeepSpeed makes the empty model.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pipeline.json_text import parse_json

Gather = Callable[[Any], AbstractContextManager[Any]]
"""Within it a parameter is whole on all ranks, and what rank 0 makes of it is kept."""


@contextlib.contextmanager
def each_rank_reads_its_part(gather: Gather) -> Iterator[None]:
    """Within it, a folder's model that transformers loads under ZeRO 3 is read by every rank for itself.

    Weights that are stored otherwise than the model has them, such as one tensor an expert, are read as transformers
    does.

    Args:
        gather: for a parameter of which a rank keeps more than its values in memory.
    """
    from transformers import modeling_utils

    theirs = modeling_utils._load_state_dict_into_zero3_model

    def ours(model: Any, state_dict: Mapping[str, Tensor], load_config: Any = None) -> Any:
        mapping = getattr(load_config, "weight_mapping", None) or []
        mapped = _mapped_tensors(Path(model.name_or_path))
        if _converts(mapping) or not set(state_dict) <= set(mapped):
            return theirs(model, state_dict, load_config)
        return _read_parts(model, {name: mapped[name] for name in state_dict}, mapping, gather)

    modeling_utils._load_state_dict_into_zero3_model = ours
    try:
        yield
    finally:
        modeling_utils._load_state_dict_into_zero3_model = theirs


def _converts(mapping: list[Any]) -> bool:
    from transformers.core_model_loading import WeightConverter

    return any(isinstance(entry, WeightConverter) for entry in mapping)


def _mapped_tensors(folder: Path) -> dict[str, Tensor]:
    """Return the tensors of a folder's weights by name, in the files that transformers would take."""
    from safetensors import safe_open

    whole, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    files = [whole] if whole.is_file() else []
    if index.is_file() and not files:
        files = sorted({folder / name for name in parse_json(index.read_text())["weight_map"].values()})
    tensors: dict[str, Tensor] = {}
    for path in files:
        with safe_open(path, framework="pt") as file:
            tensors |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    return tensors


def _read_parts(
    model: Any, tensors: dict[str, Tensor], mapping: list[Any], gather: Gather
) -> tuple[list[str], set[str]]:
    """Give each parameter its part of its tensor, each buffer the whole; return errors and the names that are left."""
    from transformers.integrations.deepspeed import _apply_weight_conversions_to_state_dict

    if mapping:
        tensors = next(iter(_apply_weight_conversions_to_state_dict(model, tensors, mapping)))
        model._weight_conversions = mapping
    left, prefix, errors = set(model.state_dict()), getattr(model, "base_model_prefix", ""), []
    parameters = dict(model.named_parameters(remove_duplicate=False))
    buffers = dict(model.named_buffers(remove_duplicate=False))
    for stored, tensor in tensors.items():
        name = f"{prefix}.{stored}" if f"{prefix}.{stored}" in left else stored
        place: Any = parameters.get(name, buffers.get(name))
        if place is None:
            continue
        left.discard(name)
        place._is_hf_initialized = True
        shape = getattr(place, "ds_shape", place.shape)
        if shape != tensor.shape:
            errors.append(f"size mismatch for {name}: {tuple(tensor.shape)} in the files, {tuple(shape)} in the model")
        else:
            _fill(place, tensor, gather)
    return errors, left


@torch.no_grad()
def _fill(place: Any, tensor: Tensor, gather: Gather) -> None:
    part = getattr(place, "ds_tensor", None)
    if part is None:
        place.copy_(tensor)
    elif _is_plain(place):
        start = part.numel() * place.ds_zero_partition_rank
        mine = tensor.reshape(-1)[start : start + part.numel()]
        part[: mine.numel()].copy_(mine)
    else:
        with gather(place):
            place.copy_(tensor)


def _is_plain(place: Any) -> bool:
    """Whether a rank's part of a parameter is its values in memory, and all that the rank keeps of it."""
    part = place.ds_tensor
    return part.final_location is None and place.ds_secondary_tensor is None and not hasattr(part, "ds_quant_scale")
