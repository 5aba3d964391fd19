"""What a folder's ``config.json`` says of its model: read, cut and refused before any weight is loaded.

Code in a folder is never run and nobody is asked whether it may be: a model is one that transformers itself knows.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from pipeline.errors import InputError
from pipeline.json_text import parse_json
from pipeline.modeling.config import BaseModelConfig

_POSITIONS = ("max_position_embeddings", "n_positions", "max_seq_len", "n_ctx")
"""Names under which configurations keep the number of positions that a model was made for."""


def quiet_transformers() -> None:
    """Silence its load report, which calls the layers that num_layers leaves out "unexpected", and its bars."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


def short(error: BaseException) -> str:
    """Return what an error of a library says, without the lists of everything it knows instead."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:240]}{' …' if len(text) > 240 else ''}"


def read_settings(folder: Path, config: BaseModelConfig) -> Any:
    """Return the Hugging Face configuration of a base model, cut to ``num_layers`` where that is set.

    Args:
        folder: that holds ``config.json``.
        config: names the folder and the cut.

    Raises:
        InputError: the weights are quantised, the model needs code of its own or is of an unknown type, or the layers
            cannot be cut as asked.
    """
    from transformers import AutoConfig

    quiet_transformers()
    _refuse_foreign(folder, config)
    try:
        settings = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        text = text_settings(settings)
    except Exception as error:  # configurations check themselves with errors of many types
        raise InputError(
            f"model.base must have a configuration that transformers reads, {config.base!r} does not: {short(error)}"
        ) from error
    if config.num_layers is not None:
        _cut(text, config)
    return settings


def text_settings(settings: Any) -> Any:
    """Return the configuration of the part that reads and writes text, which may lie inside that of a whole."""
    return settings.get_text_config(decoder=True)


def is_encoder(settings: Any) -> bool:
    """Whether a model reads a text both ways and writes none, by what transformers knows its type for."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

    is_decoder = getattr(settings, "is_decoder", False) or getattr(settings, "is_encoder_decoder", False)
    return settings.model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES and not is_decoder


def is_image_text(settings: Any) -> bool:
    """Whether a model writes text after prompts with images, by what transformers knows its type for."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

    if getattr(settings, "vision_config", None) is None:
        return False
    return text_settings(settings) is not settings and settings.model_type in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES


def drop_nothing(settings: Any) -> None:
    """Set a frozen encoder's own dropout to none: the adapter's regularises, and frozen states stay the same."""
    for name, value in list(vars(settings).items()):
        if "drop" in name and isinstance(value, float):
            setattr(settings, name, 0.0)


def _refuse_foreign(folder: Path, config: BaseModelConfig) -> None:
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    try:
        raw = parse_json((folder / "config.json").read_bytes())
        kind = raw.get("model_type") if isinstance(raw, dict) else None
    except ValueError as error:
        raise InputError(
            f"model.base must hold a config.json that is JSON, {config.base!r} does not: {error}"
        ) from error
    if not isinstance(raw, dict) or not isinstance(kind, str):
        raise InputError(
            f"model.base must hold a config.json that names its model_type, {config.base!r} does not; "
            "save the model with model.save_pretrained(folder)"
        )
    parts = [raw, *(part for part in raw.values() if isinstance(part, dict))]
    for part in parts:
        method = part.get("quantization_config") or part.get("compression_config")
        if method:
            name = method.get("quant_method", "an unnamed method") if isinstance(method, dict) else method
            raise InputError(
                f"model.base must hold plain weights, those of {config.base!r} are quantised ({name}); "
                "take the original model, or load it with transformers, call dequantize() and save it anew"
            )
    if kind not in CONFIG_MAPPING:
        own_code = " and brings code of its own (auto_map), which is not run" if raw.get("auto_map") else ""
        raise InputError(
            f"model.base must be of a type that the installed transformers knows, {config.base!r} is of type {kind!r}"
            f"{own_code}; take another model, or a release of transformers that has it"
        )


def _cut(text: Any, config: BaseModelConfig) -> None:
    asked, have = config.num_layers, getattr(text, "num_hidden_layers", None)
    if not isinstance(have, int):
        raise _uncuttable(config, f"type {text.model_type!r} does not say how many layers it has")
    if asked is None or asked > have:
        raise InputError(f"model.num_layers must be at most {have}, the layers of {config.base!r}, got {asked}")
    try:
        # A list of one entry a layer goes with its layers; a list that is computed follows from their number.
        for name, value in list(vars(text).items()):
            is_by_layer = isinstance(value, (list, tuple)) and len(value) == have
            if is_by_layer and ("layer" in name or have > _FEW):
                setattr(text, name, value[:asked])
        text.num_hidden_layers = asked
    except Exception as error:  # see read_settings
        raise _uncuttable(config, short(error)) from error


_FEW = 4
"""So many entries may be those of anything: token ids, a range."""


def check_cut(unexpected: Iterable[str], config: BaseModelConfig) -> None:
    """Refuse a cut that changes the layers that it keeps: some are built by their distance from the last one.

    Args:
        unexpected: names of the folder's tensors that found no place in the cut model.
        config: names the folder and the cut.

    Raises:
        InputError: one of them belongs to a layer that is kept.
    """
    asked = config.num_layers or 0
    for name in sorted(unexpected):
        layer = re.search(r"(?:layers|layer|h|blocks|block)\.(\d+)\.", name)
        if layer and int(layer[1]) < asked:
            raise _uncuttable(config, f"{name} of a layer that is kept would be left out")


def _uncuttable(config: BaseModelConfig, reason: str) -> InputError:
    return InputError(
        f"model.num_layers = {config.num_layers} cannot cut {config.base!r}: {reason}; leave model.num_layers out"
    )


def check_positions(settings: Any, config: BaseModelConfig) -> None:
    """Refuse prompts longer than the positions that a model was made for.

    Raises:
        InputError: ``max_length`` is more than the configuration's number of positions.
    """
    text = text_settings(settings)
    for name in _POSITIONS:
        limit = getattr(text, name, None)
        if isinstance(limit, int) and 0 < limit < config.max_length:
            raise InputError(
                f"model.max_length must be at most {limit}, the positions of {config.base!r} ({name}), "
                f"got {config.max_length}; lower it"
            )


def embedding_rows(settings: Any) -> int | None:
    """Return how many tokens a model's configuration gives a vector, None where it does not say."""
    rows = getattr(text_settings(settings), "vocab_size", None)
    return rows if isinstance(rows, int) else None
