"""What the default target modules, attention's four projections, are called on a base."""

from __future__ import annotations

import re
from collections.abc import Sequence

from torch import nn

from pipeline.modeling.adapter_config import DEFAULT_TARGETS, AdapterConfig
from pipeline.modeling.architecture import is_image_text

ENCODER_TARGETS: tuple[tuple[str, ...], ...] = (
    ("query", "key", "value", "attention.output.dense"),  # BERT, RoBERTa, ELECTRA
    ("attn.Wqkv", "attn.Wo"),  # ModernBERT
    ("q_lin", "k_lin", "v_lin", "out_lin"),  # DistilBERT
    ("query", "key", "value", "attention.dense"),  # ALBERT
    ("attn.q", "attn.k", "attn.v", "attn.o"),  # MPNet
    ("attention.self.in_proj", "attention.output.dense"),  # DeBERTa
    ("value_proj", "attention.output.dense"),  # DeBERTa-v2, whose other two also read positions, which have no task
)
"""What encoders call the projections of attention."""


def named_for(config: AdapterConfig, base: nn.Module) -> AdapterConfig:
    """Return a configuration whose default target modules are named as the base names them; others as they are, but
    that names in an image-text model are those of the part that reads text."""
    names = config.target_modules
    if (reader := text_reader(base)) is not None and isinstance(names, tuple):
        ends = tuple(f".{name}" for name in names)
        inside = [path for path, _ in base.named_modules() if f".{path}".endswith(ends)]
        if all(path.startswith(f"{reader}.") for path in inside):
            return config
        return config.model_copy(update={"target_modules": _within(reader, names)})  # a vision tower has some of them
    if names != DEFAULT_TARGETS:
        return config
    paths = [f".{path}" for path, _ in base.named_modules()]

    def fits(names: Sequence[str]) -> bool:
        return all(any(path.endswith(f".{name}") for path in paths) for name in names)

    known = next((names for names in (DEFAULT_TARGETS, *ENCODER_TARGETS) if fits(names)), DEFAULT_TARGETS)
    return config.model_copy(update={"target_modules": known})


def named_as(config: AdapterConfig, saved: object) -> AdapterConfig:
    """Return a configuration whose target modules are named as a saved adapter names them, where they are the same."""
    names, asked = tuple(saved) if isinstance(saved, list | tuple) else (), config.target_modules
    if isinstance(asked, tuple) and isinstance(saved, str) and saved.endswith(_within("", asked)):
        return config.model_copy(update={"target_modules": saved})
    is_default = config.target_modules == DEFAULT_TARGETS and names in ENCODER_TARGETS
    return config.model_copy(update={"target_modules": names}) if is_default else config


def text_reader(base: nn.Module) -> str | None:
    """Return the path of an image-text model's part that reads and writes text; None of any other model."""
    if not is_image_text(getattr(base, "config", None)):
        return None
    decoder = base.get_decoder()  # type: ignore[operator]
    return next(path for path, module in base.named_modules() if module is decoder)


def _within(reader: str, names: Sequence[str]) -> str:
    return rf"{re.escape(reader)}\..*\.({'|'.join(map(re.escape, names))})"
