"""Does an exported LoRA folder reproduce the model it came from? Asked of the files as written, not of memory."""

import copy
import json
import math
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from mtl_lora.core import AdapterCore
from mtl_lora.errors import ExportMismatchError, MTLLoRAError
from mtl_lora.files import WeightsElsewhere
from mtl_lora.targets import replace_module, replace_parameters

__all__ = ["OUTPUT_TOLERANCE", "load_plain", "plain_base", "verify_export"]

OUTPUT_TOLERANCE = {torch.float64: 1e-5, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}
"""Difference of outputs allowed, as a share of the outputs, by their type.

Down to fp32 the largest difference counts, against the largest output; the exported factors are fp32, so a wider base
is compared to fp32's digits. On a half-precision base the two sides round at other places (PEFT computes the low-rank
path in fp32, this library in the base's type) layer after layer, which leaves single outputs several units apart: there
the root mean square counts. The weight changes themselves are always compared to fp32's digits, layer by layer.
"""


def plain_base(model: AdapterCore) -> nn.Module:
    """Return the base with ordinary layers, as new modules that share this model's frozen weights without a copy.

    Parameters that trained besides the adapter are blank (zero), so that they must come from the exported files.
    """
    shared: dict[int, Any] = {id(p): p for p in model.base_model.parameters()}
    shared |= {id(b): b for b in model.base_model.buffers()}
    shared[id(model.router)] = model.router
    shared |= {id(p): p for layer in model.plain_layers().values() for p in layer.parameters()}
    twin = copy.deepcopy(model.base_model, shared)
    vars(twin).pop("peft_config", None)
    for path, layer in model.plain_layers().items():
        replace_module(twin, path, copy.deepcopy(layer, shared))
    for name in model.extra_parameter_names:
        name = name.replace(".base_layer.", ".")
        path, _, last = name.rpartition(".")
        setattr(twin.get_submodule(path), last, nn.Parameter(torch.zeros_like(twin.get_parameter(name))))
    return twin.eval()


def _first_output(output: Any) -> Tensor:
    """Return the logits, else the last hidden state, else the first tensor of a model's output."""
    for name in ("logits", "last_hidden_state"):
        value = getattr(output, name, None)
        if isinstance(value, Tensor):
            return value
    if isinstance(output, Tensor):
        return output
    values = output.values() if isinstance(output, dict) else output
    for value in values:
        if isinstance(value, Tensor):
            return value
    raise MTLLoRAError(f"a model's output must hold a tensor to compare, got {type(output).__name__}")


def _token_inputs(base: nn.Module) -> dict[str, Tensor] | None:
    """Return token ids (2, 16) for a Hugging Face language model, or None for anything else."""
    config = getattr(base, "config", None)
    size = getattr(config, "vocab_size", None)
    if not isinstance(size, int) or getattr(base, "main_input_name", None) != "input_ids":
        return None
    device = next(base.parameters()).device
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(size, (2, 16), generator=generator).to(device)
    return {"input_ids": ids, **({"decoder_input_ids": ids} if getattr(config, "is_encoder_decoder", False) else {})}


def load_plain(twin: nn.Module, folder: Path) -> tuple[nn.Module, str]:
    """Return the twin with the written adapter: through PEFT where it is installed, else by adding B A."""
    model_config = json.loads((folder / "adapter_config.json").read_text())
    try:
        import peft
    except ImportError:
        if model_config["use_dora"]:
            raise MTLLoRAError("an exported DoRA can be verified only with PEFT, got no such package") from None
        return _add_by_hand(twin, folder), "by adding B A to the weights"
    with _on_a_device(twin):
        found = peft.PeftModel.from_pretrained(twin, str(folder), autocast_adapter_dtype=True).eval()
    return found, "through PEFT"


@contextmanager
def _on_a_device(model: nn.Module) -> Iterator[None]:
    """Within it parameters of the meta device seem to be on the CPU, one value for all: PEFT puts an adapter where the
    base is. The value is no number, so that nothing can be computed with it unnoticed."""
    kept = {p: nn.Parameter(torch.full((), math.nan, dtype=p.dtype).expand(p.shape), False) for p in _meta(model)}
    replace_parameters(model, kept)
    try:
        yield
    finally:
        replace_parameters(model, {stand_in: p for p, stand_in in kept.items()})


