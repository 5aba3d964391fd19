"""The base under exported tasks as servers elsewhere load it: its name, or a folder with exactly its weights."""

from __future__ import annotations

import os
from pathlib import Path

from mtl_lora.serving import ServedBase, base_name
from pipeline.modeling.base_model import EMBEDDED, BaseModelConfig, resolve_base, save_text_side
from pipeline.modeling.predictor import PREDICTOR_FILE, PredictorSpec
from pipeline.serving.offloaded_base import offloaded_base

EMBEDDED_NAME = "HuggingFaceTB/SmolLM2-135M-Instruct"
BASE_FOLDER = "base-model"
"""Beside the exported tasks; no task can have this name."""
_COMMAND = "from pipeline.serving.base import save_base; save_base({adapter!r}, {folder!r})"

_QUANTIZED = (
    "the base was held in {} by bitsandbytes while the adapters were trained: in its own precision they answer as "
    "closely as that rounding lets them; vLLM holds it so with --quantization bitsandbytes"
)


def served_base(config: BaseModelConfig, fingerprint: str | None, adapter: Path, exports: Path) -> ServedBase:
    """Return how servers get the base under a trained adapter.

    Args:
        config: of the base.
        fingerprint: sha256 of ``mtl_lora.files.fingerprint`` over it.
        adapter: the predictor's folder.
        exports: the folder that holds each task's export.
    """
    name = EMBEDDED_NAME if config.base == EMBEDDED else base_name(str(resolve_base(config)))
    reasons = []
    if config.base == EMBEDDED:
        reasons.append("its weights went through 4-bit rounding (Q4_1)")
    if config.num_layers is not None:
        reasons.append(f"it is cut to its first {config.num_layers} layers")
    quantized = _QUANTIZED.format(config.quantization) if config.quantization else ""
    if not reasons:
        return ServedBase(name, fingerprint, note=quantized)
    command = _COMMAND.format(adapter=os.path.relpath(adapter, exports), folder=BASE_FOLDER)
    note = (
        f"the adapters were trained on {name}, of which {' and '.join(reasons)}: on the published model they answer "
        f"otherwise, so serve the folder {BASE_FOLDER} that base.command of serving.json writes"
    )
    note += f"; {quantized}" if quantized else ""
    return ServedBase(name, fingerprint, BASE_FOLDER, ("python", "-c", command), note)


def save_base(adapter: str | Path, folder: str | Path) -> Path:
    """Write the base under a trained adapter, cut as it was trained, as a Hugging Face folder with its tokenizer.

    No more than a file of it is in memory at a time.

    Args:
        adapter: the predictor's folder.
        folder: written, in the type that the base's own files have.
    """
    from transformers import AutoConfig

    config = PredictorSpec.read(Path(adapter) / PREDICTOR_FILE).base
    stored = AutoConfig.from_pretrained(resolve_base(config)).dtype
    with offloaded_base(config, stored) as base:
        base.save(folder)
    save_text_side(config, folder)
    return Path(folder)
