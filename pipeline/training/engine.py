"""The only door to DeepSpeed: process group, engine, checkpoints.

A checkpoint holds the trainable parameters, the optimizer state and a client state; frozen weights stay out.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim import AdamW, Optimizer

os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")

import deepspeed
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

from pipeline.errors import InputError
from pipeline.training.config import TrainingConfig, deepspeed_config

TAG = "state"


def device() -> torch.device:
    """Return this process's device, as DeepSpeed's accelerator places it."""
    return torch.device(get_accelerator().current_device_name())


def backend() -> str:
    """Return the collective backend that fits the accelerator: nccl on CUDA, gloo on CPU."""
    return "nccl" if get_accelerator().device_name() == "cuda" else "gloo"


def join_process_group() -> None:
    """Hand DeepSpeed the process group that exists, or make one from the rank variables."""
    if backend() == "gloo":
        # The shared-memory op serves inference only, takes a minute to compile, and a killed compile hangs later runs.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(dist_backend=backend(), auto_mpi_discovery=False, verbose=False)


def zero_keys() -> set[str]:
    """Return the keys that DeepSpeed knows under ``zero_optimization``."""
    fields = DeepSpeedZeroConfig.model_fields
    return {name for name, field in fields.items() if field.alias is None} | {
        field.alias for field in fields.values() if field.alias
    }


def parameter_groups(
    module: nn.Module, weight_decay: float, task_learning_rate: float | None = None
) -> list[dict[str, Any]]:
    """Return the trainable parameters, those of one dimension and the mixing logits without decay.

    Args:
        module: whose parameters are trained.
        weight_decay: of the others.
        task_learning_rate: of what each task has of its own (Λ and w); None for the common rate.

    Raises:
        InputError: nothing is trainable.
    """
    named = [(name, p) for name, p in module.named_parameters() if p.requires_grad]
    if not named:
        raise InputError("a run must train at least one parameter, got none; check adapter.target_modules")
    own = {name for layer in module.modules() for name in getattr(layer, "task_parameter_names", ())}
    groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
    for name, p in named:
        decays = p.ndim >= 2 and not name.endswith("lora_mixing")
        has_own_rate = task_learning_rate is not None and name.rpartition(".")[2] in own
        groups.setdefault((decays, has_own_rate), []).append(p)
    return [
        {"params": parameters, "weight_decay": weight_decay if decays else 0.0}
        | ({"lr": task_learning_rate} if has_own_rate else {})
        for (decays, has_own_rate), parameters in sorted(groups.items(), key=lambda item: item[0], reverse=True)
    ]


def _drop_tied_frozen(module: nn.Module, state_dict: dict[str, Any], prefix: str, _: Any) -> None:
    """Leave out the second names of frozen tied weights, which DeepSpeed's exclusion of frozen weights overlooks."""
    first_names = {name for name, _ in module.named_parameters()}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        if not parameter.requires_grad and name not in first_names:
            state_dict.pop(prefix + name, None)


class Engine:
    """A module under DeepSpeed ZeRO with AdamW and a learning-rate schedule.

    Args:
        module: what computes the loss; its trainable parameters are trained.
        config: the run's training configuration.
        num_steps: optimizer steps of the whole run, for the schedule.
        bfloat16: whether the module computes in bfloat16 (master weights stay fp32).
    """

    def __init__(self, module: nn.Module, config: TrainingConfig, num_steps: int, bfloat16: bool) -> None:
        from transformers import get_scheduler

        def schedule(optimizer: Optimizer) -> Any:
            warmup = round(config.warmup_share * num_steps)
            name = "constant_with_warmup" if config.schedule == "constant" else config.schedule
            return get_scheduler(name, optimizer, num_warmup_steps=warmup, num_training_steps=num_steps)

        module.register_state_dict_post_hook(_drop_tied_frozen)
        groups = parameter_groups(module, config.weight_decay, config.task_learning_rate)
        optimizer = AdamW(groups, lr=config.learning_rate)
        self.engine, *_ = deepspeed.initialize(
            model=module, optimizer=optimizer, lr_scheduler=schedule, config=deepspeed_config(config, bfloat16)
        )
        self.zero_stage = config.zero_stage

    def __call__(self, *args: Any) -> Any:
        """Run the module's forward."""
        return self.engine(*args)

    def backward(self, loss: torch.Tensor, is_last: bool) -> None:
        """Accumulate one micro-batch's gradients; the last one's backward makes them the mean over the ranks."""
        self.engine.set_gradient_accumulation_boundary(is_last)
        self.engine.backward(loss)
        if not is_last:
            self.engine.step()  # ends the micro-batch, moves nothing

    def step(self) -> None:
        """After the last backward: clip, update and move the schedule."""
        self.engine.step()

    @property
    def gradient_norm(self) -> float:
        """Global norm of the last step's gradients, before clipping."""
        norm = self.engine.get_global_grad_norm()
        return float("nan") if norm is None else float(norm)

    @property
    def learning_rate(self) -> float:
        """The learning rate of the next step."""
        return float(self.engine.get_lr()[0])

    def save(self, folder: Path, client_state: dict[str, Any]) -> None:
        """Write this rank's part of a checkpoint; every rank calls it."""
        self.engine.save_checkpoint(str(folder), tag=TAG, client_state=client_state, exclude_frozen_parameters=True)

    def load(self, folder: Path) -> dict[str, Any]:
        """Load a checkpoint of the same number of ranks and return its client state.

        Raises:
            InputError: the folder holds no checkpoint of this engine.
        """
        loaded, client_state = self.engine.load_checkpoint(str(folder), tag=TAG, load_module_strict=False)
        if loaded is None:
            raise InputError(f"a checkpoint must hold the tag {TAG!r}, found none in {folder}; remove the folder")
        return client_state

    @contextlib.contextmanager
    def whole_parameters(self) -> Iterator[None]:
        """Within it the trainable parameters are whole on every rank, also under ZeRO 3."""
        if self.zero_stage < 3:
            yield
            return
        trained = [p for p in self.engine.module.parameters() if p.requires_grad]
        with deepspeed.zero.GatheredParameters(trained):
            yield


def reduce_sum(tensor: torch.Tensor) -> torch.Tensor:
    """Sum a tensor over the ranks, in place."""
    deepspeed.comm.all_reduce(tensor)
    return tensor


def largest(number: int) -> int:
    """Return the largest of the ranks' numbers."""
    tensor = torch.tensor(number, device=device())
    deepspeed.comm.all_reduce(tensor, op=deepspeed.comm.ReduceOp.MAX)
    return int(tensor)


def gather(value: Any) -> list[Any]:
    """Return every rank's value, on every rank."""
    values: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(values, value)
    return values
