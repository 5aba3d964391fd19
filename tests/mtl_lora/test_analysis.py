"""The look inside, against direct computation."""

import math

import pytest
import torch

from mtl_lora import analysis
from mtl_lora.errors import MTLLoRAError
from tests.mtl_lora.conftest import make_model


@pytest.fixture
def layer(model):
    return model.base_model.blocks[0].first


def test_mixing_weights_are_a_softmax_a_task(model, layer):
    weights = analysis.mixing_weights(model)
    assert set(weights) == set(model.adapted_layers())
    expected = torch.softmax(layer.lora_mixing.detach() / 0.7, -1)
    torch.testing.assert_close(weights["blocks.0.first"], expected)


@pytest.mark.parametrize("transform", ["full", "diagonal"])
def test_transform_distance_is_zero_at_the_identity_and_one_at_zero(transform):
    model = make_model(transform=transform)
    layer = model.base_model.blocks[0].first
    with torch.no_grad():
        layer.lora_transform[0] = torch.eye(2) if transform == "full" else 1.0
        layer.lora_transform[1] = 0.0
    distance = analysis.transform_distance(model)["blocks.0.first"]
    assert distance[:2].tolist() == [0.0, pytest.approx(1.0)]
    assert distance[2] > 0


def test_effective_rank_counts_equal_singular_values():
    down, up = torch.eye(3, 7, dtype=torch.float64), torch.eye(5, 3, dtype=torch.float64)
    assert analysis.effective_rank(down, up) == pytest.approx(3)
    up[:, 2] = 0
    assert analysis.effective_rank(down, up) == pytest.approx(2)
    assert analysis.effective_rank(down, up * 0) == 0


def test_effective_ranks_equal_the_full_products(model, layer):
    got = analysis.effective_ranks(model)["blocks.0.first"]
    for task, value in enumerate(got):
        values = torch.linalg.svdvals(layer.delta_weight(task))
        shares = [float(v) for v in values / values.sum() if v > 1e-12]
        assert value == pytest.approx(math.exp(-sum(s * math.log(s) for s in shares if s > 0)), rel=1e-6)


def test_task_similarity_is_the_cosine_of_the_weight_changes(model):
    flat = torch.stack(
        [torch.cat([m.delta_weight(t).flatten() for m in model.adapted_layers().values()]) for t in range(3)]
    )
    expected = torch.nn.functional.cosine_similarity(flat[:, None], flat[None], dim=-1)
    torch.testing.assert_close(analysis.task_similarity(model), expected)


def test_gradient_cosine_sees_agreement_and_conflict(model):
    x = torch.randn(2, 3, 6, dtype=torch.float64)
    losses = {
        "a": lambda: (model(part, task_ids="a").square().sum() for part in x.split(1)),
        "same": lambda: 3 * model(x, task_ids="a").square().sum(),
        "opposite": lambda: -model(x, task_ids="a").square().sum(),
        "b": lambda: model(x, task_ids="b").square().sum(),
    }
    names, cosine = analysis.gradient_cosine(model, losses)
    assert names == list(losses)
    torch.testing.assert_close(cosine[0, :3], torch.tensor([1.0, 1.0, -1.0], dtype=torch.float64))
    assert -1 < cosine[0, 3] < 1 and cosine[0, 3] == cosine[3, 0]
    assert all(p.grad is None for p in model.parameters())


def test_own_rows_of_different_tasks_are_orthogonal(model):
    for layer in model.adapted_layers().values():
        layer.lora_A.requires_grad_(False)
        layer.lora_B.requires_grad_(False)
    x = torch.randn(2, 3, 6, dtype=torch.float64)
    losses = {name: lambda name=name: model(x, task_ids=name).square().sum() for name in "ab"}
    assert analysis.gradient_cosine(model, losses, shared_only=False)[1][0, 1] == 0
    with pytest.raises(MTLLoRAError, match="got 0 and 2"):
        analysis.gradient_cosine(model, losses)
