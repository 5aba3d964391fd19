"""The adapted layer: GPT-2's transposed linear, folds kept for inference, and the paper's own forward."""

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from mtl_lora import MTLLoRAConfig
from mtl_lora.layer import MTLLoRALinear
from mtl_lora.routing import Router
from tests.benchmarks import rivals
from tests.mtl_lora.conftest import make_model


def _adapted(base, seed=0, tasks=3):
    config = MTLLoRAConfig([f"t{i}" for i in range(tasks)], r=2, lora_dropout=0.0, temperature=0.7)
    layer, generator = MTLLoRALinear(base.double(), config, Router()), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in layer.adapter_parameters().values():
            parameter.add_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return layer


@pytest.mark.parametrize("ids", [torch.tensor(1), torch.tensor([2, 0]), torch.tensor([[0, 1, 1], [2, 2, 0]])])
def test_conv1d_is_the_linear_layer_of_its_transposed_weight(ids):
    torch.manual_seed(0)
    transposed, plain = Conv1D(5, 4), nn.Linear(4, 5)
    nn.init.normal_(transposed.bias)
    plain.weight.data, plain.bias.data = transposed.weight.data.t().clone(), transposed.bias.data.clone()
    outputs, gradients = [], []
    x = torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True)
    for layer in (_adapted(transposed), _adapted(plain)):
        layer.lora_A.data, layer.lora_mixing.data = torch.ones_like(layer.lora_A), torch.zeros_like(layer.lora_mixing)
        layer.router.ids = ids
        y = layer(x)
        grads = torch.autograd.grad((y * y.detach().cos()).sum(), [x, layer.bias, layer.weight, layer.lora_B])
        grads = [g.t() if layer.fan_in_fan_out and i == 2 else g for i, g in enumerate(grads)]
        outputs.append(y)
        gradients.append(grads)
        delta = layer.delta_weight(1)
        assert delta.shape == layer.weight.shape
    torch.testing.assert_close(*outputs, rtol=1e-12, atol=1e-12)
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("tasks", [3, 20])
@pytest.mark.parametrize("shape", [(4, 1, 6), (4, 6), (4, 5, 6)])
@pytest.mark.parametrize("layout", ["one", "row", "token"])
def test_folds_kept_for_inference_change_no_output(tasks, shape, layout):
    model = make_model(tasks=tuple(f"t{i}" for i in range(tasks)))
    for route in (torch.tensor([0, 2, 1, 2]), torch.tensor([1, 1, 0, 2])):
        x = torch.randn(shape, dtype=torch.float64)
        per_token = route.unsqueeze(1).expand(4, x[0].numel() // 6)
        ids = {"one": route[0], "row": route, "token": per_token}[layout]
        expected = model(x, task_ids=ids)
        with torch.no_grad(), model.fixed_weights():
            for _ in range(2):
                torch.testing.assert_close(model(x, task_ids=ids), expected, rtol=1e-10, atol=1e-10)


@torch.no_grad()
def test_kept_folds_follow_new_ids_and_end_with_their_promise(model):
    x, ids = torch.randn(2, 1, 6, dtype=torch.float64), torch.tensor([0, 1])
    with model.fixed_weights():
        with model.fixed_weights():
            first = model(x, task_ids=ids)
        ids.copy_(torch.tensor([2, 2]))
        torch.testing.assert_close(model(x, task_ids=ids), model(x, task_ids=2), rtol=1e-10, atol=1e-10)
        assert len(model.router.kept_folds) == len(model.adapted_layers())
    assert model.router.kept_folds is None
    for layer in model.adapted_layers().values():
        layer.lora_B.data.mul_(-1)
    with model.fixed_weights():
        assert not torch.allclose(model(x, task_ids=[0, 1]), first)


@torch.no_grad()
def test_a_new_task_leaves_the_bits_of_decoding_alone():
    model = make_model(dtype=torch.float32)
    x, ids = torch.randn(5, 1, 6), torch.tensor([0, 1, 2, 2, 0])
    with model.fixed_weights():
        before = model(x, task_ids=ids)
    model.add_task("d")
    with model.fixed_weights():
        assert torch.equal(model(x, task_ids=ids), before)


def test_the_transcription_of_the_papers_forward_computes_the_same():
    torch.manual_seed(0)
    ours = rivals.layers(12, 0.0, torch.tensor([3, 0, 7, 3]))["mtl_lora"].double()
    theirs = rivals.PaperLinear(nn.Linear(12, 12, bias=False).double(), ours.router, 0.0).double()
    theirs.weight = ours.weight
    names = {"lora_A": "lora_A", "lora_B": "lora_B", "lora_lambdas": "lora_transform", "lora_B_w": "lora_mixing"}
    with torch.no_grad():
        ours.lora_transform.add_(torch.randn_like(ours.lora_transform) * 0.3)
        for name, own in names.items():
            getattr(theirs, name).copy_(getattr(ours, own))
    x = torch.randn(4, 3, 12, dtype=torch.float64)
    y, expected = ours(x), theirs(x)
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-6)  # the authors' softmax computes in fp32
    grads = torch.autograd.grad(y.sin().sum(), [getattr(ours, own) for own in names.values()])
    others = torch.autograd.grad(expected.sin().sum(), [getattr(theirs, name) for name in names])
    for name, mine, other in zip(names, grads, others, strict=True):
        torch.testing.assert_close(mine, other.view_as(mine), rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")
