"""A base whose weights stay in their files: what is read is one layer's at a time, whatever the model's size.

The model is transformers' own, offloaded to disk: its parameters are on the meta device, and an index says which file
holds each. Only weights that transformers computes while it loads, such as the stacked experts of a mixture, are
written anew, into a folder that goes with the model.
"""

from __future__ import annotations

import logging
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import torch
from torch import Tensor, nn

from mtl_lora import AdapterModel, MTLLoRAError
from mtl_lora.files import check_base
from mtl_lora.targets import replace_module
from pipeline.errors import InputError
from pipeline.heap import returned_when_freed
from pipeline.modeling.adapter import adapter_description, load_adapter
from pipeline.modeling.architecture import is_encoder
from pipeline.modeling.base_model import base_settings, load_base, unproven_base
from pipeline.modeling.config import BaseModelConfig
from pipeline.modeling.quantization import quantized_layers

SHARD_BYTES = 1 << 30
"""Of a merged model's files: what is held at once while they are written, but for a larger tensor."""


class OffloadedBase:
    """A model on the meta device with the place of each of its parameters.

    Args:
        model: whose parameters are on the meta device, and its buffers in memory.
        weights: each parameter by its name in the model, read when it is asked for.
    """

    def __init__(self, model: nn.Module, weights: Mapping[str, Tensor]) -> None:
        self.model, self._weights = model, weights
        # By identity: under an adapter the same parameters bear other names. They are held, so that no other gets one.
        self._parameters = {id(p): (name, p) for name, p in model.named_parameters()}
        self._quantizable = {id(layer.weight) for layer in quantized_layers(model).values()}

    def read(self, parameter: Tensor) -> Tensor:
        """Return a parameter's values from its file."""
        return self._weights[self._parameters[id(parameter)][0]]

    def adapted(self, folder: Path, task_names: list[str]) -> AdapterModel:
        """Return this base under a saved adapter, whose own tensors are in memory.

        Raises:
            InputError: the folder holds none, a damaged one, or one of another base or other tasks.
        """
        model = load_adapter(self.model, folder, task_names)
        try:
            saved, present = adapter_description(folder)["base"], model.base_fingerprint(self)
            if saved is not None and (kind := saved.get("quantization")):
                # It was trained on codes of these weights.
                present = model.base_fingerprint(self, lambda p: kind if id(p) in self._quantizable else None)
            check_base(saved, present)
        except MTLLoRAError as error:
            raise InputError(f"adapter folder {folder}: {error}") from error
        return model

    @contextmanager
    def reading(self, model: nn.Module) -> Iterator[None]:
        """Within it a model of these parameters can be called: those of a layer are read while it runs."""
        held: dict[nn.Module, list[tuple[nn.Module, str, nn.Parameter]]] = {}

        def read(module: nn.Module, _: Any) -> None:
            held[module] = []
            # PEFT's DoRA reads the weight of the layer inside it.
            inside = module.modules() if hasattr(module, "get_base_layer") else (module,)
            for owner in inside:
                for name, parameter in owner._parameters.items():
                    if parameter is not None and id(parameter) in self._parameters and parameter.is_meta:
                        held[module].append((owner, name, parameter))
                        owner._parameters[name] = nn.Parameter(self.read(parameter), requires_grad=False)

        def release(module: nn.Module, _: Any, __: Any) -> None:
            for owner, name, parameter in held.pop(module):
                owner._parameters[name] = parameter

        handles = []
        for module in model.modules():
            handles.append(module.register_forward_pre_hook(read, prepend=True))
            handles.append(module.register_forward_hook(release, always_call=True))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def save_merged(self, adapted: AdapterModel, task: str, folder: Path) -> None:
        """Write a task merged into this base as transformers writes a model, a shard in memory at a time.

        Args:
            adapted: this base under its adapter; used up.
            task: its name.
            folder: written into.
        """
        merges = adapted.merges(adapted.task_id(task))
        layers = adapted.plain_layers()
        merging = {id(layer.weight): merges[path] for path, layer in layers.items()}
        model: Any = adapted.base_model
        for path, layer in layers.items():
            replace_module(model, path, layer)
        vars(model).pop("peft_config", None)

        def merged(parameter: nn.Parameter) -> Tensor:
            weight = self.read(parameter)
            return merging[id(parameter)](weight) if id(parameter) in merging else weight

        self.save(folder, merged)

    def save(self, folder: str | Path, read: Callable[[nn.Parameter], Tensor] | None = None) -> None:
        """Write this base as transformers writes a model, a shard in memory at a time; it is used up.

        Args:
            folder: written into.
            read: returns what is written of a parameter; None: what it is.
        """
        model, values = cast(Any, self.model), read or self.read
        # What transformers asks where it saves a model that it offloaded, a shard at a time.
        model.hf_device_map, model._hf_hook = (
            {"": "disk"},
            SimpleNamespace(weights_map=_Asked(lambda name: values(model.get_parameter(name)))),
        )
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Attempting to save a model with offloaded modules")
            model.save_pretrained(folder, max_shard_size=SHARD_BYTES)


class _Asked:
    """A mapping whose values are made when they are asked for."""

    def __init__(self, make: Callable[[str], Tensor]) -> None:
        self._make = make

    def __getitem__(self, name: str) -> Tensor:
        return self._make(name)


@contextmanager
def offloaded_base(config: BaseModelConfig, dtype: torch.dtype | None = None) -> Iterator[OffloadedBase]:
    """Yield a base whose weights stay in its files, in its own precision also where it is trained on quantised.

    Args:
        config: names it.
        dtype: that its values are read in; None for ``model.dtype``.

    Raises:
        InputError: as in :func:`pipeline.modeling.base_model.load_base`, but for its scores, which are not proven.
    """
    from accelerate.hooks import remove_hook_from_submodules

    # It would warn that parameters are on the meta device, which is what is asked for.
    logging.getLogger("accelerate.big_modeling").setLevel(logging.ERROR)
    plain = config.model_copy(update={"quantization": None})
    asked = {} if dtype is None else {"dtype": dtype}
    with returned_when_freed(), tempfile.TemporaryDirectory() as folder:
        model = unproven_base(plain, device_map={"": "disk"}, offload_folder=folder, **asked)
        hooks: Iterator[Any] = (getattr(module, "_hf_hook", None) for module in model.modules())
        weights = next(hook.weights_map.dataset for hook in hooks if getattr(hook, "weights_map", None) is not None)
        remove_hook_from_submodules(model)
        del model.hf_device_map
        yield OffloadedBase(model.requires_grad_(False).eval(), weights)


@contextmanager
def adapter_to_export(
    config: BaseModelConfig, folder: Path, task_names: list[str]
) -> Iterator[tuple[AdapterModel, OffloadedBase | None]]:
    """Yield a saved adapter on its base, and where the base's weights lie, as exporting a task asks.

    An encoder, which is small, is loaded; the weights of a language model stay in their files.

    Args:
        config: names the base.
        folder: of the adapter.
        task_names: of its tasks, in order.

    Raises:
        InputError: the base or the adapter does not load, or they do not belong together.
    """
    if is_encoder(base_settings(config)):
        yield load_adapter(load_base(config), folder, task_names), None
        return
    with offloaded_base(config) as base:
        yield base.adapted(folder, task_names), base
