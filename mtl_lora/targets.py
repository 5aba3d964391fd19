"""Which modules of a model are adapted, and how one is replaced by another."""

import difflib
import re
import warnings
from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from mtl_lora.config import MTLLoRAConfig
from mtl_lora.errors import FrozenExpertsWarning, TargetError
from mtl_lora.layer import AdaptedLinear, is_conv1d, is_quantized, plain_linear
from mtl_lora.patterns import is_named, layer_number, matching_key

__all__ = [
    "expert_parameters",
    "find_named",
    "find_targets",
    "is_adaptable",
    "output_head",
    "replace_module",
    "replace_parameters",
    "train_extras",
    "warn_of_frozen_experts",
]


def is_adaptable(module: nn.Module) -> bool:
    """Whether a module maps x to x Wᵀ + b and nothing else.

    So do ``nn.Linear``, GPT-2's ``Conv1D``, and those subclasses of ``nn.Linear`` whose own forward a probe shows to
    (Falcon's), and quantised layers, which are asked through their own; not routers that return pairs. The output
    projection inside ``nn.MultiheadAttention`` is none either: its weight is read, its forward is never called.
    """
    if is_conv1d(module):
        return True
    if not isinstance(module, nn.Linear) or isinstance(module, NonDynamicallyQuantizableLinear):
        return False
    if is_quantized(module):
        return True
    return type(module).forward is nn.Linear.forward or _is_linear_map(type(module))


def _is_linear_map(kind: type[nn.Linear]) -> bool:
    """Whether a subclass's forward is x Wᵀ + b, asked of small layers that hold a weight and a bias and nothing else.

    They are what unloading puts back, so a subclass that needs more than these is told here, too.
    """
    generator = torch.Generator().manual_seed(0)  # the global one is left as it is

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64, device="cpu")

    x, weight = random(2, 4, 3), nn.Parameter(random(5, 3), requires_grad=False)
    for bias in (None, nn.Parameter(random(5), requires_grad=False)):
        try:
            y = plain_linear(kind, weight, bias, 3, 5)(x)
        except Exception:  # noqa: BLE001 - foreign code: whatever it raises, it is no plain linear map
            return False
        expected = F.linear(x, weight, bias)
        if not (isinstance(y, Tensor) and y.shape == expected.shape and torch.allclose(y.double(), expected)):
            return False
    return True


def output_head(model: nn.Module) -> nn.Module | None:
    """Return the layer that makes a Hugging Face model's logits, or None: of tokens, or of a sequence's classes."""
    getter = getattr(model, "get_output_embeddings", None)
    head = getter() if callable(getter) else None
    if head is None and type(model).__name__.endswith("ForSequenceClassification"):
        head = getattr(model, "score", None) or getattr(model, "classifier", None)
    return head if isinstance(head, nn.Module) else None


