"""What is bound to fail later is refused before any work is done."""

from __future__ import annotations

from jobs.config import RunConfig
from pipeline.errors import InputError
from pipeline.training.config import check_deepspeed


def check(config: RunConfig) -> None:
    """Refuse what is bound to fail later: base model, label words, batch sizes.

    Raises:
        InputError: any of these breaks its rule.
    """
    from pipeline.modeling.adapter import METHODS_WITH_TASK_PARTS, check_adapter, check_shape
    from pipeline.modeling.answering import check_base

    check_base(config.model, config.tasks)
    check_adapter(config.adapter)
    config.training.check_ranks()
    config.training.check_tasks([task.name for task in config.tasks])
    if config.training.only_tasks and config.adapter.method not in METHODS_WITH_TASK_PARTS:
        raise InputError(
            f"training.only_tasks needs an adapter with parts of each task, {' or '.join(METHODS_WITH_TASK_PARTS)}, "
            f"got adapter.method {config.adapter.method!r}; train all tasks"
        )
    _check_options(config)
    if config.training.warm_start is not None:
        check_shape(config.adapter, config.training.warm_start)
    if config.training.deepspeed:
        from pipeline.training.engine import zero_keys

        check_deepspeed(config.training, zero_keys())


def _check_options(config: RunConfig) -> None:
    adapter, training = config.adapter, config.training
    if adapter.parts != ("language",) and training.zero_stage == 3:
        raise InputError(
            "adapter.parts must be [language] with training.zero_stage 3, under which all ranks run each layer equally "
            f"often, but not all have images of the same tasks, got {list(adapter.parts)}; choose zero_stage 0, 1 or 2"
        )
    if adapter.temperature_start is not None and training.zero_stage == 3:
        raise InputError(
            "adapter.temperature_start must be null with training.zero_stage 3, which partitions what it moves, got "
            f"{adapter.temperature_start}; choose zero_stage 0, 1 or 2, or learn_temperature"
        )
    if training.orthogonality and adapter.method != "mtl_lora":
        raise InputError(
            f"training.orthogonality needs adapter.method 'mtl_lora', which has several up-projections, got "
            f"{adapter.method!r}; set it to 0"
        )
