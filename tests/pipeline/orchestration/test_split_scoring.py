"""A base that is split over scoring processes answers as a whole one, and none of them holds it."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pipeline.contracts import Sample, TaskSpec
from pipeline.modeling.adapter import AdapterConfig, build_adapter
from pipeline.modeling.base_model import BaseModelConfig, load_base
from pipeline.modeling.predictor import PREDICTOR_FILE, PredictorSpec, load_scorers
from pipeline.orchestration.cluster import cluster
from pipeline.orchestration.config import RayConfig
from pipeline.orchestration.scoring import scoring_pool
from tests.pipeline.modeling.tiny import tiny_folder

pytestmark = [pytest.mark.slow, pytest.mark.timeout(180)]

TASKS = (
    TaskSpec(name="short", template="{text}\nShort?", label_words=(" no", " yes")),
    TaskSpec(name="said", template="{text}\nSay:", kind="generation", generation={"max_new_tokens": 3}),
)


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    base = BaseModelConfig(base=str(tiny_folder(tmp_path / "base", "llama")), dtype="float32", max_length=64)
    adapted: Any = build_adapter(AdapterConfig(r=2), load_base(base), [task.name for task in TASKS])
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn_like(parameter)
    adapted.save_pretrained(tmp_path / "adapter")
    PredictorSpec(tasks=TASKS, base=base).write(tmp_path / "adapter" / PREDICTOR_FILE)
    return tmp_path / "adapter"


@pytest.fixture
def local_cluster() -> Iterator[None]:
    with cluster(RayConfig()):
        yield


def _load(adapter: Path, asking: Any = None) -> dict[str, Any]:
    """Return scorers, and see before that no process of several has a whole tensor of the base."""
    scorers = load_scorers(adapter, 256, asking)
    frozen = [p for p in scorers["trained"].model.adapted.parameters() if not p.requires_grad]  # type: ignore[attr-defined]
    assert frozen
    for parameter in frozen:
        assert parameter.numel() == 0
        assert parameter.ds_tensor.numel() == -(-parameter.ds_numel // 2)  # type: ignore[attr-defined]
    return scorers


def test_two_processes_answer_with_half_a_base_each(local_cluster: None, adapter: Path) -> None:
    samples = [
        Sample(key=str(i), task=task.name, fields={"text": "some words " * (i % 5 + 1)}, label=0, answers=("words",))
        for i in range(70)
        for task in TASKS
    ]
    whole = load_scorers(adapter, 256)
    with scoring_pool(partial(_load, adapter), 2, split="float32") as pool:
        for name, scorer in whole.items():
            found = pool.score(samples, model=name, states_of={("short", "3")})
            expected = [reply for reply, _ in scorer.evaluated(samples)]
            assert found.texts == [reply.text for reply in expected]
            for ours, reply in zip(found.probabilities, expected, strict=True):
                np.testing.assert_allclose(ours, reply.probabilities, atol=1e-5)
            assert set(found.states) == {("short", "3")}
        assert pool.latency_ms(samples[:2]) > 0
