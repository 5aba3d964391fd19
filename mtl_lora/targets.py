"""Which modules of a model are adapted, and how one is replaced by another."""

import difflib
import re
from collections.abc import Sequence

from torch import nn

from mtl_lora.config import MTLLoRAConfig
from mtl_lora.errors import TargetError
from mtl_lora.layer import is_conv1d

__all__ = ["find_named", "find_targets", "is_adaptable", "replace_module", "train_extras"]


def is_adaptable(module: nn.Module) -> bool:
    """Whether a module is a plain linear layer; subclasses with a forward of their own (quantised) are not."""
    return (isinstance(module, nn.Linear) and type(module).forward is nn.Linear.forward) or is_conv1d(module)


def _output_head(model: nn.Module) -> nn.Module | None:
    getter = getattr(model, "get_output_embeddings", None)
    head = getter() if callable(getter) else None
    return head if isinstance(head, nn.Module) else None


def _is_named(path: str, name: str) -> bool:
    return path == name or path.endswith(f".{name}")


def _near(names: Sequence[str], model: nn.Module) -> list[str]:
    paths = [path for path, module in model.named_modules() if path and is_adaptable(module)]
    known = sorted({path.rsplit(".", 1)[-1] for path in paths} | set(paths))
    near = [match for name in names for match in difflib.get_close_matches(name, known, n=3, cutoff=0.4)]
    return list(dict.fromkeys(near)) or known[:8]


def find_targets(model: nn.Module, target_modules: str | Sequence[str]) -> list[str]:
    """Return the full paths of the linear layers to adapt, in the model's order.

    Args:
        model: the base.
        target_modules: names (the last parts of a path), one regular expression on the full path, or
            ``"all-linear"`` for every linear layer but the output head.

    Raises:
        TargetError: a name or the expression matches nothing, or something that is no plain linear layer.
    """
    modules = {path: module for path, module in model.named_modules() if path}
    if target_modules == "all-linear":
        head = _output_head(model)
        found = [path for path, module in modules.items() if is_adaptable(module) and module is not head]
        if not found:
            raise TargetError(f"'all-linear' must find a linear layer, got none in {type(model).__name__}")
        return found
    if isinstance(target_modules, str):
        found = [path for path in modules if re.fullmatch(target_modules, path)]
        missing = [] if found else [target_modules]
    else:
        found = [path for path in modules if any(_is_named(path, name) for name in target_modules)]
        missing = [name for name in target_modules if not any(_is_named(path, name) for path in modules)]
    if missing:
        raise TargetError(
            f"every target module must match a module of {type(model).__name__}, got no match for {missing}; "
            f"near names: {_near(missing, model)}"
        )
    wrong = [f"{path} ({type(modules[path]).__name__})" for path in found if not is_adaptable(modules[path])]
    if wrong:
        raise TargetError(
            f"a target must be a plain nn.Linear or Conv1D, got {wrong[:5]}; name the linear layers inside"
        )
    return found


def find_named(model: nn.Module, names: Sequence[str]) -> list[str]:
    """Return the paths of the modules with these names, of any kind.

    Raises:
        TargetError: a name matches nothing.
    """
    paths = [path for path, _ in model.named_modules() if path]
    missing = [name for name in names if not any(_is_named(path, name) for path in paths)]
    if missing:
        known = sorted({path.rsplit(".", 1)[-1] for path in paths})
        near = [match for name in missing for match in difflib.get_close_matches(name, known, n=3, cutoff=0.4)]
        raise TargetError(
            f"every name in modules_to_save must match a module of {type(model).__name__}, got no match for {missing}; "
            f"near names: {near or known[:8]}"
        )
    return [path for path in paths if any(_is_named(path, name) for name in names)]


def replace_module(model: nn.Module, path: str, module: nn.Module) -> None:
    """Put a module at a path of the model."""
    parent_path, _, name = path.rpartition(".")
    parent = model.get_submodule(parent_path)
    setattr(parent, name, module)


def train_extras(
    base: nn.Module, config: MTLLoRAConfig, saved_paths: Sequence[str], adapted: Sequence[nn.Module]
) -> None:
    """Let modules to save, biases and normalisation layers train, as the configuration says.

    Args:
        base: with its adapter in place and everything else frozen.
        config: says which.
        saved_paths: the modules to save.
        adapted: the modules that hold the adapted layers' biases.
    """
    for path in saved_paths:
        base.get_submodule(path).requires_grad_(True)
    takers = {"all": base.modules(), "lora_only": adapted, "none": ()}[config.bias]
    for module in takers:
        bias = getattr(module, "bias", None)
        if isinstance(bias, nn.Parameter):
            bias.requires_grad_(True)
    if config.train_layer_norms:
        for module in base.modules():
            if "norm" in type(module).__name__.lower():
                module.requires_grad_(True)
