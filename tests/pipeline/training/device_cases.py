"""The step of training and of scoring on a device: nothing stays on the host, and the host waits for nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from mtl_lora import AdapterModel
from pipeline.contracts import Sample, TaskSpec
from pipeline.modeling.adapter import AdapterConfig, build_adapter
from pipeline.modeling.answering import class_scorer, classes_of_heads, sample_encoder
from pipeline.modeling.base_model import BaseModelConfig, load_base
from pipeline.modeling.packing import micro_batches
from pipeline.training.config import TrainingConfig
from pipeline.training.finite import FiniteGuard
from pipeline.training.loop import LogInterval
from pipeline.training.objective import Objective
from tests.fake_device import NAME, fake_device, moved
from tests.pipeline.modeling.tiny import tiny_encoder_folder, tiny_folder

TASKS = (
    TaskSpec(name="spam", template="Text: {text}", label_words=(" no", " yes")),
    TaskSpec(name="kind", kind="multiclass", template="Kind of {text}?", label_words=(" a", " bb", " no yes")),
)
SAMPLES = [
    Sample(key="a", task="spam", fields={"text": "call now for your free prize"}, label=1),
    Sample(key="b", task="kind", fields={"text": "card"}, label=2),
    Sample(key="c", task="spam", fields={"text": "at eight"}, label=0),
]
LANGUAGE_MODELS, ENCODERS = ("llama", "qwen2", "bloom"), ("bert", "modernbert", "mpnet")
KINDS = (*LANGUAGE_MODELS, *ENCODERS)
CASES = [(kind, "mtl_lora") for kind in KINDS] + [
    (kind, method) for kind in ("llama", "bert") for method in ("lora", "dora", "multilora", "moelora")
]


def _parts(folder: Path, method: str) -> tuple[AdapterModel, Any]:
    config = BaseModelConfig(base=str(folder), dtype="float32", max_length=64)
    base = load_base(config)
    names = [task.name for task in TASKS]
    adapted = build_adapter(
        AdapterConfig(method=method, r=4, target_modules="all-linear"), base, names, classes_of_heads(base, TASKS)
    )
    return adapted, sample_encoder(config, TASKS)


@pytest.fixture(scope="module")
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    make = tiny_folder if request.param in LANGUAGE_MODELS else tiny_encoder_folder
    return make(tmp_path_factory.mktemp(request.param), request.param)


@pytest.mark.parametrize(("folder", "method"), CASES, indirect=["folder"])
def test_the_host_does_not_wait_within_a_micro_batch(folder: Path, method: str) -> None:
    adapted, encoder = _parts(folder, method)
    config = TrainingConfig(uncertainty_weighting=True, label_smoothing=0.1, task_weights={"spam": 2.0})
    examples = encoder.encode(SAMPLES)
    batch = encoder.collate([examples[i] for i in micro_batches(examples, 4096)[0]])
    with fake_device() as watch:
        objective = Objective(class_scorer(moved(adapted)), ["spam", "kind"], config)
        assert objective.log_variance is not None
        objective.log_variance = nn.Parameter(objective.log_variance.to(NAME))
        objective.train()
        there = torch.device(NAME)
        guard, log_interval = FiniteGuard(objective, there), LogInterval(2, there)
        on_device = batch.to(NAME)
        watch.uploads.clear()
        losses_E, plain_E, _ = objective(on_device)
        losses_E.sum().backward()
        guard.add(on_device, plain_E)
        log_interval.add(on_device, plain_E, on_device.example_weight)
    assert losses_E.device.type == plain_E.device.type == NAME
    assert all(p.grad is not None and p.grad.device.type == NAME for p in objective.parameters() if p.requires_grad)
    assert not watch.waits
    assert not watch.uploads


@pytest.mark.parametrize("folder", KINDS, indirect=True)
def test_scores_come_back_in_one_wait_each(folder: Path) -> None:
    adapted, encoder = _parts(folder, "mtl_lora")
    batch = encoder.collate(encoder.encode(SAMPLES))
    with fake_device() as watch, torch.no_grad():
        scorer = class_scorer(moved(adapted)).eval()
        scores, states = scorer.answer(batch.to(NAME))
        assert not watch.waits
        scores.cpu(), states.cpu()
    assert watch.waits.total() == 2


def test_the_fake_device_sees_what_a_gpu_would_stumble_over() -> None:
    with fake_device() as watch:
        there = torch.ones(3, device=NAME)
        assert not watch.waits
        with pytest.raises(Exception, match="same device"):
            there + torch.ones(3)
        with pytest.raises(Exception, match="_local_scalar_dense"):
            bool((there > 0).all())
        there.cpu()
        torch.ones(3).to(NAME)
    assert watch.waits["_local_scalar_dense"] == 1
    assert watch.waits["_to_copy"] == watch.uploads["_to_copy"] == 1
