"""Linear layers with an adapter.

An adapted layer *owns* the frozen weight and bias of the layer it stands in for, under the same names, so the base's
state-dict keys stay as they are, and ZeRO-3, which gathers a module's own parameters around its forward, works
without help. Sizes are kept as plain integers: a partitioned parameter has no shape to read.

Axes: B batch, S sequence, M rows (B·S), I in, O out, R rank, T tasks, N up-projections.
"""

import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mtl_lora.config import MTLLoRAConfig
from mtl_lora.dropout import project_down
from mtl_lora.errors import MTLLoRAError, RoutingError
from mtl_lora.functional import fold
from mtl_lora.kernel import accumulate_up, adapted_linear, select_tasks
from mtl_lora.routing import Router

__all__ = ["AdaptedLinear", "MTLLoRALinear", "is_conv1d", "is_quantized", "linear_sizes", "plain_linear"]

_MOST_TASKS_AT_ONCE = 16
"""Up to this many tasks, a dense product with all tasks' matrices costs less than gathering one a row."""


def is_conv1d(module: nn.Module) -> bool:
    """Whether this is the transposed linear layer of GPT-2 (weight (I, O)), told by name to import nothing."""
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf")


def is_quantized(module: nn.Module) -> bool:
    """Whether a linear layer holds codes instead of a matrix of numbers, as bitsandbytes' layers of 4 and 8 bit do."""
    weight = getattr(module, "weight", None)
    return isinstance(module, nn.Linear) and isinstance(weight, Tensor) and not weight.is_floating_point()


def linear_sizes(module: nn.Module) -> tuple[int, int]:
    """Return (I, O) of a linear layer or Conv1D without reading a partitioned weight's shape."""
    if is_conv1d(module):
        nx = getattr(module, "nx", None)
        return int(nx if nx is not None else module.weight.shape[0]), int(module.nf)  # type: ignore[index,arg-type]
    return int(module.in_features), int(module.out_features)  # type: ignore[arg-type]


def plain_linear(
    kind: type[nn.Module], weight: nn.Parameter, bias: nn.Parameter | None, in_features: int, out_features: int
) -> nn.Module:
    """Return a layer of a linear type, Conv1D among them, that holds these parameters and nothing else."""
    layer = kind.__new__(kind)
    nn.Module.__init__(layer)
    sizes = {"in_features": in_features, "out_features": out_features}
    for name, size in ({"nx": in_features, "nf": out_features} if kind.__name__ == "Conv1D" else sizes).items():
        setattr(layer, name, size)
    layer.register_parameter("weight", weight)
    layer.register_parameter("bias", bias)
    return layer


