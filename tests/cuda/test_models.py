"""Packed rows, scores, exports on the device against the host, for language models and encoders."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pipeline.contracts import Sample, TaskSpec
from pipeline.evaluation.parity import export_parity
from pipeline.modeling.adapter import AdapterConfig, build_adapter
from pipeline.modeling.answering import class_scorer, classes_of_heads, sample_encoder
from pipeline.modeling.base_model import BaseModelConfig, load_base
from pipeline.modeling.predictor import Predictor, PredictorSpec
from pipeline.training.config import TrainingConfig
from pipeline.training.objective import Objective
from tests.pipeline.modeling.tiny import tiny_encoder_folder, tiny_folder

pytestmark = pytest.mark.cuda

TASKS = (
    TaskSpec(name="spam", template="Text: {text}", label_words=(" no", " yes")),
    TaskSpec(name="kind", kind="multiclass", template="Kind of {text}?", label_words=(" a", " bb", " no yes")),
)
SAMPLES = [
    Sample(key=f"{task.name}{i}", task=task.name, fields={"text": text}, label=i % 2)
    for task in TASKS
    for i, text in enumerate(("call now for your free prize", "x", "a longer text about cars and boats", "at eight"))
]
KINDS = ("llama", "qwen2", "mixtral", "bert", "modernbert")


@pytest.fixture(
    scope="module", params=[("llama", "mtl_lora"), *((k, "mtl_lora") for k in KINDS[1:]), ("llama", "dora")]
)
def adapter(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, where: torch.device) -> Path:
    """An adapter trained on the device for a few steps, saved."""
    kind, method = request.param
    folder = tmp_path_factory.mktemp(kind)
    make = tiny_folder if kind in KINDS[:3] else tiny_encoder_folder
    config = BaseModelConfig(base=str(make(folder / "base", kind)), dtype="float32", max_length=64)
    base = load_base(config, where)
    adapted: Any = build_adapter(
        AdapterConfig(method=method, r=4), base, [t.name for t in TASKS], classes_of_heads(base, TASKS)
    ).to(where)
    encoder = sample_encoder(config, TASKS)
    batch = encoder.collate(encoder.encode(SAMPLES)).to(where)
    objective = Objective(class_scorer(adapted), [t.name for t in TASKS], TrainingConfig()).to(where)
    optimizer = torch.optim.AdamW([p for p in objective.parameters() if p.requires_grad], lr=0.02)
    losses = []
    with torch.autocast(where.type, torch.bfloat16):
        mixed = objective(batch)[0].mean().detach()
    torch.testing.assert_close(mixed.float(), objective(batch)[0].mean().detach(), rtol=3e-2, atol=3e-2)
    for _ in range(8):
        loss = objective(batch)[0].mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]
    adapted.save_pretrained(folder / "adapter")
    PredictorSpec(tasks=TASKS, base=config).write(folder / "adapter" / "predictor.json")
    return folder / "adapter"


def test_scores_of_the_device_are_those_of_the_host(adapter: Path, where: torch.device) -> None:
    there, here = (Predictor.load(adapter, device).scorer.probabilities(SAMPLES) for device in (where, "cpu"))
    for one, other in zip(there, here, strict=True):
        np.testing.assert_allclose(one, other, atol=2e-5)


def test_packed_rows_score_as_padded_ones(adapter: Path, where: torch.device) -> None:
    spec = PredictorSpec.read(adapter / "predictor.json")
    padded = spec.model_copy(update={"base": spec.base.model_copy(update={"packed_rows": False})})
    scores = []
    for one in (spec, padded):
        one.write(adapter / "predictor.json")
        scores.append(Predictor.load(adapter, where).scorer.probabilities(SAMPLES))
    spec.write(adapter / "predictor.json")
    for one, other in zip(*scores, strict=True):
        np.testing.assert_allclose(one, other, atol=2e-5)


def test_exports_answer_as_the_adapter(adapter: Path, tmp_path: Path, where: torch.device) -> None:
    adapted = Predictor.load(adapter, where).scorer.model.adapted
    if adapted.task_heads is not None:
        pytest.skip("an encoder's export is written and compared on the host")
    exports = {task.name: adapted.export_task(task.name, tmp_path / task.name) for task in TASKS}
    assert max(export_parity(adapter, exports, SAMPLES).values()) < 2e-4
