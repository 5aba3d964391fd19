"""A base with an adapter in it: injection, routing, merging. Saving, tasks and export work on this."""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from mtl_lora.config import MTLLoRAConfig
from mtl_lora.errors import MTLLoRAError, RoutingError, TargetError, TaskError
from mtl_lora.files import WeightsElsewhere, check_tensors, fingerprint
from mtl_lora.heads import HEADS, TaskHeads
from mtl_lora.layer import AdaptedLinear
from mtl_lora.routing import Router, TaskIds, normalise_task_ids
from mtl_lora.targets import (
    find_named,
    find_targets,
    replace_module,
    replace_parameters,
    train_extras,
    warn_of_frozen_experts,
)

__all__ = ["AdapterCore"]


class AdapterCore(nn.Module):
    """A base model whose targets are adapted layers: injection, routing, merging.

    A method subclasses :class:`mtl_lora.model.AdapterModel`, which adds files, tasks and exports to this.

    Args:
        base: any torch module; its target layers are replaced in place and all its parameters frozen.
        config: the adapter's configuration.
        adapter_dtype: type of the adapter's parameters; None is fp32 on a half-precision base, else the base's.

    Raises:
        TargetError: a target matches nothing, or what cannot be adapted.

    Warns:
        FrozenExpertsWarning: the base holds experts that no adapter reaches.
    """

    method = ""

    def __init__(self, base: nn.Module, config: MTLLoRAConfig, adapter_dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self.router = Router()
        self.adapter_config = config
        self.base_model = base
        paths = find_targets(base, config)
        saved_paths = find_named(base, config.modules_to_save)
        base.requires_grad_(False)
        self.layer_types: dict[str, type[nn.Module]] = {}
        for path in paths:
            layer = base.get_submodule(path)
            self.layer_types[path] = type(layer)
            dtype = adapter_dtype or torch.promote_types(layer.weight.dtype, torch.float32)  # type: ignore[arg-type]
            replace_module(base, path, self._make_layer(layer, config.for_layer(path), dtype))
        self._finish(saved_paths)

    def _make_layer(self, layer: nn.Module, config: MTLLoRAConfig, dtype: torch.dtype) -> AdaptedLinear:
        raise NotImplementedError

    def _finish(self, saved_paths: Sequence[str]) -> None:
        """Let what trains besides the adapter train, and take the fingerprint of what stays frozen."""
        if self.adapter_config.head_classes:
            self._put_heads()
        train_extras(self.base_model, self.adapter_config, saved_paths, self._bias_modules())
        own, named = self._own_parameter_ids(), self.base_model.named_parameters()
        self.extra_parameter_names = {name for name, p in named if p.requires_grad and id(p) not in own}
        self._base_fingerprint = fingerprint(self._frozen_tensors(), gathers=True)
        warn_of_frozen_experts(self.base_model)

    def _put_heads(self) -> None:
        size = getattr(getattr(self.base_model, "config", None), "hidden_size", None)
        if not isinstance(size, int):
            raise TargetError(
                f"heads need a base whose config tells its hidden_size, {type(self.base_model).__name__} does not; "
                "leave head_classes out"
            )
        parameter = next(self.base_model.parameters())
        dtype = torch.promote_types(parameter.dtype, torch.float32)
        heads = TaskHeads(size, self.adapter_config.head_classes, device=parameter.device, dtype=dtype)
        self.base_model.add_module(HEADS, heads)

    @property
    def task_heads(self) -> TaskHeads | None:
        """The tasks' classification heads, None where tasks have none."""
        found = getattr(self.base_model, HEADS, None)
        return found if isinstance(found, TaskHeads) else None

    def task_modules(self) -> list[AdaptedLinear | TaskHeads]:
        """Return the modules that hold something of each task: adapted layers, and the heads where there are any."""
        heads = self.task_heads
        return [*self.adapted_layers().values(), *([] if heads is None else [heads])]

    def base_fingerprint(
        self,
        elsewhere: WeightsElsewhere | None = None,
        quantization: Callable[[Tensor], str | None] | None = None,
    ) -> dict[str, Any] | None:
        """Return what identifies the base, taken when the adapter was made, or now where it could not be read then.

        Args:
            elsewhere: where the weights of a base on the meta device lie.
            quantization: asks for the fingerprint that the base would have with codes in the place of some tensors:
                says of a tensor which.
        """
        if quantization is not None:
            return fingerprint(self._frozen_tensors(), elsewhere=elsewhere, quantization=quantization)
        if self._base_fingerprint is None:
            self._base_fingerprint = fingerprint(self._frozen_tensors(), elsewhere=elsewhere)
        return self._base_fingerprint

    def _bias_modules(self) -> list[nn.Module]:
        """Return the modules whose bias trains with ``bias="lora_only"``."""
        return list(self.adapted_layers().values())

    # --- looking inside -------------------------------------------------------------------------------------------

    @property
    def task_names(self) -> tuple[str, ...]:
        """Names of the tasks, in the order of their ids."""
        return tuple(self.adapter_config.task_names)

    def task_id(self, task: int | str) -> int:
        """Return a task's id.

        Raises:
            TaskError: no such task.
        """
        if isinstance(task, str) and task in self.task_names:
            return self.task_names.index(task)
        if isinstance(task, int) and 0 <= task < len(self.task_names):
            return task
        raise TaskError(f"a task must be known, got {task!r}; the tasks are {list(self.task_names)}")

    def adapted_layers(self) -> dict[str, AdaptedLinear]:
        """Return the adapted layers by their path in the base."""
        return {path: m for path, m in self.base_model.named_modules() if isinstance(m, AdaptedLinear)}

    def _adapter_parameter_ids(self) -> set[int]:
        return {id(p) for layer in self.adapted_layers().values() for p in layer.adapter_parameters().values()}

    def _own_parameter_ids(self) -> set[int]:
        heads = [] if self.task_heads is None else self.task_heads.parameters()
        return self._adapter_parameter_ids() | {id(p) for p in heads}

    def _frozen_tensors(self) -> list[tuple[str, Tensor]]:
        own = self._own_parameter_ids()
        return [
            (name, p)
            for name, p in self.base_model.named_parameters()
            if id(p) not in own and name not in self.extra_parameter_names
        ]

    def adapter_state_dict(self) -> dict[str, Tensor]:
        """Return what the adapter consists of: its own tensors and the base's parameters that train with it."""
        own = self._own_parameter_ids()
        named = self.base_model.named_parameters()
        return {name: p.detach() for name, p in named if id(p) in own or name in self.extra_parameter_names}

    @torch.no_grad()
    def load_adapter_state_dict(self, tensors: dict[str, Tensor]) -> None:
        """Copy an adapter's tensors in; on a base without memory, on the meta device, they take the places of its own.

        Raises:
            AdapterFileError: names or shapes differ from this model's, in either direction.
        """
        expected = self.adapter_state_dict()
        check_tensors(expected, tensors)
        without_memory = {}
        for name, tensor in expected.items():
            if tensor.is_meta:
                old = self.base_model.get_parameter(name)
                without_memory[old] = nn.Parameter(tensors[name].to(old.dtype), requires_grad=old.requires_grad)
            else:
                tensor.copy_(tensors[name])
        replace_parameters(self.base_model, without_memory)

    def count_parameters(self) -> tuple[int, int]:
        """Return the numbers of trainable and of all parameters, ZeRO-3's partitioned ones by their full size."""
        sizes = [(_numel(p), p.requires_grad) for p in self.parameters()]
        return sum(n for n, trains in sizes if trains), sum(n for n, _ in sizes)

    def print_trainable_parameters(self) -> None:
        """Print the numbers of trainable and of all parameters, as PEFT does."""
        trainable, total = self.count_parameters()
        share = 100 * trainable / max(total, 1)
        print(f"trainable params: {trainable:,} || all params: {total:,} || trainable%: {share:.4f}")  # noqa: T201

    # --- running --------------------------------------------------------------------------------------------------

    def forward(self, *args: Any, task_ids: TaskIds | None = None, **kwargs: Any) -> Any:
        """Run the base, each row with its task's adapter.

        Args:
            *args: go to the base unchanged.
            task_ids: (B,) one a row, (B, S) one a token, or an int, a name or a 0-d tensor for the whole batch.
                Only a single-task model may leave it out.
            **kwargs: go to the base unchanged.

        Raises:
            RoutingError: the ids do not fit the tasks or the rows.
        """
        ids = self._ids_for(task_ids)
        with self.router.route(ids):
            return self.base_model(*args, **kwargs)

    def _checked_ids(self, task_ids: TaskIds | None) -> Tensor:
        return normalise_task_ids(task_ids, self.task_names)

    def _ids_for(self, task_ids: TaskIds | None) -> Tensor:
        merged = self.merged_task
        if merged is not None and task_ids is None:
            return torch.tensor(merged)
        ids = self._checked_ids(task_ids)
        if merged is not None and bool((ids != merged).any()):
            raise RoutingError(
                f"a merged model serves only its task {self.task_names[merged]!r}, got other ids; unmerge() first"
            )
        return ids

    def fixed_weights(self) -> AbstractContextManager[None]:
        """Promise that no weight changes inside: inference without gradients then folds each task once, not a batch.

        For loops over batches, as in scoring; :meth:`generate` does so by itself.
        """
        return self.router.fixed_weights()

    @torch.no_grad()
    def generate(self, *args: Any, task_ids: TaskIds | None = None, **kwargs: Any) -> Any:
        """Call the base's ``generate`` with one id a prompt; beams and returned sequences follow their prompt.

        Raises:
            RoutingError: ids are given a token, which has no meaning for tokens that are yet to come.
        """
        ids = self._ids_for(task_ids)
        if ids.dim() == 2:
            raise RoutingError("generate takes one task id a prompt, got ids a token; give shape (batch,)")
        router = self.router
        with router.route(ids), router.fixed_weights():
            outer, router.allows_expansion = router.allows_expansion, True
            try:
                return self.base_model.generate(*args, **kwargs)  # type: ignore[operator]
            finally:
                router.allows_expansion = outer

    @contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """Run as the base inside: layers skip their adapters."""
        with self.router.exclusive():
            outer, self.router.is_disabled = self.router.is_disabled, True
            try:
                yield
            finally:
                self.router.is_disabled = outer

    def __getattr__(self, name: str) -> Any:
        """Look names up in the base too, so that ``config``, ``device`` and the like are at hand."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base_model":
                raise
            return getattr(super().__getattr__("base_model"), name)

    # --- merging --------------------------------------------------------------------------------------------------

    @property
    def merged_task(self) -> int | None:
        """The id of the task that is merged into the weights, or None."""
        return next((layer.merged_task for layer in self.adapted_layers().values()), None)

    def merge(self, task: int | str) -> None:
        """Add a task's adapter to the base's weights, for inference at the base's speed; see :meth:`unmerge`."""
        index = self.task_id(task)
        for layer in self.adapted_layers().values():
            layer.merge(index)

    def unmerge(self) -> None:
        """Take the merged task out again; the weights are bit-identical to those before merging."""
        for layer in self.adapted_layers().values():
            layer.unmerge()

    def merge_and_unload(self, task: int | str) -> nn.Module:
        """Return the base with a task merged in and ordinary layers again; this model is used up."""
        if self.merged_task is None:
            self.merge(task)
        elif self.merged_task != self.task_id(task):
            raise MTLLoRAError(f"another task is merged, got {task!r} to unload; unmerge() first")
        for path, layer in self.plain_layers().items():
            replace_module(self.base_model, path, layer)
        return self.base_model

    def merges(self, task: int) -> dict[str, Callable[[Tensor], Tensor]]:
        """Return by an adapted layer's path what makes of the base's weight the merged one, in the layer's own layout:
        for a base whose weights are not in memory all at once."""
        return {path: partial(layer.merged_weight, task) for path, layer in self.adapted_layers().items()}

    def plain_layers(self) -> dict[str, nn.Module]:
        """Return an ordinary layer for each adapted one, by path, sharing its weights as they stand now."""
        return {path: layer.to_base(self.layer_types[path]) for path, layer in self.adapted_layers().items()}

    def lora_pairs(self, task: int) -> dict[str, dict[str, Tensor]]:
        """Return each layer's tensors by PEFT's suffixes, in fp32, scaling inside ``lora_B``."""
        pairs = {}
        for path, layer in self.adapted_layers().items():
            down, up = layer.factors(task)
            pairs[path] = {"lora_A.weight": down.float(), "lora_B.weight": up.float()}
        return pairs


def _numel(parameter: nn.Parameter) -> int:
    """Return a parameter's number of values, of a partitioned one or of one of packed codes too."""
    packed = getattr(getattr(parameter, "quant_state", None), "shape", None)
    return math.prod(packed) if packed else int(getattr(parameter, "ds_numel", parameter.numel()))
