"""``adapter.size``: the rank that gives as many trainable parameters as another method's adapter, without any weight.

The rank is solved once, for the tasks that an adapter begins with. An adapter that training begins with keeps the rank
it has: a task that is added then makes it larger by that task's own parameters, and changes nobody's shape.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, get_args

from torch import nn

from mtl_lora import MTLLoRAConfig, MTLLoRAError
from mtl_lora.sizes import Size, TargetShapes, count_parameters, solve_size, target_shapes
from pipeline.errors import InputError
from pipeline.modeling.adapter_config import AdapterConfig, AdapterSize, Method
from pipeline.modeling.base_model import empty_base
from pipeline.modeling.config import BaseModelConfig
from pipeline.modeling.size_plan import AdapterSizes, MethodSize
from pipeline.modeling.target_names import named_for

__all__ = ["adapter_sizes", "solved"]


def solved(config: AdapterConfig, base: nn.Module, num_tasks: int) -> AdapterConfig:
    """Return a configuration with the rank that its ``size`` asks for on a base; one without ``size`` as it is.

    Raises:
        InputError: a target matches nothing, or a value is out of range.
    """
    if config.size is None:
        return config
    shapes, asked = _asked(config, config.size, base, num_tasks)
    return config.sized(_solve(config.method, config, shapes, asked, num_tasks).r)


def adapter_sizes(
    config: AdapterConfig, base: BaseModelConfig, num_tasks: int, warm: Mapping[str, Any] | None = None
) -> tuple[AdapterConfig, AdapterSizes | None]:
    """Return a configuration as it is trained, and the counts of all methods where it asks for a size.

    Args:
        config: of the adapter.
        base: the model it stands on, of which only the configuration is read.
        num_tasks: that share it.
        warm: the saved configuration of the adapter that training begins with, whose rank and alpha are kept.

    Raises:
        InputError: the base cannot be read, a target matches nothing, or a value is out of range.
    """
    if (size := config.size) is None:
        return config, None
    model = empty_base(base)
    config = named_for(config, model)
    shapes, asked = _asked(config, size, model, num_tasks)
    total = sum(p.numel() for p in model.parameters())
    found = {method: _solve(method, config, shapes, asked, num_tasks) for method in get_args(Method)}
    trained = found[config.method]
    if warm is not None:
        parameters = count_parameters(config.method, _as_config(config, num_tasks, int(warm["r"])), shapes)
        trained = Size(config.method, int(warm["r"]), parameters, parameters / asked)
    sizes = AdapterSizes(
        like=size.like,
        like_r=size.r,
        parameters=asked,
        tasks=num_tasks,
        trained=_as_contract(trained, total),
        is_kept=warm is not None,
        methods=tuple(_as_contract(size, total) for size in found.values()),
    )
    return config.sized(trained.r, None if warm is None else warm["lora_alpha"]), sizes


def _as_config(config: AdapterConfig, num_tasks: int, r: int) -> MTLLoRAConfig:
    options = config.options() | {"r": r}
    return MTLLoRAConfig.from_dict({"task_names": [f"task-{i}" for i in range(num_tasks)], **options})


def _asked(config: AdapterConfig, size: AdapterSize, base: nn.Module, num_tasks: int) -> tuple[TargetShapes, int]:
    """Return the sizes of the targets and the number of parameters asked for."""
    try:
        reference = _as_config(config, num_tasks, size.r)
        shapes = target_shapes(base, reference)
        return shapes, count_parameters(size.like, reference, shapes)
    except MTLLoRAError as error:
        raise InputError(f"adapter: {error}") from error


def _solve(method: str, config: AdapterConfig, shapes: TargetShapes, asked: int, num_tasks: int) -> Size:
    try:
        return solve_size(method, _as_config(config, num_tasks, config.r), shapes, asked)
    except MTLLoRAError as error:
        raise InputError(f"adapter.size: {error}") from error


def _as_contract(size: Size, total: int) -> MethodSize:
    return MethodSize(
        method=size.method,  # type: ignore[arg-type]
        r=size.r,
        parameters=size.parameters,
        share=size.parameters / total,
        ratio=size.ratio,
    )
