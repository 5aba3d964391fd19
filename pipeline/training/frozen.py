"""What of a run's base is frozen below the adapter, and where its states, or the features of its images, are kept."""

from __future__ import annotations

import hashlib
from typing import Any

import torch

from mtl_lora import AdapterModel
from pipeline.errors import InputError
from pipeline.modeling.architecture import text_settings
from pipeline.modeling.base_model import BaseModelConfig, fingerprint, load_processor, resolve_base
from pipeline.modeling.config import KeptStatesConfig
from pipeline.modeling.frozen_part import FrozenPart, check_kept, find_frozen_part, pass_nodes
from pipeline.modeling.image_features import ImageFeatures
from pipeline.modeling.image_probe import find_image_features
from pipeline.modeling.kept_states import KeptStates
from pipeline.modeling.processor import PROCESSOR_FILES
from pipeline.training.engine import gathered_layer_by_layer, largest


def frozen_part(
    adapted: AdapterModel, base: BaseModelConfig, asked: KeptStatesConfig | None, zero_stage: int
) -> FrozenPart | None:
    """Return what makes the states below the first adapted layer, None where the model runs as a whole.

    Args:
        adapted: the model as it will be trained, before DeepSpeed has it.
        base: names the model.
        asked: where states are kept; None for nowhere.
        zero_stage: with 3 weights are gathered from all ranks, which must then run equally often.

    Raises:
        InputError: states are to be kept and cannot be.
    """
    with gathered_layer_by_layer(adapted.base_model):  # under ZeRO 3 the model is loaded in parts
        found = find_frozen_part(adapted, base.max_length, largest if zero_stage == 3 else None)
        if asked is None:
            return found if isinstance(found, FrozenPart) else None
        part = check_kept(found, asked.precision == "exact")
    model = part.model
    identity = {"base": fingerprint(base), "cut": part.layers.cut, "computed_by": _computed_by(model)}
    part.kept = _kept(model, asked, identity)
    return part


def kept_features(
    adapted: AdapterModel, base: BaseModelConfig, asked: KeptStatesConfig | None, zero_stage: int
) -> ImageFeatures | None:
    """Return what makes the features of images, kept; None where none are to be.

    Args:
        adapted: as in :func:`frozen_part`.
        base: as there.
        asked: as there.
        zero_stage: as there.

    Raises:
        InputError: features are to be kept and cannot be.
    """
    if asked is None:
        return None
    model: Any = adapted.base_model
    if zero_stage == 3:
        raise _unkept("training.zero_stage: 3 gathers the vision tower from all ranks at once; set zero_stage: 1")
    found = find_image_features(adapted, load_processor(base))
    if isinstance(found, str):
        raise _unkept(f"{model.config.model_type} cannot be given them: {found}; take another base")
    files = [resolve_base(base) / name for name in PROCESSOR_FILES]
    processor = [hashlib.sha256(file.read_bytes()).hexdigest() for file in files if file.is_file()]
    identity = {"base": fingerprint(base), "features_by": processor, "computed_by": _computed_by(model)}
    found.kept = _kept(model, asked, identity)
    return found


def _unkept(reason: str) -> InputError:
    return InputError(
        f"training.kept_states keeps the features that each rank's frozen vision tower makes of images: {reason}, or "
        "leave training.kept_states out"
    )


def _kept(model: Any, asked: KeptStatesConfig, identity: dict[str, Any]) -> KeptStates:
    hidden_size = text_settings(model.config).hidden_size
    return KeptStates(asked.path(), asked.max_bytes, identity, hidden_size, model.dtype, asked.precision)


def _computed_by(model: Any) -> dict[str, Any]:
    """Return what the last bit of a state may depend on beside the weights: states are shared where it is the same."""
    where = model.device
    if where.type == "cuda":
        found: dict[str, Any] = {"device": torch.cuda.get_device_name(where)}
    else:
        found = {"device": torch.backends.cpu.get_cpu_capability(), "threads": torch.get_num_threads()}
    return {"torch": torch.__version__, "nodes": pass_nodes(model), **found}
