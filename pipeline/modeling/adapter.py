"""Which adapter is put on the base model: one ``method`` key picks it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn

import mtl_lora
from mtl_lora import AdapterModel, MTLLoRAConfig, MTLLoRAError
from mtl_lora.files import CONFIG_FILE, read_description
from mtl_lora.targets import output_head
from mtl_lora.tasks import add_task, remove_task
from pipeline.errors import InputError
from pipeline.modeling.adapter_config import AdapterConfig, Part
from pipeline.modeling.base_model import BaseModelConfig
from pipeline.modeling.image_parts import part_finder, paths_of, route_images, text_reader
from pipeline.modeling.size_plan import AdapterSizes
from pipeline.modeling.sizes import adapter_sizes, solved
from pipeline.modeling.target_names import named_as, named_for

__all__ = [
    "METHODS_WITH_TASK_PARTS",
    "AdapterConfig",
    "adapter_as_trained",
    "adapter_description",
    "build_adapter",
    "check_adapter",
    "check_shape",
    "load_adapter",
    "warm_adapter",
]

METHODS_WITH_TASK_PARTS = ("mtl_lora", "moelora", "lora_per_task")
"""Methods in which something belongs to one task alone."""


def build_adapter(
    config: AdapterConfig, base: nn.Module, task_names: Sequence[str], head_classes: Sequence[int] = ()
) -> AdapterModel:
    """Put a fresh adapter on a base model, whose weights are frozen.

    Args:
        config: its shape.
        base: the model.
        task_names: in the order of their ids.
        head_classes: rows of each task's head, where the base answers by heads.

    Raises:
        InputError: a target module matches nothing or is the output head, a part of ``parts`` is not there or has no
            linear layer, or a value is out of range.
    """
    config = solved(named_for(config, base), base, len(task_names))
    try:
        options = config.options() | {"head_classes": tuple(head_classes)}
        if text_reader(base) is not None and (config.bias == "all" or config.train_layer_norms):
            options["extras_within"] = paths_of(base, config.parts)
        return _guarded(mtl_lora.build_adapter(config.method, base, tuple(task_names), **options), config.parts)
    except MTLLoRAError as error:
        raise InputError(f"adapter: {error}") from error


def _guarded(model: AdapterModel, parts: Sequence[Part] | None = None) -> AdapterModel:
    """Let an adapter for images meet those of mixed tasks, and refuse one on the output head: label scores hand it
    answer positions, whose tasks it cannot tell.

    Args:
        model: the adapter on its base.
        parts: of an image-text model that must be adapted, and no others; None for any.

    Raises:
        InputError: the head is adapted, or other parts than asked for.
    """
    head = output_head(model.base_model)
    if text_reader(model.base_model) is not None:
        part_of = part_finder(model.base_model)
        found = {path: part_of(path) for path in [*model.adapted_layers(), *sorted(model.extra_parameter_names)]}
        named = {part for part in found.values() if part is not None}
        if parts is not None and named != set(parts):
            beside = [path for path, part in found.items() if part not in (None, *parts)]
            raise InputError(
                f"adapter.target_modules must find layers in adapter.parts and nowhere else, got "
                f"{', '.join(sorted(named)) or 'none'} for {', '.join(sorted(parts))}"
                f"{f', such as {beside[0]!r}' if beside else ''}; name these parts, or the layers by their paths"
            )
        if named & {"connector", "vision"}:
            route_images(model)
    for path in model.plain_layers():
        if model.base_model.get_submodule(path) is head:
            raise InputError(
                f"adapter.target_modules must not hold the output head, got {path!r}: label scores take only the "
                "answers' positions to it, of mixed tasks; leave it out, all-linear does so too"
            )
    return model


def warm_adapter(
    config: AdapterConfig, base: nn.Module, folder: Path, task_names: Sequence[str], head_classes: Sequence[int] = ()
) -> AdapterModel:
    """Load a trained adapter and fit it to other tasks: new ones start from the mean of all, others are taken out.

    Args:
        config: the shape that the adapter must have.
        base: the model it was trained on.
        folder: of the trained adapter.
        task_names: tasks asked for, those that it knows in its own order, then the new ones.
        head_classes: rows of each task's head, where the base answers by heads; a new task's head is fresh.

    Raises:
        InputError: the adapter has another shape or base, a task another number of classes, lacks a
            tensor, or the tasks stand in another order.
    """
    check_shape(config, folder)
    model = load_adapter(base, folder)
    rows = dict(zip(task_names, head_classes, strict=True)) if head_classes else {}
    for name in [name for name in task_names if name not in model.task_names]:
        add_task(model, name, classes=rows.get(name))
    for name in [name for name in model.task_names if name not in task_names]:
        remove_task(model, name)
    if list(model.task_names) != list(task_names):
        raise InputError(
            f"tasks must stand in the order of the adapter to begin with, then new ones: {list(model.task_names)}, "
            f"got {list(task_names)}; reorder them"
        )
    if tuple(model.adapter_config.head_classes) != tuple(head_classes):
        raise InputError(
            "each task's head must have the rows of the adapter to begin with, "
            f"{list(model.adapter_config.head_classes)}, got {list(head_classes)}; "
            "keep the tasks' classes, or train from scratch"
        )
    return model


def adapter_as_trained(
    config: AdapterConfig, base: BaseModelConfig, num_tasks: int, warm_start: Path | None = None
) -> tuple[AdapterConfig, AdapterSizes | None]:
    """Return a configuration with its rank, solved where it asks for a ``size``, and then the counts of all methods.

    Args:
        config: of the adapter.
        base: the model it stands on, of which only the configuration is read.
        num_tasks: that share it.
        warm_start: folder of the adapter that training begins with, which keeps its rank.

    Raises:
        InputError: the base or the folder cannot be read, a target matches nothing, or a value is out of range.
    """
    warm = _saved(warm_start)[1] if warm_start is not None and config.size is not None else None
    return adapter_sizes(config, base, num_tasks, warm)


def _saved(folder: Path) -> tuple[str, dict[str, Any]]:
    """Return the method and the whole configuration of the adapter that training begins with."""
    if not (folder / CONFIG_FILE).is_file():
        raise InputError(
            f"training.warm_start must be the folder of a trained adapter, {folder / CONFIG_FILE} is missing; "
            "fix the path"
        )
    description = adapter_description(folder)
    try:
        return description.get("method", "mtl_lora"), MTLLoRAConfig.from_dict(description["config"]).to_dict()
    except (MTLLoRAError, TypeError) as error:
        raise InputError(f"adapter folder {folder}: {error}") from error


def check_shape(config: AdapterConfig, folder: Path) -> None:
    """Refuse a folder that holds no adapter, or one that training cannot begin with.

    Args:
        config: the shape wanted; where it asks for a ``size``, the folder's rank and alpha are the right ones.
        folder: of the adapter.

    Raises:
        InputError: it is missing, or of another method or shape than the configured one.
    """
    method, saved = _saved(folder)
    config = named_as(config, saved["target_modules"])
    if config.size is not None:
        config = config.sized(saved["r"], saved["lora_alpha"])
    fresh = {"method": config.method, **_as_saved(config)}
    saved["method"] = method
    other = {key: (saved[key], value) for key, value in fresh.items() if saved[key] != value}
    if other:
        words = ", ".join(f"{key} is {old!r} there and {new!r} here" for key, (old, new) in other.items())
        raise InputError(
            f"an adapter to begin with must have the configured shape, {folder}: {words}; "
            "configure the same shape, or train from scratch"
        )


def check_adapter(config: AdapterConfig) -> None:
    """Refuse settings that contradict each other or are out of range, before a model is there.

    Raises:
        InputError: they do.
    """
    _as_saved(config)


def _as_saved(config: AdapterConfig) -> dict[str, Any]:
    """Return the values that a saved adapter of this shape has, by the keys of its configuration."""
    options = config.options()
    try:
        whole = MTLLoRAConfig(task_names=["task"], **options).to_dict()
    except MTLLoRAError as error:
        raise InputError(f"adapter: {error}") from error
    return {key: value for key, value in whole.items() if key in options}


def load_adapter(base: nn.Module, folder: Path, task_names: Sequence[str] | None = None) -> AdapterModel:
    """Load a saved adapter onto its base model.

    Raises:
        InputError: the folder holds none, a damaged one, or one of another base or other tasks.
    """
    try:
        return _guarded(mtl_lora.load_adapter(base, folder, task_names))
    except MTLLoRAError as error:
        raise InputError(f"adapter folder {folder}: {error}") from error


def adapter_description(folder: Path) -> dict[str, Any]:
    """Return what a saved adapter says of itself: ``method``, ``config``, ``base``.

    Raises:
        InputError: the folder holds no description, or a damaged one.
    """
    try:
        return read_description(folder)
    except MTLLoRAError as error:
        raise InputError(f"adapter folder {folder}: {error}") from error
