"""Tasks come and go: rows of the stacked per-task tensors are added, dropped, frozen; the shared tensors stay.

What happens to a task that is absent from a step
-------------------------------------------------
Its Λ and w get exactly zero gradient. An optimizer does not know that the zero means *absent*, so by itself it would
still move them: by weight decay, and by the momentum of earlier steps. The decision here:

* **Weight decay never touches Λ and w, nor a head,** when the optimizer is made from :func:`parameter_groups`. It pulls
  towards zero, and for Λ, whose neutral value is the identity, that would switch an absent task off: after k steps at
  learning rate η and decay δ it is left with (1 - ηδ)ᵏ of its adapter. Decaying Λ while all tasks are present was
  rejected too: the shared A and B are decayed, which bounds the same product, and one law serves runs with and without
  absent tasks.
* **Momentum is left alone.** A task seen before goes on along its averaged gradient, fading by β a step, as every
  dense optimizer does with embeddings; under Adam the whole drift after a task's last step is bounded by
  lr · Σₖ (β₁ᵏ / √β₂ᵏ) ≈ 10 · lr an element at β = (0.9, 0.999). A task never seen has no momentum and stays
  bit-identical. Masking rows out of the optimizer's state was rejected, since ZeRO keeps it flattened and partitioned.
* **A frozen task does not move at all**: :func:`freeze_shared` gives its rows zero gradients, so with a new optimizer
  they carry neither momentum nor decay.
"""

from typing import Any

import torch
from torch import nn

from mtl_lora.core import AdapterCore
from mtl_lora.errors import MTLLoRAError, TaskError
from mtl_lora.heads import TaskHeads
from mtl_lora.layer import AdaptedLinear, MTLLoRALinear

__all__ = ["add_task", "freeze_shared", "parameter_groups", "remove_task", "rename_task", "unfreeze"]


def _check_unmerged(model: AdapterCore) -> None:
    if model.merged_task is not None:
        raise MTLLoRAError(f"tasks change only while none is merged, got {model.merged_task} merged; unmerge() first")


@torch.no_grad()
def add_task(model: AdapterCore, name: str, source: str | int = "mean", classes: int | None = None) -> int:
    """Add a task at the end and return its id; the other tasks' outputs stay bit-identical.

    Per-task tensors become new parameters, so make the optimizer again.

    Args:
        model: any adapted model.
        name: the new task's name.
        source: ``"mean"`` starts from the mean of all tasks' Λ and w, its head fresh; a task's name or id starts from
            a copy of it.
        classes: rows of the new task's head, where tasks have heads.

    Raises:
        TaskError: the name is in use, the source is unknown, or ``classes`` is missing or meaningless.
    """
    _check_unmerged(model)
    if name in model.task_names:
        raise TaskError(f"a new task's name must be free, got {name!r}; the tasks are {list(model.task_names)}")
    index = None if source == "mean" and "mean" not in model.task_names else model.task_id(source)
    heads = model.task_heads
    changes: dict[str, Any] = {"task_names": (*model.task_names, name)}
    if (classes is None) != (heads is None):
        raise TaskError(
            f"classes are for tasks with heads, and for all of them, got {classes} for {name!r}; "
            f"{'leave them out' if heads is None else 'say how many rows its head has'}"
        )
    if heads is not None and classes is not None:
        heads.add_task(classes, index)
        changes["head_classes"] = heads.classes
    config = model.adapter_config.replace(**changes)
    for layer in model.adapted_layers().values():
        rows = {}
        for key in layer.task_parameter_names:
            old = getattr(layer, key)
            new = old.mean(0, keepdim=True) if index is None else old[index : index + 1]
            rows[key] = torch.cat([old, new])
        layer.set_tasks(rows)
    model.adapter_config = config
    return len(model.task_names) - 1


@torch.no_grad()
def remove_task(model: AdapterCore, task: str | int) -> None:
    """Drop a task; later tasks' ids move down by one, the other tasks' outputs stay bit-identical.

    Raises:
        TaskError: the task is unknown, or the last one.
    """
    _check_unmerged(model)
    index = model.task_id(task)
    if len(model.task_names) == 1:
        raise TaskError(f"a model must keep one task, got {task!r} to remove, the last; add another task first")
    kept = [i for i in range(len(model.task_names)) if i != index]
    for layer in model.adapted_layers().values():
        layer.set_tasks({key: getattr(layer, key)[kept] for key in layer.task_parameter_names})
    changes: dict[str, Any] = {"task_names": [model.task_names[i] for i in kept]}
    if model.task_heads is not None:
        model.task_heads.remove_task(index)
        changes["head_classes"] = model.task_heads.classes
    model.adapter_config = model.adapter_config.replace(**changes)


