"""What the report shows of an adapter is what the method itself says of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from mtl_lora import MTLLoRAConfig, MTLLoRAModel
from mtl_lora.analysis import mixing_weights, transform_distance
from pipeline.report.adapter_view import adapter_view

TASKS = ("ads", "pages", "queries")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("transform", ["full", "diagonal"])
@pytest.mark.parametrize("learned", [False, True])
def test_view_of_the_files_agrees_with_the_model(
    tmp_path: Path, transform: Any, dtype: torch.dtype, learned: bool
) -> None:
    base = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 4)).to(dtype)
    options: dict[str, Any] = {"transform": transform, "learn_temperature": learned}
    config = MTLLoRAConfig(task_names=TASKS, r=2, target_modules=("0", "1"), **options)
    model = MTLLoRAModel(base, config)
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += torch.randn_like(parameter)
    model.save_pretrained(tmp_path)
    view = adapter_view(tmp_path)
    assert view is not None
    expected = torch.stack(list(mixing_weights(model).values())).mean(0)
    np.testing.assert_allclose([view.mixing[t] for t in TASKS], expected.numpy(), atol=1e-6)
    np.testing.assert_allclose([sum(w) for w in view.mixing.values()], 1.0)
    distances = np.array([[view.lambda_distance[a][b] for b in TASKS] for a in TASKS])
    np.testing.assert_allclose(distances, distances.T)
    assert (np.diag(distances) == 0).all()
    assert (distances[~np.eye(3, dtype=bool)] > 0).all()


def test_fresh_transformations_do_not_differ(tmp_path: Path) -> None:
    model = MTLLoRAModel(nn.Sequential(nn.Linear(6, 5)), MTLLoRAConfig(task_names=TASKS, r=2, target_modules=("0",)))
    model.save_pretrained(tmp_path)
    assert max(float(d.max()) for d in transform_distance(model).values()) == 0
    view = adapter_view(tmp_path)
    assert max(d for row in view.lambda_distance.values() for d in row.values()) == 0
