"""A device that exists in name only: what would run on a GPU runs here without one, and each wait for it is counted.

Tensors on it have shapes and types and no values (torch's fake tensors). An operation that mixes tensors of the host
and of the device fails as it does on a GPU; one that needs a value of the device is a wait, and fails or is counted.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

NAME = "fakegpu"
_WAITS = ("_local_scalar_dense", "nonzero", "masked_select", "bincount", "unique", "_unique2", "equal", "is_nonzero")
"""Operations whose result's size or value the host must know before it goes on."""


@cache
def register() -> None:
    """Make the device known to this process, for good: torch then takes it for the one accelerator that is there, so
    tests that use it run in a process of their own."""
    _setup_privateuseone_for_python_backend(NAME)


class _Watch(TorchDispatchMode):
    """Counts what makes the host wait, and copies from the host, by operation."""

    def __init__(self) -> None:
        super().__init__()
        self.waits: Counter[str] = Counter()
        self.uploads: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        before = {t.device.type for t in tree_leaves((args, kwargs or {})) if isinstance(t, Tensor)}
        name = func._schema.name.removeprefix("aten::")
        if NAME in before and name in _WAITS:
            self.waits[name] += 1
        out = func(*args, **(kwargs or {}))
        after = {t.device.type for t in tree_leaves(out) if isinstance(t, Tensor)}
        if before == {NAME} and "cpu" in after:
            self.waits[name] += 1
        if before == {"cpu"} and NAME in after:
            self.uploads[name] += 1
        return out


class _Fake(FakeTensorMode):
    """Fake tensors whose constants are never copied to the device for real."""

    avoid_device_init = True


@contextmanager
def fake_device() -> Iterator[_Watch]:
    """Within it tensors are fake, on the host and on the device alike; what makes the host wait is counted."""
    register()
    with _Fake(allow_non_fake_inputs=True), _Watch() as watch:
        yield watch


def moved(module: nn.Module) -> nn.Module:
    """Put a real module's parameters and buffers on the device, as ``module.to`` would; call it within
    :func:`fake_device`."""
    for part in module.modules():
        for name, parameter in part._parameters.items():
            if parameter is not None:
                part._parameters[name] = nn.Parameter(_on_device(parameter.detach()), parameter.requires_grad)
        for name, buffer in part._buffers.items():
            if buffer is not None:
                part._buffers[name] = _on_device(buffer)
    return module


def _on_device(value: Tensor) -> Tensor:
    return torch.empty(value.shape, dtype=value.dtype, device=NAME)
