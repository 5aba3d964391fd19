"""What the default target modules, attention's four projections, are called on a base."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from pipeline.modeling.adapter_config import DEFAULT_TARGETS, AdapterConfig

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
    """Return a configuration whose default target modules are named as the base names them; others as they are."""
    if config.target_modules != DEFAULT_TARGETS:
        return config
    paths = [f".{path}" for path, _ in base.named_modules()]

    def fits(names: Sequence[str]) -> bool:
        return all(any(path.endswith(f".{name}") for path in paths) for name in names)

    known = next((names for names in (DEFAULT_TARGETS, *ENCODER_TARGETS) if fits(names)), DEFAULT_TARGETS)
    return config.model_copy(update={"target_modules": known})


def named_as(config: AdapterConfig, saved: object) -> AdapterConfig:
    """Return a configuration whose default target modules are named as a saved adapter names them."""
    names = tuple(saved) if isinstance(saved, list | tuple) else ()
    is_default = config.target_modules == DEFAULT_TARGETS and names in ENCODER_TARGETS
    return config.model_copy(update={"target_modules": names}) if is_default else config