def _meta(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.is_meta]


def _add_by_hand(twin: nn.Module, folder: Path) -> nn.Module:
    tensors = load_file(folder / "adapter_model.safetensors")
    is_transposed = json.loads((folder / "adapter_config.json").read_text())["fan_in_fan_out"]
    for name, tensor in tensors.items():
        path, _, last = name.removeprefix("base_model.model.").replace(".base_layer.", ".").rpartition(".")
        if path.endswith(".lora_A"):
            up, layer = tensors[name.replace("lora_A", "lora_B")], twin.get_submodule(path.removesuffix(".lora_A"))
            delta = (up @ tensor).t() if is_transposed else up @ tensor
            weight: Tensor = layer.weight  # type: ignore[assignment]
            changed = (weight.detach().float() + delta.to(weight.device)).to(weight.dtype)
            layer.weight = nn.Parameter(changed, requires_grad=False)
        elif not path.endswith(".lora_B"):
            twin.get_submodule(path).load_state_dict({last: tensor}, strict=False)
    return twin


def _check_layers(model: AdapterCore, task: int, folder: Path) -> None:
    tensors = load_file(folder / "adapter_model.safetensors")
    for path, layer in model.adapted_layers().items():
        down, up = (tensors[f"base_model.model.{path}.{name}.weight"].double() for name in ("lora_A", "lora_B"))
        expected = layer.delta_weight(task).to("cpu", torch.float64)
        expected = expected.t() if layer.fan_in_fan_out else expected
        _compare(up @ down, expected, OUTPUT_TOLERANCE[torch.float32], f"the weight change of {path}")


def _compare(got: Tensor, expected: Tensor, tolerance: float, what: str) -> float:
    """Return the difference as a share of the expected values; see :data:`OUTPUT_TOLERANCE`.

    Raises:
        ExportMismatchError: it is above the tolerance, or not a number.
    """
    is_half = expected.dtype in (torch.float16, torch.bfloat16)
    got, expected = got.detach().double(), expected.detach().double()
    difference = got - expected
    if is_half:
        share = float(difference.norm() / expected.norm().clamp_min(1e-30))
    else:
        share = float(difference.abs().max() / expected.abs().max().clamp_min(1e-30))
    if not share <= tolerance:
        raise ExportMismatchError(
            f"an export must reproduce {what} within a share of {tolerance:g}, got a difference of {share:g}; "
            "nothing was written: check the adapter for values that are not finite, and the base for other adapters"
        )
    return share


@torch.no_grad()
def verify_export(
    model: AdapterCore,
    task: int,
    folder: Path,
    example_inputs: Any = None,
    elsewhere: WeightsElsewhere | None = None,
) -> str:
    """Compare the files in a folder with the model, layer by layer and then by outputs; return what was compared.

    Args:
        model: the source, not merged.
        task: its id.
        folder: with ``adapter_model.safetensors`` and ``adapter_config.json``.
        example_inputs: see :func:`mtl_lora.export.export_task`.
        elsewhere: where the base's weights lie, where it has no memory for them.

    Raises:
        ExportMismatchError: they differ.
        MTLLoRAError: another task is merged.
    """
    if model.merged_task is not None:
        raise MTLLoRAError("a merged model cannot be exported; unmerge() first")
    _check_layers(model, task, folder)
    inputs = _token_inputs(model.base_model) if example_inputs is None else example_inputs
    if inputs is None:
        return "every layer's weight change, computed again from the files."
    keyword, positional = (inputs, ()) if isinstance(inputs, dict) else ({}, tuple(inputs))
    was_training = {module: module.training for module in model.modules()}
    running = nullcontext if elsewhere is None else elsewhere.reading
    try:
        model.eval()
        with running(model):
            expected = _first_output(model(*positional, task_ids=task, **keyword))
        exported, way = load_plain(plain_base(model), folder)
        with running(exported):
            got = _first_output(exported(*positional, **keyword))
    finally:
        for module, training in was_training.items():
            module.training = training
    tolerance = OUTPUT_TOLERANCE.get(expected.dtype, OUTPUT_TOLERANCE[torch.float32])
    share = _compare(got, expected, tolerance, "the model's outputs")
    return f"outputs {way} differ by a share of {share:.1e} (allowed {tolerance:g})."