def rename_task(model: AdapterCore, task: str | int, name: str) -> None:
    """Give a task another name; its id stays.

    Raises:
        TaskError: the task is unknown, or the name is in use.
    """
    index = model.task_id(task)
    if name in model.task_names and model.task_names.index(name) != index:
        raise TaskError(f"a task's new name must be free, got {name!r}; the tasks are {list(model.task_names)}")
    names = [name if i == index else old for i, old in enumerate(model.task_names)]
    model.adapter_config = model.adapter_config.replace(task_names=names)


def freeze_shared(model: AdapterCore, *tasks: str | int) -> None:
    """Train only these tasks' own rows (Λ and w): everything shared, and every other task, stays as it is.

    Make the optimizer afterwards, so that no old momentum moves the frozen rows.

    Raises:
        TaskError: a task is unknown.
        MTLLoRAError: the method has nothing that belongs to a task.
    """
    indices = tuple(sorted(model.task_id(task) for task in tasks))
    layers = model.task_modules()
    if not any(layer.task_parameter_names for layer in layers):
        raise MTLLoRAError(f"freezing what tasks share needs a method with per-task parts, got {model.method!r}")
    model.base_model.requires_grad_(False)
    for layer in layers:
        for key in layer.task_parameter_names:
            getattr(layer, key).requires_grad_(True)
        layer.trainable_tasks = indices


def unfreeze(model: AdapterCore) -> None:
    """Take :func:`freeze_shared` back: all of the adapter trains again."""
    for layer in model.task_modules():
        layer.trainable_tasks = None
    own = model.adapter_state_dict()
    layers = model.adapted_layers().values()
    planned = {id(getattr(layer, name)) for layer in layers for name in layer.planned_parameter_names}
    for name, parameter in model.base_model.named_parameters():
        if name in own and id(parameter) not in planned:
            parameter.requires_grad_(True)


def parameter_groups(
    model: nn.Module,
    weight_decay: float,
    task_learning_rate: float | None = None,
    mixing_learning_rate: float | None = None,
    head_learning_rate: float | None = None,
) -> list[dict[str, Any]]:
    """Return an optimizer's parameter groups: weight decay for the shared matrices, none for what tasks own.

    Biases, normalisation layers and other vectors are not decayed either. Only trainable parameters are listed.

    Args:
        model: an adapted model, or a module that holds one beside other parameters.
        weight_decay: of the shared matrices.
        task_learning_rate: of what each task owns (Λ, w and its head); None for the optimizer's common rate.
        mixing_learning_rate: of the mixing logits w and the temperature; None for that of all a task owns.
        head_learning_rate: of the heads; None for that of all a task owns.

    Returns:
        The groups that are not empty: shared matrices, then all others; what tasks own apart where it has a rate.

    Raises:
        MTLLoRAError: nothing is trainable.
    """
    trainable = [p for p in model.parameters() if p.requires_grad]
    if not trainable:
        raise MTLLoRAError("a run must train at least one parameter, got none; check target_modules and what is frozen")
    layers = [layer for layer in model.modules() if isinstance(layer, (AdaptedLinear, TaskHeads))]
    owned = {id(getattr(layer, name)) for layer in layers for name in layer.task_parameter_names}
    decayed = [p for p in trainable if id(p) not in owned and p.dim() > 1]
    own = [p for p in trainable if id(p) in owned]
    vectors = [p for p in trainable if id(p) not in owned and p.dim() <= 1]
    groups: list[dict[str, Any]] = [{"params": decayed, "weight_decay": weight_decay}]
    mixing = {id(p) for m in layers if isinstance(m, MTLLoRALinear) for p in (m.lora_mixing, m.lora_temperature)}
    heads = {id(p) for m in layers if isinstance(m, TaskHeads) for p in m.parameters()}
    for ids, rate in ((mixing, mixing_learning_rate), (heads, head_learning_rate)):
        if rate is not None:
            apart = [p for p in own + vectors if id(p) in ids]
            own, vectors = ([p for p in group if id(p) not in ids] for group in (own, vectors))
            groups += [{"params": apart, "weight_decay": 0.0, "lr": rate}]
    if task_learning_rate is None:
        groups += [{"params": own + vectors, "weight_decay": 0.0}]
    else:
        groups += [{"params": own, "weight_decay": 0.0, "lr": task_learning_rate}]
        groups += [{"params": vectors, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]
