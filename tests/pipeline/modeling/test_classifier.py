"""Exports of an encoder's tasks answer as the multi-task model does: as a classifier, or with the head beside."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mtl_lora.serving import ServedBase
from pipeline.errors import InputError
from pipeline.evaluation.parity import export_parity, exported_scorer
from pipeline.modeling.adapter import AdapterConfig, build_adapter
from pipeline.modeling.answering import class_scorer, classes_of_heads, sample_encoder
from pipeline.modeling.base_model import load_base
from pipeline.modeling.classifier import HEAD_FILE, export_task, merge_task, plain_inputs
from pipeline.modeling.config import BaseModelConfig
from pipeline.modeling.head_encoding import segment_templates
from pipeline.modeling.predictor import PREDICTOR_FILE, PredictorSpec
from pipeline.modeling.scoring import Scorer
from pipeline.serving.exported_task import ExportedTask
from pipeline.serving.openai_client import LabelClient
from tests.pipeline.modeling.test_encoders import EXTRA, NAMES, SAMPLES, TASKS
from tests.pipeline.modeling.tiny import tiny_encoder_folder


def _trained(folder: Path, kind: str, pooling: Any) -> tuple[Any, BaseModelConfig]:
    base_folder = tiny_encoder_folder(folder, kind, **EXTRA.get(kind, {}))
    config = BaseModelConfig(base=str(base_folder), dtype="float32", max_length=32, pooling=pooling)
    base = load_base(config)
    options = {"target_modules": "all-linear", "r": 2, "lora_dropout": 0.0}
    adapted = build_adapter(AdapterConfig.model_validate(options), base, NAMES, classes_of_heads(base, TASKS))
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_" in name or "task_heads" in name:
                parameter.add_(0.1 * torch.randn_like(parameter))
    adapter = folder / "adapter"
    adapted.eval().save_pretrained(adapter)
    PredictorSpec(tasks=TASKS, base=config).write(adapter / PREDICTOR_FILE)
    return adapted, config


def _batch(config: BaseModelConfig, task: str) -> Any:
    encoder = sample_encoder(config, TASKS)
    return encoder.collate(encoder.encode([sample for sample in SAMPLES if sample.task == task]))


@pytest.mark.parametrize(
    ("kind", "pooling", "is_classifier"),
    [("bert", "first", True), ("roberta", "first", True), ("bert", "mean", False), ("modernbert", "first", False)],
)
def test_every_kind_of_task_answers_as_the_model_does(
    kind: str, pooling: str, is_classifier: bool, tmp_path: Path
) -> None:
    adapted, config = _trained(tmp_path, kind, pooling)
    folders = {}
    for task in TASKS:
        further = (_batch(config, task.name), config, ServedBase("owner/base"), {"task.json": "{}"})
        folders[task.name] = export_task(adapted, task.name, tmp_path / task.name, *further)
        assert (folders[task.name] / HEAD_FILE).is_file() is not is_classifier
    differences = export_parity(tmp_path / "adapter", folders, SAMPLES)
    assert set(differences) == set(NAMES) and max(differences.values()) < 1e-4
    scorer = Scorer(class_scorer(adapted), sample_encoder(config, TASKS))
    for task in TASKS:
        samples = [sample for sample in SAMPLES if sample.task == task.name]
        scorer = exported_scorer(folders[task.name], PredictorSpec(tasks=(task,), base=config))
        alone = [(reply.probabilities, state) for reply, state in scorer.evaluated(samples)]  # as workers ask it
        for (found, state), (expected, own) in zip(alone, scorer.answers(samples), strict=True):
            np.testing.assert_allclose(found, expected, atol=1e-5)
            assert state.shape == own.shape


def test_an_export_on_another_kind_of_base_is_refused(tmp_path: Path) -> None:
    adapted, config = _trained(tmp_path, "bert", "first")
    task = TASKS[1]
    further = (_batch(config, task.name), config, ServedBase("owner/base"), {"task.json": "{}"})
    folder = export_task(adapted, task.name, tmp_path / task.name, *further)
    with pytest.raises(InputError, match="is of an encoder, got the base 'smollm2"):
        exported_scorer(folder, PredictorSpec(tasks=(task,), base=BaseModelConfig()))
    with (folder / "adapter_model.safetensors").open("r+b") as file:
        file.write(b"damaged")
    with pytest.raises(InputError, match="must fit the base"):
        exported_scorer(folder, PredictorSpec(tasks=(task,), base=config))


def test_a_merged_task_is_loaded_by_transformers_alone(tmp_path: Path) -> None:
    from transformers import AutoModelForSequenceClassification

    adapted, config = _trained(tmp_path, "bert", "first")
    batch = _batch(config, "topic")
    merge_task(adapted, "topic", tmp_path / "merged", batch, config)
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged").eval()
    inputs = plain_inputs(adapted.base_model, batch)
    assert adapted.task_heads is not None
    with torch.no_grad():
        states = adapted(**inputs, task_ids="topic").last_hidden_state[:, 0]
        rows = adapted.task_heads.rows(1)
        expected = states @ adapted.task_heads.weight[rows].t() + adapted.task_heads.bias[rows]
        torch.testing.assert_close(loaded(**inputs).logits, expected, rtol=1e-4, atol=1e-4)


def test_a_merged_task_that_transformers_cannot_express_is_refused(tmp_path: Path) -> None:
    adapted, config = _trained(tmp_path, "bert", "mean")
    with pytest.raises(InputError, match="got pooling 'mean'"):
        merge_task(adapted, "topic", tmp_path / "merged", _batch(config, "topic"), config)


def test_an_exported_task_says_how_its_rows_are_made_and_pooled(tmp_path: Path) -> None:
    _, config = _trained(tmp_path, "bert", "mean")
    asked = {task.name: ExportedTask.of(task, config, ServedBase("owner/base"), ()) for task in TASKS}
    assert {each.pooling for each in asked.values()} == {"mean"}
    assert asked["pair"].segments == ("{a}", "{b}") and asked["pick"].segments == ("{a}",)
    assert asked["topic"].segments == ("Topic of {a}",) and asked["topic"].labels == ("cars", "sofas", "music")
    assert ExportedTask.model_validate_json(asked["topic"].text) == asked["topic"]
    alike = [each.model_copy(update={"segments": segment_templates(each), "metric": None}) for each in TASKS]
    assert [asked[each.name].spec.model_copy(update={"metric": None}) for each in TASKS] == alike
    with pytest.raises(InputError, match="'pair' has a head on an encoder"):
        LabelClient("http://localhost", asked["pair"], None)
