"""The only door to DeepSpeed: process group, engine, and the state of training as whole tensors."""

from __future__ import annotations

import atexit
import contextlib
import os
import socket
import sys
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR

import mtl_lora
from mtl_lora import MTLLoRAError
from pipeline.errors import InputError
from pipeline.training.config import TrainingConfig, deepspeed_config
from pipeline.training.split_reading import each_rank_reads_its_part

os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")

# DeepSpeed's autotuner, of which nothing is used here, takes MLflow where it is found: seconds of each rank's start.
_is_hidden = sys.modules.setdefault("mlflow", None) is None  # type: ignore[arg-type]
try:
    import deepspeed
    from deepspeed import utils as zero
    from deepspeed.accelerator import get_accelerator
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
finally:
    if _is_hidden:
        del sys.modules["mlflow"]

_MOMENTS = ("exp_avg", "exp_avg_sq")


def device() -> torch.device:
    """Return this process's device, as DeepSpeed's accelerator places it."""
    return torch.device(get_accelerator().current_device_name())


def backend() -> str:
    """Return the collective backend that fits the accelerator: nccl on CUDA, gloo on CPU."""
    return "nccl" if get_accelerator().device_name() == "cuda" else "gloo"


def _import_muon() -> None:
    """Import Muon, which DeepSpeed holds every optimizer against, without the compiler that it loads for itself.

    That takes a second or two of each rank's start.
    """
    before = os.environ.get("TORCHDYNAMO_DISABLE")
    os.environ["TORCHDYNAMO_DISABLE"] = "1"
    try:
        import deepspeed.runtime.zero.muon.muon_optimizer  # noqa: F401
    finally:
        os.environ.pop("TORCHDYNAMO_DISABLE")
        if before is not None:
            os.environ["TORCHDYNAMO_DISABLE"] = before


def join_process_group() -> None:
    """Hand DeepSpeed the process group that exists, or make one from the rank variables."""
    if backend() == "gloo":
        # The shared-memory op serves inference only, takes a minute to compile, and a killed compile hangs later runs.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    if not torch.distributed.is_initialized():
        # Threads of a group that are still there at the interpreter's end abort the process.
        atexit.register(_leave_process_group)
    deepspeed.init_distributed(dist_backend=backend(), auto_mpi_discovery=False, verbose=False)