class AdaptedLinear(nn.Module):
    """What all adapted layers share: the base's weight, routing, layout of rows, merging.

    Subclasses name their parameters in ``adapter_parameter_names``, those with a row a task also in
    ``task_parameter_names``, those that no gradient moves in ``planned_parameter_names``, and give :meth:`factors`,
    :meth:`reset_adapter` and :meth:`_adapted`.

    Args:
        base: the layer to stand in for, as :func:`mtl_lora.targets.is_adaptable` says.
        router: tells the task of each row; shared by all layers of a model.

    Attributes:
        trainable_tasks: ids of the tasks whose own rows get gradients; None for all.
    """

    adapter_parameter_names: tuple[str, ...] = ()
    task_parameter_names: tuple[str, ...] = ()
    planned_parameter_names: tuple[str, ...] = ()
    trainable_tasks: tuple[int, ...] | None = None

    def __init__(self, base: nn.Module, router: Router) -> None:
        super().__init__()
        self.in_features, self.out_features = linear_sizes(base)
        self.fan_in_fan_out = is_conv1d(base)
        self.weight: nn.Parameter = base.weight  # type: ignore[assignment]
        self.bias: nn.Parameter | None = base.bias  # type: ignore[assignment]
        # What holds codes computes by itself; in a list, so that its parameters stand here under their own names.
        self._quantized: list[nn.Module] = [base] if is_quantized(base) else []
        self.router = router
        self.merged_task: int | None = None
        self._unmerged_weight: list[nn.Parameter] = []  # in a list, so as to be no parameter of this module
        self.training = base.training

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., I) to (..., O), each row with its task's adapter."""
        if self.merged_task is not None or self.router.is_disabled:
            return self._base_forward(x)
        ids = self.router.current()
        rows, ids = self._lay_out(x, ids)
        return self._adapted(rows, ids).view(*x.shape[:-1], self.out_features)

    def _base_forward(self, x: Tensor) -> Tensor:
        if self._quantized:
            found: Tensor = self._quantized[0](x)
            return found
        return F.linear(x, self.weight.t() if self.fan_in_fan_out else self.weight, self.bias)

    def _lay_out(self, x: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Return x and the ids in one of the kernel's three layouts.

        Raises:
            RoutingError: the ids do not fit x's rows.
        """
        if ids.device != x.device:
            ids = ids.to(x.device)
        if ids.dim() == 0:
            return x.reshape(1, -1, self.in_features), ids
        if ids.dim() == 2:
            # Latent attention has an axis of length 1, for heads, between rows and tokens: (B, 1, S, I).
            by_token = x[:, 0] if x.dim() == 4 and x.shape[1] == 1 else x
            if ids.shape == by_token.shape[:-1] or (x.dim() == 2 and ids.numel() == x.shape[0]):
                return x.reshape(-1, self.in_features), ids.reshape(-1, 1)
        elif x.dim() > 1:
            if x.shape[0] != ids.shape[0] and self.router.allows_expansion and x.shape[0] % ids.shape[0] == 0:
                ids = ids.repeat_interleave(x.shape[0] // ids.shape[0])
            if x.shape[0] == ids.shape[0]:
                return x.reshape(x.shape[0], -1, self.in_features), ids
        raise RoutingError(
            f"task ids must have one id for each row or token of a layer's input, got ids of shape {tuple(ids.shape)} "
            f"for an input of shape {tuple(x.shape)}; give ids a token (batch, sequence), or one for the batch"
        )

    def _adapted(self, rows: Tensor, ids: Tensor) -> Tensor:
        raise NotImplementedError

    def factors(self, task: int) -> tuple[Tensor, Tensor]:
        """Return one task's adapter as the LoRA pair (A (R', I), B (O, R')) with scaling inside, at least fp32."""
        raise NotImplementedError

    def reset_adapter(self) -> None:
        """Give the adapter's parameters their initial values."""
        raise NotImplementedError

    def anneal(self, done: float) -> None:
        """Move what moves by plan to where it is after a share of the training, from 0 to 1."""

    def adapter_parameters(self) -> dict[str, nn.Parameter]:
        """Return the adapter's own parameters by name, without the base's weight and bias."""
        return {name: getattr(self, name) for name in self.adapter_parameter_names}

    @torch.no_grad()
    def set_tasks(self, rows: Mapping[str, Tensor]) -> None:
        """Replace the tensors with a row a task, and with them the number of tasks; they become new parameters."""
        for name, value in rows.items():
            old: nn.Parameter = getattr(self, name)
            setattr(self, name, nn.Parameter(value.to(old.dtype).clone(), requires_grad=old.requires_grad))

    def delta_weight(self, task: int) -> Tensor:
        """Return one task's change of the weight, in the weight's own layout, at least fp32."""
        down, up = self.factors(task)
        delta_OI = up @ down
        return delta_OI.t() if self.fan_in_fan_out else delta_OI

    @torch.no_grad()
    def merged_weight(self, task: int, weight: Tensor) -> Tensor:
        """Return a weight of this layer with one task's change added, rounded to its type once.

        Raises:
            MTLLoRAError: the weight is quantised.
        """
        if not weight.is_floating_point():
            raise MTLLoRAError(
                f"a task is merged into a base of plain weights, got one of {weight.dtype} codes; load the same base "
                "without quantization and merge there"
            )
        delta = self.delta_weight(task)
        return (weight.to(delta.dtype) + delta).to(weight.dtype)

    @torch.no_grad()
    def merge(self, task: int) -> None:
        """Add a task's adapter to the weight; the unmerged weight is kept, so that :meth:`unmerge` is exact.

        Raises:
            MTLLoRAError: the layer is merged already.
        """
        if self.merged_task is not None:
            raise MTLLoRAError(
                f"a layer merges one task at a time, got task {self.merged_task} merged; unmerge() first"
            )
        merged = self.merged_weight(task, self.weight.data)
        # A parameter of its own: another layer may be tied to the unmerged one.
        self._unmerged_weight = [self.weight]
        self.weight = nn.Parameter(merged, requires_grad=self.weight.requires_grad)
        self.merged_task = task

    @torch.no_grad()
    def unmerge(self) -> None:
        """Take a merged adapter out again: the weight is the very one before merging."""
        if self._unmerged_weight:
            self.weight = self._unmerged_weight[0]
        self._unmerged_weight, self.merged_task = [], None

    def to_base(self, template: type[nn.Module] = nn.Linear) -> nn.Module:
        """Return an ordinary layer with this weight as it stands now (merged or not)."""
        if self._quantized:
            return self._quantized[0]
        layer = plain_linear(template, self.weight, self.bias, self.in_features, self.out_features)
        layer.training = self.training
        return layer

    def _compute_dtype(self, x: Tensor) -> torch.dtype:
        device_type = x.device.type
        if torch.is_autocast_enabled(device_type):
            return torch.get_autocast_dtype(device_type)
        return x.dtype if self._quantized else self.weight.dtype

    def extra_repr(self) -> str:
        """Describe the sizes, as ``nn.Linear`` does."""
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"


class MTLLoRALinear(AdaptedLinear):
    """h = W x + s Σᵢ softmax(w_t / τ)ᵢ Bᵢ Λ_t A x (arXiv 2410.09437); parameters stacked over tasks.

    Attributes:
        lora_A: A (R, I), Kaiming-uniform(√5) at first.
        lora_B: B (N, O, R), zero at first, so that the adapted layer starts as the base.
        lora_transform: Λ (T, R, R), the identity at first, or its diagonal (T, R).
        lora_mixing: w (T, N), Kaiming-uniform(√5) at first, or of the spread that the configuration names.
        lora_temperature: log of a factor on τ (1,), where it is learned or moves by plan; else None.
    """

    adapter_parameter_names: tuple[str, ...] = ("lora_A", "lora_B", "lora_transform", "lora_mixing")
    task_parameter_names = ("lora_transform", "lora_mixing")
    lora_temperature: nn.Parameter | None

    def __init__(
        self, base: nn.Module, config: MTLLoRAConfig, router: Router, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__(base, router)
        r, tasks, ups = config.r, config.num_tasks, config.num_up_projections
        self.r = r
        self.temperature, self.scaling, self.dropout = config.temperature, config.scaling, config.lora_dropout
        self.is_full = config.transform == "full"
        kind: dict[str, Any] = {"device": self.weight.device, "dtype": dtype or self.weight.dtype}
        self.lora_A = nn.Parameter(torch.empty(r, self.in_features, **kind))
        self.lora_B = nn.Parameter(torch.empty(ups, self.out_features, r, **kind))
        self.lora_transform = nn.Parameter(torch.empty((tasks, r, r) if self.is_full else (tasks, r), **kind))
        self.lora_mixing = nn.Parameter(torch.empty(tasks, ups, **kind))
        self.mixing_spread, start = config.mixing_spread, config.temperature_start
        self.log_temperature_start = 0.0 if start is None else math.log(start / config.temperature)
        self.register_parameter("lora_temperature", None)
        if config.learn_temperature or start is not None:
            self.lora_temperature = nn.Parameter(torch.empty(1, **kind), requires_grad=config.learn_temperature)
            self.adapter_parameter_names = (*self.adapter_parameter_names, "lora_temperature")
            self.planned_parameter_names = () if config.learn_temperature else ("lora_temperature",)
        self.reset_adapter()

    @torch.no_grad()
    def reset_adapter(self) -> None:
        """Initialise as the authors' code does (pUmpKin-Co/MTL-LoRA 7848a70): B = 0, Λ = I, A and w Kaiming."""
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))
        nn.init.zeros_(self.lora_B)
        nn.init.kaiming_uniform_(self.lora_mixing, a=math.sqrt(5))
        if self.mixing_spread is not None:
            bound = self.mixing_spread * self.temperature
            self.lora_mixing.mul_(bound * math.sqrt(self.lora_mixing.shape[1]))  # the bound of Kaiming(√5) is 1/√N
        self.anneal(0.0)
        self.lora_transform.fill_(1)
        if self.is_full:
            self.lora_transform.copy_(torch.eye(self.r, device=self.lora_transform.device))

    @torch.no_grad()
    def anneal(self, done: float) -> None:
        """Move τ to where it is after this share of the training, from its start (0) to the configured one (1)."""
        if self.lora_temperature is not None:
            self.lora_temperature.fill_((1.0 - done) * self.log_temperature_start)

    def mixing_logits(self) -> Tensor:
        """Return w (T, N) for a softmax over w / τ of the configured τ, whatever τ is at present."""
        if self.lora_temperature is None:
            return self.lora_mixing
        return self.lora_mixing * torch.exp(-self.lora_temperature)

    def _adapted(self, rows: Tensor, ids: Tensor) -> Tensor:
        dropout = self.dropout if self.training else 0.0
        dtype = self._compute_dtype(rows)
        if self._may_keep_fold() and not dropout:
            return self._decoded(rows.to(dtype), ids)
        if torch.is_autocast_enabled(rows.device.type):
            with torch.autocast(rows.device.type, enabled=False):
                return self._run_kernel(rows, ids, dropout, dtype)
        return self._run_kernel(rows, ids, dropout, dtype)

    def _run_kernel(self, rows: Tensor, ids: Tensor, dropout: float, dtype: torch.dtype) -> Tensor:
        is_quantized = bool(self._quantized)
        return adapted_linear(
            rows,
            None if is_quantized else self.weight,
            None if is_quantized else self.bias,
            down_RI=self.lora_A,
            up_NOR=self.lora_B,
            transform=self.lora_transform,
            mixing_TN=self.mixing_logits(),
            ids=ids,
            temperature=self.temperature,
            scaling=self.scaling,
            dropout=dropout,
            compute_dtype=dtype,
            trainable_tasks=self.trainable_tasks,
            is_transposed=self.fan_in_fan_out,
            base=self._base_forward(rows) if is_quantized else None,
        )

    def _may_keep_fold(self) -> bool:
        return self.router.kept_folds is not None and not torch.is_grad_enabled() and not torch.compiler.is_compiling()

    def _decoded(self, rows: Tensor, ids: Tensor) -> Tensor:
        """Run with folded matrices that are kept as long as the weights are fixed.

        Rows of one token each, as in decoding, are put into their tasks' blocks by one product with an indicator, and
        meet all tasks' matrices in one dense product: a product a row would be many times slower than the base's.
        """
        y = self._base_forward(rows)
        down_RM = project_down(rows.flatten(0, -2), self.lora_A.to(rows.dtype))
        down = down_RM.t().unflatten(0, rows.shape[:-1])
        folded_TRO = self._folded_once(rows.dtype)
        num_tasks = folded_TRO.shape[0]
        if ids.dim() == 1 and rows.shape[1] == 1 and num_tasks <= _MOST_TASKS_AT_ONCE:
            blocks = down * self.router.indicator(ids, num_tasks, rows.dtype)
            y.squeeze(1).addmm_(blocks.flatten(1), folded_TRO.flatten(0, 1))
            return y
        return accumulate_up(y, down, select_tasks(folded_TRO, ids), ids)

    def _folded_once(self, dtype: torch.dtype) -> Tensor:
        kept, key = self.router.kept_folds, (self, dtype)
        if kept is None:
            return self.folded().to(dtype)
        if key not in kept:
            kept[key] = self.folded().to(dtype)
        return kept[key]

    @torch.no_grad()
    def folded(self) -> Tensor:
        """Return every task's folded up-projection U_tᵀ, scaling inside, (T, R, O), at least fp32."""
        return fold(self.lora_B, self.lora_transform, self.mixing_logits(), self.temperature, self.scaling)

    @torch.no_grad()
    def factors(self, task: int) -> tuple[Tensor, Tensor]:
        """Return A (R, I) and U_t (O, R): the LoRA that this task exactly is."""
        folded_TRO = self.folded()
        return self.lora_A.detach().to(folded_TRO.dtype), folded_TRO[task].t()
