"""The objective's formula against the same by hand."""

from __future__ import annotations

import math

import pytest
import torch

from mtl_lora.analysis import up_projection_overlap
from pipeline.modeling.adapter import AdapterConfig, build_adapter
from pipeline.modeling.base_model import BaseModelConfig, load_base
from pipeline.modeling.packing import Example, pack
from pipeline.modeling.scoring import LabelScorer
from pipeline.training.config import TrainingConfig
from pipeline.training.objective import Objective

BASE = BaseModelConfig(num_layers=1, dtype="float32")
EXAMPLES = [
    Example("a/0", 0, (5, 6, 7), ((8,), (9,)), (1.0, 0.0), False, weight=3.0),
    Example("b/0", 1, (5, 9), ((8,), (9,), (10, 11)), (0.0, 0.25, 0.75), False),
    Example("b/1", 1, (6, 9), ((8,), (9,)), (0.0, 1.0), False, weight=0.5),
]


@pytest.fixture(scope="module")
def scorer() -> LabelScorer:
    return LabelScorer(load_base(BASE))


def test_losses_are_smoothed_and_weighted_by_sample_task_and_noise(scorer: LabelScorer) -> None:
    batch = pack(EXAMPLES)
    config = TrainingConfig(task_weights={"b": 2.0}, uncertainty_weighting=True, label_smoothing=0.2)
    objective = Objective(scorer, ["a", "b"], config)
    assert objective.log_variance is not None
    with torch.no_grad():
        objective.log_variance.copy_(torch.tensor([0.3, -0.7]))
        log_p = scorer(batch).double()
    got, plain, _ = objective(batch)
    s, task_weight = [0.3, -0.7], [1.0, 2.0]
    for e, example in enumerate(EXAMPLES):
        classes = len(example.words)
        target = [0.8 * t + 0.2 / classes for t in example.target]
        smoothed = -sum(t * float(log_p[e, c]) for c, t in enumerate(target))
        cross_entropy = -sum(t * float(log_p[e, c]) for c, t in enumerate(example.target))
        weight = example.weight * task_weight[example.task]
        noise = s[example.task]
        assert float(plain[e]) == pytest.approx(cross_entropy, rel=1e-5)
        assert float(got[e]) == pytest.approx(weight * (smoothed * math.exp(-noise) + noise / 2), rel=1e-5)


def test_the_learnt_factor_settles_at_the_inverse_of_the_loss(scorer: LabelScorer) -> None:
    batch = pack(EXAMPLES[:1])
    objective = Objective(scorer, ["a", "b"], TrainingConfig(uncertainty_weighting=True))
    assert objective.log_variance is not None
    _, plain, _ = objective(batch)
    with torch.no_grad():  # d/ds w (exp(-s) L + s/2) = 0 at exp(s) = 2 L, whatever the weight
        objective.log_variance[0] = (2 * plain[0]).log()
    objective(batch)[0].sum().backward()
    assert objective.log_variance.grad is not None
    torch.testing.assert_close(objective.log_variance.grad, torch.zeros(2), atol=1e-6, rtol=0)


def test_the_orthogonality_term_is_added_once_to_the_mean_of_a_step() -> None:
    adapted = build_adapter(AdapterConfig(r=2, mixing_spread=1.0), load_base(BASE), ["a", "b"])
    with torch.no_grad():
        for layer in adapted.adapted_layers().values():
            layer.lora_B.normal_(std=0.1)
    scorer, batch = LabelScorer(adapted.eval()), pack(EXAMPLES)
    plain, _, _ = Objective(scorer, ["a", "b"], TrainingConfig())(batch)
    kept_apart, _, _ = Objective(scorer, ["a", "b"], TrainingConfig(orthogonality=0.5))(batch)
    expected = plain.mean() + 0.5 * up_projection_overlap(adapted)
    torch.testing.assert_close(kept_apart.mean(), expected)