def be_the_only_rank() -> None:
    """Name this process, by the variables of a rank, the only one of a process group of its own."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ranks = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"}
    os.environ.update({**ranks, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)})


def _leave_process_group() -> None:
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def zero_keys() -> set[str]:
    """Return the keys that DeepSpeed knows under ``zero_optimization``."""
    fields = DeepSpeedZeroConfig.model_fields
    return {name for name, field in fields.items() if field.alias is None} | {
        field.alias for field in fields.values() if field.alias
    }


def parameter_groups(
    module: nn.Module,
    weight_decay: float,
    task_learning_rate: float | None = None,
    mixing_learning_rate: float | None = None,
    head_learning_rate: float | None = None,
) -> list[dict[str, Any]]:
    """Return :func:`mtl_lora.parameter_groups`, its error as bad input of the run.

    Raises:
        InputError: nothing is trainable.
    """
    try:
        return mtl_lora.parameter_groups(
            module, weight_decay, task_learning_rate, mixing_learning_rate, head_learning_rate
        )
    except MTLLoRAError as error:
        raise InputError(f"adapter: {error}") from error


def resume_schedule(scheduler: LambdaLR, saved: Mapping[str, Any]) -> None:
    """Take a schedule to a saved step; rates and groups stay this optimizer's own, since the saved ones may differ.

    Args:
        scheduler: of the run that goes on; the rates of its optimizer's groups are set.
        saved: the state of a schedule over any groups.
    """
    own = {"base_lrs": scheduler.base_lrs, "lr_lambdas": [None] * len(scheduler.base_lrs)}
    scheduler.load_state_dict({**saved, **own})
    pairs = zip(scheduler.base_lrs, scheduler.lr_lambdas, strict=True)
    scheduler._last_lr = [rate * factor(scheduler.last_epoch) for rate, factor in pairs]
    for group, rate in zip(scheduler.optimizer.param_groups, scheduler._last_lr, strict=True):
        group["lr"] = rate


@contextlib.contextmanager
def partitioned_loading(config: TrainingConfig, bfloat16: bool) -> Iterator[None]:
    """Within it, under ZeRO 3, a model that transformers loads is split over the ranks tensor by tensor as it is read;
    under other stages nothing changes. Every rank loads the same model.

    Args:
        config: the run's training configuration.
        bfloat16: whether the model computes in bfloat16.
    """
    if config.zero_stage < 3:
        yield
        return
    from transformers.integrations import HfDeepSpeedConfig
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config

    kept = HfDeepSpeedConfig(deepspeed_config(config, bfloat16))  # transformers holds it weakly
    try:
        with each_rank_reads_its_part(lambda p: deepspeed.zero.GatheredParameters([p], modifier_rank=0)):
            yield
    finally:
        del kept
        unset_hf_deepspeed_config()


@contextlib.contextmanager
def gathered_layer_by_layer(model: nn.Module) -> Iterator[None]:
    """Within it a partitioned model can be called as a whole one: each layer's tensors are gathered while it runs.

    Every rank calls it alike. A model that is not partitioned is left as it is.
    """
    gathers: dict[nn.Module, Any] = {}

    def gather(module: nn.Module, _: Any) -> None:
        gathers[module] = deepspeed.zero.GatheredParameters(list(module.parameters(recurse=False)))
        gathers[module].__enter__()

    def release(module: nn.Module, _: Any, __: Any) -> None:
        gathers.pop(module).__exit__(None, None, None)

    handles = []
    for module in model.modules():
        if any(hasattr(p, "ds_id") for p in module.parameters(recurse=False)):
            handles += [
                module.register_forward_pre_hook(gather, prepend=True),
                module.register_forward_hook(release, always_call=True),
            ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


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

        _import_muon()
        groups = parameter_groups(
            module,
            config.weight_decay,
            config.task_learning_rate,
            config.mixing_learning_rate,
            config.head_learning_rate,
        )
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

    def close(self) -> None:
        """Let go of the module, which trains no more: DeepSpeed's hooks hold it where Python's collector does not look.

        Under ZeRO 3 DeepSpeed keeps it all the same: such runs need processes of their own.
        """
        self.engine.destroy()

    @property
    def gradient_norm(self) -> float:
        """Global norm of the last step's gradients, before clipping."""
        norm = self.engine.get_global_grad_norm()
        return float("nan") if norm is None else float(norm)

    @property
    def learning_rate(self) -> float:
        """The learning rate of the next step."""
        return float(self.engine.get_lr()[0])

    def save(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Return what training goes on from, the same on any ranks and ZeRO stage; every rank calls it after a step.

        Returns:
            ``weight/NAME``, ``exp_avg/NAME`` and ``exp_avg_sq/NAME`` of each trainable parameter, whole, fp32, on CPU;
            and plain values.
        """
        self._link_moments()
        tensors = {}
        for name, parameter in self._trained():
            tensors[f"weight/{name}"] = self._whole(parameter)
            tensors |= {f"{key}/{name}": self._whole(parameter, key) for key in _MOMENTS}
        steps = {int(state["step"]) for state in self.engine.basic_optimizer.state.values()}
        schedule = self.engine.lr_scheduler.state_dict()
        return tensors, {"optimizer_step": max(steps), "schedule": schedule}

    def load(self, tensors: Mapping[str, Tensor], values: Mapping[str, Any], step: int) -> None:
        """Go on from what :meth:`save` returned after so many steps.

        Raises:
            InputError: the tensors are not those of this module.
        """
        expected = {f"{key}/{name}" for name, _ in self._trained() for key in ("weight", *_MOMENTS)}
        if expected != set(tensors):
            raise InputError(
                f"a checkpoint must hold exactly the module's trainable tensors, {len(expected)}, got {len(tensors)} "
                f"({sorted(expected ^ set(tensors))[:3]} in one only); start anew in another folder"
            )
        self._make_optimizer_state(values["optimizer_step"])
        with self.whole_parameters(modified=True):
            for name, parameter in self._trained():
                parameter.data.copy_(tensors[f"weight/{name}"])
        for name, parameter in self._trained():
            self._set_whole(parameter, tensors[f"weight/{name}"])
            for key in _MOMENTS:
                self._set_whole(parameter, tensors[f"{key}/{name}"], key)
        resume_schedule(self.engine.lr_scheduler, values["schedule"])
        self.engine.global_steps = step
        self.engine.global_samples = step * self.engine.train_batch_size()
        self.engine.micro_steps = step * self.engine.gradient_accumulation_steps()

    def _trained(self) -> list[tuple[str, nn.Parameter]]:
        return [(name, p) for name, p in self.engine.module.named_parameters() if p.requires_grad]

    def _whole(self, parameter: nn.Parameter, key: str | None = None) -> Tensor:
        """Return a parameter's fp32 master weight, or the moment ``key``, gathered from all ranks."""
        if self.zero_stage == 0:
            value = self._unsharded(parameter, key)
        elif key is None:
            value = zero.safe_get_full_fp32_param(parameter)
        else:
            value = zero.safe_get_full_optimizer_state(parameter, key)
        return value.detach().to("cpu", torch.float32, copy=True).contiguous()

    def _set_whole(self, parameter: Any, value: Tensor, key: str | None = None) -> None:
        """Set a parameter's fp32 master weight, or the moment ``key``: this rank's part of it."""
        if self.zero_stage == 0:
            self._unsharded(parameter, key).data.copy_(value)
            return
        if self.zero_stage == 3:  # the setter of whole values fails where a part is padded
            part = parameter.ds_tensor.numel()
            ranks, rank = deepspeed.comm.get_world_size(), deepspeed.comm.get_rank()
            flat = nn.functional.pad(value.flatten(), (0, part * ranks - value.numel()))
            mine = flat[part * rank : part * (rank + 1)]
            if key is None:
                zero.safe_set_local_fp32_param(parameter, mine)
            else:
                zero.safe_set_local_optimizer_state(parameter, mine, key)
        elif key is None:
            zero.safe_set_full_fp32_param(parameter, value)
        else:
            zero.safe_set_full_optimizer_state(parameter, value, key)

    def _unsharded(self, parameter: nn.Parameter, key: str | None) -> Tensor:
        wrapper, master = self.engine.optimizer, parameter
        for halves, masters in zip(
            getattr(wrapper, "fp16_groups", []), getattr(wrapper, "fp32_groups", []), strict=True
        ):  # bfloat16: the optimizer works on fp32 copies
            for half, copy in zip(halves, masters, strict=True):
                master = copy if half is parameter else master
        return master if key is None else self.engine.basic_optimizer.state[master][key]

    def _make_optimizer_state(self, step: int) -> None:
        """Give a fresh optimizer the state that its first step would have made, to be filled."""
        inner, wrapper = self.engine.basic_optimizer, self.engine.optimizer
        if self.zero_stage == 3:
            flats = list(wrapper.fp32_partitioned_groups_flat)
        else:
            flats = [flat for group in inner.param_groups for flat in group["params"]]
        for flat in flats:
            count = torch.tensor(float(step)) if isinstance(inner, AdamW) else step
            inner.state[flat] = {"step": count} | {key: torch.zeros_like(flat) for key in _MOMENTS}
        self._link_moments()

    def _link_moments(self) -> None:
        # DeepSpeed 0.19.8 does this once, after the first group's first step, when other groups have no moments yet.
        if self.zero_stage in (1, 2):
            self.engine.optimizer._hp_optimizer_states_linked = False
            self.engine.optimizer._lazy_init_hp_params_optimizer_state()

    @contextlib.contextmanager
    def whole_parameters(self, modified: bool = False) -> Iterator[None]:
        """Within it the trainable parameters are whole on every rank, also under ZeRO 3.

        Args:
            modified: the parameters are written to within; rank 0's values count.
        """
        if self.zero_stage < 3:
            yield
            return
        trained = [parameter for _, parameter in self._trained()]
        with deepspeed.zero.GatheredParameters(trained, modifier_rank=0 if modified else None):
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


def from_rank_zero(value: int) -> int:
    """Return rank 0's value on every rank."""
    mine = value if deepspeed.comm.get_rank() == 0 else 0
    return int(reduce_sum(torch.tensor([mine], device=device())))
