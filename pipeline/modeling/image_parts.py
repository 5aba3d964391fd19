"""The parts of an image-text model, and how each image of a mixed batch meets its own task's adapter in them.

What reads text knows the task of each of its rows or tokens. A vision tower does not: some fold images into one row of
patches, some drop what is empty. So the features of a batch's images are made a task at a time, each under one id.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from mtl_lora import AdapterModel
from mtl_lora.routing import Router
from pipeline.errors import InputError
from pipeline.modeling.adapter_config import Part
from pipeline.modeling.architecture import is_image_text

_GRID = "image_grid_thw"
"""Argument of models that take the patches of all images in one row: the sizes of each image (I, 3), in patches."""
_JOINED = ("pooler_output", "deepstack_features")
"""What models read of their image features."""


def text_reader(base: nn.Module) -> str | None:
    """Return the path of an image-text model's part that reads and writes text; None of any other model."""
    return _path(base, base.get_decoder()) if is_image_text(getattr(base, "config", None)) else None  # type: ignore[operator]


def part_finder(base: nn.Module) -> Callable[[str], Part | None]:
    """Return what names the part in which a path of an image-text model lies; None for its output head."""
    model: Any = base
    reader, tower = text_reader(base), _path(base, model.get_encoder(modality="image"))
    head = _path(base, model.get_output_embeddings())

    def part(path: str) -> Part | None:
        if not path or _is_in(path, head):
            return None
        if _is_in(path, reader):
            return "language"
        return "vision" if _is_in(path, tower) and "merger" not in path else "connector"

    return part


def paths_of(base: nn.Module, parts: Sequence[Part]) -> tuple[str, ...]:
    """Return the fewest modules of an image-text model that hold the parameters of some of its parts and no other."""
    part, found = part_finder(base), list[str]()

    def walk(path: str, module: nn.Module) -> None:
        there = {part(name) for name, _ in module.named_parameters(prefix=path)}
        if there and there <= set(parts):
            found.append(path)
        elif there & set(parts):
            for name, child in module.named_children():
                walk(f"{path}.{name}" if path else name, child)

    walk("", base)
    return tuple(found)


def _path(base: nn.Module, module: object) -> str | None:
    return next((path for path, each in base.named_modules() if path and each is module), None)


def _is_in(path: str, whole: str | None) -> bool:
    return whole is not None and f"{path}.".startswith(f"{whole}.")


def is_adapted_for_images(adapted: AdapterModel) -> bool:
    """Whether an adapter, or what trains beside it, takes part in making the features of images."""
    if text_reader(adapted.base_model) is None:
        return False
    part = part_finder(adapted.base_model)
    return any(part(path) in ("connector", "vision") for path in [*adapted.adapted_layers(), *_trained(adapted)])


def _trained(adapted: AdapterModel) -> list[str]:
    return [name for name, p in adapted.base_model.named_parameters() if p.requires_grad]


def nothing_of_images(adapted: AdapterModel) -> Tensor | float:
    """Return 0 with a gradient of 0 for what trains outside of a model's text reader: so each step moves the same
    parameters on every rank, whether its samples have images or not."""
    made_by = getattr(getattr(adapted.base_model, "base_model", None), "get_image_features", None)
    if not isinstance(made_by, partial):
        return 0.0
    part = part_finder(adapted.base_model)
    named = adapted.base_model.named_parameters()
    sums = [p.sum() for name, p in named if p.requires_grad and part(name) in ("connector", "vision")]
    return torch.stack(sums).sum().float() * 0.0 if sums else 0.0


def route_images(adapted: AdapterModel) -> None:
    """Let an image-text model make the features of images a task at a time."""
    model: Any = adapted.base_model.base_model
    routed = partial(_features, model, adapted.router)
    routed.__signature__ = inspect.signature(model.get_image_features)  # type: ignore[attr-defined] # generate reads it
    model.get_image_features = routed


def _features(model: Any, router: Router, *args: Any, **kwargs: Any) -> Any:
    """Do what the model's own ``get_image_features`` does, each run of images of one task under its id.

    Raises:
        InputError: the forward does not tell the task of each image.
    """
    make: Callable[..., Any] = partial(type(model).get_image_features, model)
    ids = router.ids
    if not router.is_running or router.is_disabled or ids is None or ids.dim() == 0:
        return make(*args, **kwargs)
    given = dict(inspect.signature(make).bind(*args, **kwargs).arguments)
    given |= given.pop("kwargs", {})
    counts = given[_GRID].prod(-1).tolist() if given.get(_GRID) is not None else [1] * len(given["pixel_values"])
    ids = ids if router.image_ids is None else router.image_ids
    if ids.shape != (len(counts),):
        raise InputError(
            f"images of mixed tasks need one task id an image where what reads images is adapted, got ids of shape "
            f"{tuple(ids.shape)} for {len(counts)} images; ask one task at a time, or rows that all have one image"
        )
    tasks = ids.tolist()
    starts = [i for i in range(len(tasks)) if i == 0 or tasks[i] != tasks[i - 1]]
    outputs = []
    for start, end in pairwise([*starts, len(tasks)]):
        patches = slice(sum(counts[:start]), sum(counts[:end]))
        taken = {name: _taken(name, value, slice(start, end), patches) for name, value in given.items()}
        with router.route(ids[start]):
            outputs.append(make(**taken | {"return_dict": True}))
    found = {name: [output[name] for output in outputs] for name in _JOINED if name in outputs[0]}
    return type(outputs[0])(**{name: _joined(values) for name, values in found.items()})


def _taken(name: str, value: Any, images: slice, patches: slice) -> Any:
    if not isinstance(value, Tensor):
        return value
    return value[patches if name == "pixel_values" else images]


def _joined(values: list[Any]) -> Any:
    """Join what is one tensor, one an image, or one an image for each of some layers."""
    if isinstance(values[0], Tensor):
        return torch.cat(values)
    if isinstance(values[0][0], Tensor):
        return [each for value in values for each in value]
    return [[each for value in layer for each in value] for layer in zip(*values, strict=True)]
