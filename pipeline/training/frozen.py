"""What of a run's base is frozen below the adapter, and where its states are kept."""

from __future__ import annotations

from typing import Any

import torch

from mtl_lora import AdapterModel
from pipeline.modeling.architecture import text_settings
from pipeline.modeling.base_model import BaseModelConfig, fingerprint
from pipeline.modeling.config import KeptStatesConfig
from pipeline.modeling.frozen_part import FrozenPart, check_kept, find_frozen_part, pass_nodes
from pipeline.modeling.kept_states import KeptStates
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
    hidden_size = text_settings(model.config).hidden_size
    part.kept = KeptStates(asked.path(), asked.max_bytes, identity, hidden_size, model.dtype, asked.precision)
    return part


def _computed_by(model: Any) -> dict[str, Any]:
    """Return what the last bit of a state may depend on beside the weights: states are shared where it is the same."""
    where = model.device
    if where.type == "cuda":
        found: dict[str, Any] = {"device": torch.cuda.get_device_name(where)}
    else:
        found = {"device": torch.backends.cpu.get_cpu_capability(), "threads": torch.get_num_threads()}
    return {"torch": torch.__version__, "nodes": pass_nodes(model), **found}
