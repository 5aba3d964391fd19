"""An adapter on a layer of 4 or 8 bit is the same adapter on the matrix that the layer's codes stand for."""

from __future__ import annotations

from typing import Any

import bitsandbytes as bnb
import pytest
import torch
from torch import nn

from mtl_lora import METHODS, MTLLoRAConfig
from mtl_lora.errors import MTLLoRAError

TASKS = ("a", "b", "c")
KINDS = ("4bit", "8bit")
OWN = [method for method in METHODS if method not in ("lora", "dora")]  # those are PEFT's, which has layers for each
SIZES = (64, 128)


def _quantized(kind: str) -> tuple[nn.Module, nn.Linear]:
    """Return a layer of codes, and a plain one with the matrix that they stand for."""
    torch.manual_seed(0)
    plain = nn.Linear(*SIZES)
    if kind == "4bit":
        layer: Any = bnb.nn.Linear4bit(*SIZES, compute_dtype=torch.float32, quant_type="nf4")
        layer.support_avx512bf16_for_cpu = False
    else:
        layer = bnb.nn.Linear8bitLt(*SIZES, has_fp16_weights=False)
    layer.load_state_dict(plain.state_dict())
    layer = layer.to("cpu")
    if kind == "4bit":
        matrix = bnb.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
    else:
        matrix = layer.weight.CB * layer.weight.SCB[:, None] / 127
    plain.weight.data.copy_(matrix)
    return layer, plain


def _adapted(method: str, layer: nn.Module) -> Any:
    base = nn.Sequential(nn.Identity(), layer)
    config = MTLLoRAConfig(TASKS, r=4, lora_dropout=0.0, num_up_projections=2, target_modules=["1"])
    torch.manual_seed(1)
    model = METHODS[method](base, config)
    with torch.no_grad():
        for parameter in model.adapted_layers()["1"].adapter_parameters().values():
            parameter += 0.1 * torch.randn_like(parameter)
    return model


@pytest.mark.parametrize("ids", [1, torch.tensor([2, 0]), torch.tensor([[0, 1, 2], [2, 1, 0]])], ids=str)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", OWN)
def test_outputs_and_gradients_are_those_on_the_matrix(method: str, kind: str, ids: Any) -> None:
    layer, plain = _quantized(kind)
    found = []
    for base in (layer, plain):
        model = _adapted(method, base)
        with torch.no_grad():
            model(torch.randn(1, 1, SIZES[0]), task_ids=0)  # what runs without gradients must not lose them after
        x = torch.randn(2, 3, SIZES[0], generator=torch.Generator().manual_seed(2)).requires_grad_()
        y = model(x, task_ids=ids)
        y.pow(2).sum().backward()
        grads = {name: p.grad for name, p in model.adapted_layers()["1"].adapter_parameters().items()}
        found.append({"y": y.detach(), "x": x.grad, **grads})
        with torch.no_grad():
            found[-1]["without gradients"] = model(x, task_ids=ids)
            with model.fixed_weights():
                found[-1]["folded"] = model(x, task_ids=ids)
    assert set(found[0]) == set(found[1])
    for name, value in found[1].items():
        torch.testing.assert_close(found[0][name], value, rtol=2e-3, atol=2e-3, msg=lambda text, name=name: name + text)


@pytest.mark.parametrize("kind", KINDS)
def test_codes_are_frozen_counted_as_values_and_never_merged_into(kind: str) -> None:
    layer, plain = _quantized(kind)
    model, reference = _adapted("mtl_lora", layer), _adapted("mtl_lora", plain)
    assert not model.adapted_layers()["1"].weight.requires_grad
    assert model.count_parameters() == reference.count_parameters()
    with pytest.raises(MTLLoRAError, match="load the same base without quantization"):
        model.merge("a")
    assert model.plain_layers()["1"] is layer


def test_a_fingerprint_names_the_codes_and_their_shapes_but_not_their_values() -> None:
    found = {kind: _adapted("mtl_lora", _quantized(kind)[0]).base_fingerprint() for kind in KINDS}
    plain = _adapted("mtl_lora", _quantized("4bit")[1])
    assert [found[kind]["quantization"] for kind in KINDS] == list(KINDS)
    assert "quantization" not in plain.base_fingerprint()
    assert len({f["shapes_sha256"] for f in (*found.values(), plain.base_fingerprint())}) == 1
    for kind in KINDS:
        weight = plain.adapted_layers()["1"].weight
        assert plain.base_fingerprint(quantization=lambda p, k=kind, w=weight: k if p is w else None) == found[kind]