def expert_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return by path what holds a mixture's experts stacked, (experts, O, I), instead of in linear layers.

    Told by three axes of more than one outside of convolutions, or by a module that calls itself experts.
    """
    found = {}
    for path, module in model.named_modules():
        if isinstance(module, (AdaptedLinear, nn.Linear, _ConvNd)):
            continue
        is_named = "expert" in type(module).__name__.lower()
        for name, parameter in module.named_parameters(prefix=path, recurse=False):
            shape = getattr(parameter, "ds_shape", parameter.shape)  # ZeRO-3 leaves the parameter itself empty
            if (len(shape) == 3 and min(shape) > 1) or (is_named and len(shape) > 1):
                found[name] = parameter
    return found


def warn_of_frozen_experts(model: nn.Module) -> None:
    """Warn with number and names where experts stay frozen because an adapter does not reach them."""
    frozen = {name: p for name, p in expert_parameters(model).items() if not p.requires_grad}
    if not frozen:
        return
    sizes = {id(p): int(getattr(p, "ds_numel", p.numel())) for p in model.parameters()}
    count, total = sum(sizes[id(p)] for p in frozen.values()), sum(sizes.values())
    names = list(frozen)
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    warnings.warn(
        f"{len(names)} parameters of experts with {count:,} values ({count / total:.0%} of the model) stay frozen, "
        f"since they are stacked and no linear layers that an adapter could reach: {', '.join(names[:3])}{more}",
        FrozenExpertsWarning,
        stacklevel=2,
    )


def _near(names: Sequence[str], model: nn.Module) -> list[str]:
    paths = [path for path, module in model.named_modules() if path and is_adaptable(module)]
    known = sorted({path.rsplit(".", 1)[-1] for path in paths} | set(paths))
    near = [match for name in names for match in difflib.get_close_matches(name, known, n=3, cutoff=0.4)]
    return list(dict.fromkeys(near)) or known[:8]


def find_targets(model: nn.Module, config: MTLLoRAConfig) -> list[str]:
    """Return the full paths of the linear layers to adapt, in the model's order.

    Args:
        model: the base.
        config: of whose fields ``target_modules``, ``layers_to_transform``, ``layers_pattern`` and the keys of the
            patterns of ranks and alphas are read.

    Raises:
        TargetError: a name, the expression, the layers or a pattern's key match nothing, or a target is something that
            is no plain linear layer, or an output head whose weight is the input embedding's too.
    """
    found = _in_layers(model, config, _find(model, config.target_modules))
    for field in ("rank_pattern", "alpha_pattern"):
        keys = getattr(config, field)
        unused = [key for key in keys if not any(matching_key((key,), path) for path in found)]
        if unused:
            raise TargetError(
                f"every key of {field} must match an adapted layer, got no match for {unused}; adapted are "
                f"{found[:3]}{' …' if len(found) > 3 else ''}"
            )
    return found


def _in_layers(model: nn.Module, config: MTLLoRAConfig, paths: list[str]) -> list[str]:
    wanted = config.layers_to_transform
    if isinstance(wanted, int) or not wanted:
        return paths
    numbers = {path: layer_number(path, tuple(config.layers_pattern)) for path in paths}
    missing = sorted(set(wanted) - set(numbers.values()))
    if missing:
        there = sorted({number for number in numbers.values() if number is not None})
        raise TargetError(
            f"every number of layers_to_transform must be that of a layer with targets, got {missing}; "
            f"{type(model).__name__} has {there or 'no numbered layers under layers_pattern'}"
        )
    return [path for path in paths if numbers[path] in wanted]


def _find(model: nn.Module, target_modules: str | Sequence[str]) -> list[str]:
    modules = {path: module for path, module in model.named_modules() if path}
    if isinstance(target_modules, str) and target_modules.lower() in ("all-linear", "ffn"):
        head, is_ffn = output_head(model), target_modules.lower() == "ffn"
        found = [path for path, module in modules.items() if is_adaptable(module) and module is not head]
        found = [path for path in found if not is_ffn or _is_feed_forward(path)]
        if not found:
            raise TargetError(f"{target_modules!r} must find a linear layer, got none in {type(model).__name__}")
        return found
    if isinstance(target_modules, str):
        found = [path for path in modules if re.fullmatch(target_modules, path)]
        missing = [] if found else [target_modules]
    else:
        found = [path for path in modules if any(is_named(path, name) for name in target_modules)]
        missing = [name for name in target_modules if not any(is_named(path, name) for path in modules)]
    if missing:
        raise TargetError(
            f"every target module must match a module of {type(model).__name__}, got no match for {missing}"
            f"{_why_missing(model, target_modules, missing)}; near names: {_near(missing, model)}"
        )
    wrong = [f"{path} ({type(modules[path]).__name__})" for path in found if not is_adaptable(modules[path])]
    if wrong:
        raise TargetError(
            f"a target must be a plain linear layer, x Wᵀ + b that is called as such, got {wrong[:5]}; "
            "name the linear layers inside"
        )
    _refuse_tied_head(model, {path: modules[path] for path in found})
    return found


def _is_feed_forward(path: str) -> bool:
    """Whether a linear layer stands in a numbered block and outside of what calls itself attention there."""
    return layer_number(f".{path}") is not None and "attn" not in path.lower() and "attention" not in path.lower()


def _why_missing(model: nn.Module, target_modules: str | Sequence[str], missing: Sequence[str]) -> str:
    experts = [path for path in expert_parameters(model) if any(is_named(path, name) for name in missing)]
    if experts:
        return f" (parameters of experts, such as {experts[0]}, cannot be adapted)"
    if isinstance(target_modules, str):
        return f" as a regular expression on the full path; names stand in a list, [{target_modules!r}]"
    return ""


def _refuse_tied_head(model: nn.Module, targets: dict[str, nn.Module]) -> None:
    """Merging would untie it, and whoever loads the merged model by its configuration would tie it again."""
    head = output_head(model)
    for path, module in targets.items():
        if module is head:
            for other, owner in model.named_modules():
                if owner is not head and any(p is head.weight for p in owner.parameters(recurse=False)):
                    raise TargetError(
                        f"an adapted output head must own its weight, got {path!r}, tied to {other!r}; "
                        "leave it out of target_modules, or untie the base first"
                    )


def find_named(model: nn.Module, names: Sequence[str]) -> list[str]:
    """Return the paths of the modules with these names, of any kind.

    Raises:
        TargetError: a name matches nothing.
    """
    paths = [path for path, _ in model.named_modules() if path]
    missing = [name for name in names if not any(is_named(path, name) for path in paths)]
    if missing:
        known = sorted({path.rsplit(".", 1)[-1] for path in paths})
        near = [match for name in missing for match in difflib.get_close_matches(name, known, n=3, cutoff=0.4)]
        raise TargetError(
            f"every name in modules_to_save must match a module of {type(model).__name__}, got no match for {missing}; "
            f"near names: {near or known[:8]}"
        )
    return [path for path in paths if any(is_named(path, name) for name in names)]


def find_within(model: nn.Module, paths: Sequence[str]) -> Sequence[str]:
    """Return paths of modules that are there.

    Raises:
        TargetError: a path leads to no module.
    """
    known = {path for path, _ in model.named_modules() if path}
    if missing := [path for path in paths if path not in known]:
        raise TargetError(
            f"every path in extras_within must be that of a module of {type(model).__name__}, got {missing}; "
            f"modules are {sorted(path for path in known if '.' not in path)} and those inside"
        )
    return paths


def replace_module(model: nn.Module, path: str, module: nn.Module) -> None:
    """Put a module at a path of the model."""
    parent_path, _, name = path.rpartition(".")
    parent = model.get_submodule(parent_path)
    setattr(parent, name, module)


def replace_parameters(model: nn.Module, new: Mapping[nn.Parameter, nn.Parameter]) -> None:
    """Put parameters in the places of others, in every module that has these: tied ones stay tied."""
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None and parameter in new:
                module._parameters[name] = new[parameter]


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
    within = [base.get_submodule(path) for path in find_within(base, config.extras_within)]
    reached = [module for part in within or [base] for module in part.modules()]
    takers = {"all": reached, "lora_only": adapted, "none": ()}[config.bias]
    for module in takers:
        bias = getattr(module, "bias", None)
        if isinstance(bias, nn.Parameter):
            bias.requires_grad_(True)
    if config.train_layer_norms:
        for module in reached:
            if "norm" in type(module).__name__.lower():
                module.requires_grad_(True)
