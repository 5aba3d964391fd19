"""Every method stands on an encoder with heads: packed or padded, with checkpointed activations, in bfloat16."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from pipeline.modeling.answering import class_scorer, sample_encoder
from pipeline.modeling.base_model import BaseModelConfig, load_base
from pipeline.modeling.packing import Batch
from pipeline.training.config import TrainingConfig
from pipeline.training.objective import Objective
from tests.pipeline.modeling.test_encoders import NAMES, SAMPLES, TASKS, _adapted, _config

METHODS = ("mtl_lora", "lora", "dora", "multilora", "moelora")


def _objective(config: BaseModelConfig, method: str, checkpointing: bool = False) -> tuple[Objective, Batch]:
    base: Any = load_base(config)
    objective = Objective(class_scorer(_adapted(base, method)), NAMES, TrainingConfig())
    if checkpointing:
        base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    encoder = sample_encoder(config, TASKS)
    return objective.train(), encoder.collate(encoder.encode(SAMPLES))


def _gradients(objective: Objective, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
    base: Any = objective.scorer.language_model
    for module in base.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    losses, *_ = objective(batch)
    losses.sum().backward()
    return losses.detach(), {name: p.grad for name, p in objective.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("method", METHODS)
def test_packed_padded_and_checkpointed_rows_have_one_gradient(tmp_path: Path, method: str) -> None:
    packed = _config(tmp_path, "bert")
    losses, expected = _gradients(*_objective(packed, method))
    assert {name for name in expected if "task_heads" in name}
    assert all(bool(gradient.abs().max() > 0) for name, gradient in expected.items() if "task_heads" in name)
    padded = packed.model_copy(update={"packed_rows": False})
    for other, checkpointing in ((packed, True), (padded, False), (padded, True)):
        found, gradients = _gradients(*_objective(other, method, checkpointing))
        torch.testing.assert_close(found, losses, rtol=1e-4, atol=1e-5)
        assert gradients.keys() == expected.keys()
        for name, gradient in gradients.items():
            torch.testing.assert_close(gradient, expected[name], rtol=1e-3, atol=1e-4, msg=name)
            if other is packed:  # the same work once more
                assert gradient.equal(expected[name]), name


@pytest.mark.parametrize("method", METHODS)
def test_in_bfloat16_heads_and_losses_stay_in_float32_and_near(tmp_path: Path, method: str) -> None:
    config = _config(tmp_path, "bert")
    losses, expected = _gradients(*_objective(config, method))
    objective, batch = _objective(config.model_copy(update={"dtype": "bfloat16"}), method)
    found, gradients = _gradients(objective, batch)
    heads: Any = objective.scorer.adapted.task_heads
    assert found.dtype == heads.weight.dtype == heads.weight.grad.dtype == torch.float32
    torch.testing.assert_close(found, losses, rtol=0.05, atol=0.05)
    name = next(name for name in expected if "task_heads.weight" in name)
    cosine = torch.nn.functional.cosine_similarity(gradients[name].flatten(), expected[name].flatten(), dim=0)
    assert cosine > 0.98
