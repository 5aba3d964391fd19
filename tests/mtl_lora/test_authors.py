"""Ten optimizer steps from the authors' initial values end where theirs do, for every method that they compare."""

import copy
from functools import partial

import pytest
import torch
from torch import nn

from mtl_lora import build_adapter, parameter_groups
from tests.reference.authors_layers import (
    AuthorsDoRA,
    AuthorsLoRA,
    AuthorsMoELoRA,
    AuthorsMTLLoRA,
    AuthorsMultiLoRA,
)

TASKS, R, ALPHA, STEPS = 3, 4, 8.0, 10
MTL = {"tasks": TASKS, "ups": 3, "temperature": 0.1}


def _mtl(theirs):
    return {"lora_A": theirs.A[0], "lora_B": theirs.B, "lora_transform": theirs.transform, "lora_mixing": theirs.mixing}


def _moelora(theirs):
    return {
        "lora_A": torch.cat(list(theirs.A)),
        "lora_B": torch.cat(list(theirs.B), dim=1),
        "lora_gate": theirs.gate.weight,
        "lora_task_embedding": theirs.embedding.weight[:TASKS],  # theirs has a row more, which no task reads
    }


def _multilora(theirs):
    return {"lora_A": theirs.A, "lora_B": theirs.B, "lora_scaling": theirs.scales}


def _lora(theirs):
    magnitude = {"lora_magnitude_vector.default.weight": theirs.magnitude} if isinstance(theirs, AuthorsDoRA) else {}
    return {"lora_A.default.weight": theirs.A, "lora_B.default.weight": theirs.B, **magnitude}


CASES = {
    "mtl_lora": ("mtl_lora", partial(AuthorsMTLLoRA, **MTL, diagonal=False), _mtl, {}),
    "mtl_lora diagonal": ("mtl_lora", partial(AuthorsMTLLoRA, **MTL, diagonal=True), _mtl, {"transform": "diagonal"}),
    "mtl_lora image-text": (
        *("mtl_lora", partial(AuthorsMTLLoRA, tasks=TASKS, ups=2, temperature=0.8, diagonal=False), _mtl),
        {"num_up_projections": 2, "temperature": 0.8},
    ),
    "moelora": ("moelora", partial(AuthorsMoELoRA, tasks=TASKS, experts=2), _moelora, {"num_up_projections": 2}),
    "multilora": ("multilora", partial(AuthorsMultiLoRA, parts=3), _multilora, {}),
    "lora": ("lora", AuthorsLoRA, _lora, {}),
    "dora": ("dora", AuthorsDoRA, _lora, {}),
}


class Authors(nn.Module):
    """Two of their layers with a tanh between."""

    def __init__(self, base, make):
        super().__init__()
        self.first, self.second = (make(base[i], R, ALPHA) for i in (0, 2))

    def forward(self, x, task_ids):
        return self.second(torch.tanh(self.first(x, task_ids)), task_ids)


def _pair(case):
    """Return their model and ours with its values, and the tensors of both that must stay equal."""
    method, make, names, options = CASES[case]
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 5))
    theirs = Authors(base, make).double()
    for layer in (theirs.first, theirs.second):
        layer.weight, layer.bias = layer.weight.double(), layer.bias.double()
    options = {"r": R, "lora_alpha": ALPHA, "lora_dropout": 0.0, "target_modules": ["0", "2"], **options}
    ours = build_adapter(method, copy.deepcopy(base).double(), ["a", "b", "c"], **options)
    start = {name: value.clone() for name, value in ours.state_dict().items()}
    with torch.no_grad():
        for path, layer in (("0", theirs.first), ("2", theirs.second)):
            for name, value in names(layer).items():
                ours.base_model.get_parameter(f"{path}.{name}").copy_(value)
    return theirs, ours, names, start


def _compare(theirs, ours, names):
    for path, layer in (("0", theirs.first), ("2", theirs.second)):
        for name, value in names(layer).items():
            found = ours.base_model.get_parameter(f"{path}.{name}")
            torch.testing.assert_close(found.detach(), value.detach(), rtol=0, atol=1e-6, msg=f"{path}.{name}")


@pytest.mark.parametrize("case", sorted(CASES))
def test_ten_steps_from_the_authors_start_end_where_theirs_do(case):
    theirs, ours, names, _ = _pair(case)
    assert sum(p.numel() for p in theirs.parameters()) - ours.count_parameters()[0] == (128 if case == "moelora" else 0)
    before = [p.detach().clone() for p in theirs.parameters()]
    one = torch.optim.AdamW(theirs.parameters(), lr=1e-2, weight_decay=0.0)
    other = torch.optim.AdamW(parameter_groups(ours, weight_decay=0.0), lr=1e-2)
    generator = torch.Generator().manual_seed(1)
    for _ in range(STEPS):
        x = torch.randn(4, 3, 6, generator=generator, dtype=torch.float64)
        target = torch.randn(4, 3, 5, generator=generator, dtype=torch.float64)
        ids = torch.randint(TASKS, (4,), generator=generator)
        outputs = []
        for model, optimizer in ((theirs, one), (ours, other)):
            optimizer.zero_grad()
            y = model(x, task_ids=ids)
            (y - target).square().mean().backward()
            optimizer.step()
            outputs.append(y.detach())
        torch.testing.assert_close(outputs[1], outputs[0], rtol=0, atol=1e-6)
        _compare(theirs, ours, names)
    moved = [float((p.detach() - old).abs().max()) for p, old in zip(theirs.parameters(), before, strict=True)]
    assert min(moved) > 1e-3  # every tensor took part


@pytest.mark.parametrize("case", sorted(CASES))
def test_a_fresh_adapter_starts_as_the_authors_do(case):
    theirs, _, names, start = _pair(case)
    for path, layer in (("0", theirs.first), ("2", theirs.second)):
        for name, value in names(layer).items():
            fresh = start[f"base_model.{path}.{name}"]
            value = value.detach()
            if value.unique().numel() <= 2 or "magnitude" in name:  # zeros, ones, the identity, lengths of rows
                torch.testing.assert_close(fresh, value, rtol=0, atol=1e-6)
            elif name in ("lora_A", "lora_task_embedding") and case == "moelora":
                assert fresh.std() / value.std() == pytest.approx(1, abs=0.5)  # normal: 0.01 and 1
            else:  # uniform within ± 1/√(last axis)
                bound = value.shape[-1] ** -0.5
                assert fresh.abs().max() <= bound and value.abs().max() <= bound
                assert fresh.abs().max() > 0.5 * bound
