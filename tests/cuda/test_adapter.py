"""The adapter's kernel on the device against nested loops in float64 on the host."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from mtl_lora.kernel import adapted_linear
from tests.reference.mtl_lora_reference import mtl_lora_linear

pytestmark = pytest.mark.cuda

OPTIONS = {"temperature": 0.5, "scaling": 2.0}
FACTORS = ("down_RI", "up_NOR", "transform", "mixing_TN")
PRECISIONS = {"float32": (torch.float32, 2e-5), "bfloat16": (torch.bfloat16, 3e-2)}
"""Type of the tensors, and the largest error of values and gradients over the largest one, or over 1: gradients that
cancel out are small against what they are sums of."""
BATCH, SEQUENCE, SIZE_IN, SIZE_OUT, R, TASKS, UPS = 4, 6, 64, 48, 4, 3, 2


def _problem(full: bool, dtype: torch.dtype) -> tuple[list[Tensor], Tensor]:
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        # What is rounded to the type beforehand is the same on both sides: the error is the kernel's alone.
        return (torch.randn(*shape, generator=generator) / shape[-1] ** 0.5).to(dtype)

    transform = random(TASKS, R, R) if full else random(TASKS, R)
    tensors = [
        random(BATCH, SEQUENCE, SIZE_IN),
        random(SIZE_OUT, SIZE_IN),
        random(SIZE_OUT),
        random(R, SIZE_IN),
        random(UPS, SIZE_OUT, R),
        transform,
        random(TASKS, UPS),
    ]
    return tensors, torch.randint(TASKS, (BATCH, SEQUENCE), generator=generator)


def _laid_out(x: Tensor, ids: Tensor, layout: str) -> tuple[Tensor, Tensor, list[int]]:
    if layout == "one":
        return x.reshape(1, -1, SIZE_IN), ids[0, 0], [int(ids[0, 0])] * ids.numel()
    if layout == "row":
        return x, ids[:, 0].clone(), ids[:, :1].expand_as(ids).flatten().tolist()
    return x.reshape(-1, SIZE_IN), ids.reshape(-1, 1), ids.flatten().tolist()


@pytest.mark.parametrize("precision", list(PRECISIONS))
@pytest.mark.parametrize("layout", ["one", "row", "token"])
@pytest.mark.parametrize("full", [True, False])
def test_values_and_gradients_equal_nested_loops(where: torch.device, precision: str, layout: str, full: bool) -> None:
    dtype, allowed = PRECISIONS[precision]
    tensors, ids = _problem(full, dtype)
    x, route, flat_ids = _laid_out(tensors[0], ids, layout)
    exact = [t.double().requires_grad_() for t in (x, *tensors[1:])]
    expected = mtl_lora_linear(exact[0].reshape(-1, SIZE_IN), *exact[1:], flat_ids, *OPTIONS.values())
    weights = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    expected_grads = torch.autograd.grad((expected * weights).sum(), exact)

    asked: list[Any] = [t.to(where).requires_grad_() for t in (x, *tensors[1:])]
    y = adapted_linear(*asked[:3], **dict(zip(FACTORS, asked[3:], strict=True)), ids=route.to(where), **OPTIONS)
    y = y.reshape(-1, SIZE_OUT)
    assert y.device.type == where.type
    grads = torch.autograd.grad((y.float() * weights.float().to(where)).sum(), asked)
    for ours, theirs in zip((y, *grads), (expected, *expected_grads), strict=True):
        error, largest = (ours.detach().double().cpu() - theirs).abs().max(), theirs.abs().max()
        assert float(error / largest.clamp(min=1)) <= allowed


def test_compiled_it_is_the_same(where: torch.device) -> None:
    tensors, ids = _problem(True, torch.float32)
    asked: list[Any] = [t.to(where).requires_grad_() for t in tensors]
    route = ids[:, 0].to(where).contiguous()

    def function(*tensors: Tensor) -> Tensor:
        factors = dict(zip(FACTORS, tensors[3:], strict=True))
        return adapted_linear(*tensors[:3], **factors, ids=route, **OPTIONS)

    eager, compiled = function(*asked), torch.compile(function, dynamic=False)(*asked)
    torch.testing.assert_close(compiled, eager, rtol=1e-5, atol=1e-5)
    for one, other in zip(
        torch.autograd.grad(compiled.sum(), asked), torch.autograd.grad(eager.sum(), asked), strict=True
    ):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
