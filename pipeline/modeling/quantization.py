"""A frozen base in 4 or 8 bit: which layers hold codes, and how transformers is asked to load it so."""

from __future__ import annotations

import importlib.util
import logging
from typing import Any

import torch
from torch import nn

from mtl_lora.targets import output_head
from pipeline.errors import InputError
from pipeline.modeling.architecture import is_encoder, is_image_text
from pipeline.modeling.config import BaseModelConfig


def check_quantization(config: BaseModelConfig, settings: Any) -> None:
    """Refuse, before a weight is read, what cannot be quantised.

    Args:
        config: names the base.
        settings: its Hugging Face configuration.

    Raises:
        InputError: quantization is asked for and the base is no language model of text.
    """
    if config.quantization is not None and (is_encoder(settings) or is_image_text(settings)):
        raise InputError(
            f"model.quantization needs a language model that reads text alone, {config.base!r} ({settings.model_type}) "
            f"is another kind, got {config.quantization!r}; leave model.quantization out"
        )


def quantized_layers(model: nn.Module) -> dict[str, nn.Linear]:
    """Return by path the layers of a model, as yet of plain weights, that quantization takes: the linear ones, but not
    what makes its logits."""
    head = output_head(model)
    return {path: m for path, m in model.named_modules() if isinstance(m, nn.Linear) and m is not head}


def quantized_loading(config: BaseModelConfig, dtype: torch.dtype, device: torch.device | str) -> dict[str, Any]:
    """Return what transformers' ``from_pretrained`` is told to quantise a base while it reads it.

    Args:
        config: says 4 or 8 bit.
        dtype: that the model computes in.
        device: that it is put on.

    Raises:
        InputError: bitsandbytes is not installed.
    """
    if importlib.util.find_spec("bitsandbytes") is None:
        raise InputError(
            f"model.quantization {config.quantization!r} needs the package bitsandbytes, which is not installed; "
            "install it, or leave model.quantization out"
        )
    from transformers import BitsAndBytesConfig

    # It tells at every layer that inputs are rounded to float16 for 8 bit, and of kernels that a CPU does without.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)

    if config.quantization == "4bit":
        asked = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
        )
    else:
        asked = BitsAndBytesConfig(load_in_8bit=True)
    return {"quantization_config": asked, "device_map": {"": torch.device(device)}}


def keep_differentiable(model: nn.Module) -> None:
    """Keep 4-bit layers in the form that a gradient goes through.

    On processors with AVX512-BF16 bitsandbytes 0.50 repacks a layer at its first forward without gradients, and returns
    outputs from then on that have none, without a word.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            setattr(module, "support_avx512bf16_for_cpu", False)  # noqa: B010 - no attribute of modules, to mypy
