"""What the target modules of a configuration are called on a base: attention's projections, parts that read images."""

from __future__ import annotations

import re
from collections.abc import Sequence

from torch import nn

from mtl_lora.targets import is_adaptable
from pipeline.errors import InputError
from pipeline.modeling.adapter_config import DEFAULT_TARGETS, AdapterConfig, Part
from pipeline.modeling.image_parts import part_finder, text_reader

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
    that names in an image-text model are those of the part that reads text, and of its other ``parts`` every linear
    layer.

    Raises:
        InputError: the base has no such part, or the part no linear layer.
    """
    names, reader = config.target_modules, text_reader(base)
    if reader is None and config.parts != ("language",):
        raise InputError(
            f"adapter.parts must be ['language'] on a base that reads text alone, got {list(config.parts)} for "
            f"{type(base).__name__}; leave it out"
        )
    if reader is not None and config.parts != ("language",) and isinstance(names, tuple):
        groups: dict[Part, str] = {part: _linear_layers(base, part) for part in config.parts if part != "language"}
        groups |= {"language": _within(reader, names)} if "language" in config.parts else {}
        text = "|".join(f"(?P<{part}>{groups[part]})" for part in sorted(groups))
        return config.model_copy(update={"target_modules": text})
    if reader is not None and isinstance(names, tuple):
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
    if isinstance(asked, tuple) and isinstance(saved, str) and config.parts != ("language",):
        # The expression names its parts; of the language's there are the names, of the others all linear layers.
        has_names = "language" not in config.parts or _within("", asked) in saved
        is_same = has_names and set(re.findall(r"\?P<(\w+)>", saved)) == set(config.parts)
        return config.model_copy(update={"target_modules": saved}) if is_same else config
    if isinstance(asked, tuple) and isinstance(saved, str) and saved.endswith(_within("", asked)):
        return config.model_copy(update={"target_modules": saved})
    is_default = config.target_modules == DEFAULT_TARGETS and names in ENCODER_TARGETS
    return config.model_copy(update={"target_modules": names}) if is_default else config


def _within(reader: str, names: Sequence[str]) -> str:
    return rf"{re.escape(reader)}\..*\.({'|'.join(map(re.escape, names))})"


def _linear_layers(base: nn.Module, part: Part) -> str:
    """Return an expression for the linear layers of a part, the numbers of layers left open where that is the same."""
    part_of = part_finder(base)
    kinds = {path: is_adaptable(module) for path, module in base.named_modules() if part_of(path) == part}
    found = [path for path, is_linear in kinds.items() if is_linear]
    if not found:
        held = sorted({type(m).__name__ for p, m in base.named_modules() if p in kinds and not list(m.children())})
        raise InputError(
            f"adapter.parts must name parts with linear layers, {part!r} of {type(base).__name__} has none "
            f"({', '.join(held) or 'no such part'}); leave it out"
        )
    text = "|".join(dict.fromkeys(re.sub(r"\\\.\d+(?=\\\.)", r"\\.\\d+", re.escape(path)) for path in found))
    is_exact = [path for path in kinds if re.fullmatch(text, path)] == found
    return text if is_exact else "|".join(map(re.escape, found))
