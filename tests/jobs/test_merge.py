"""The verb leaves an ordinary model of transformers, whatever the base, and refuses what it cannot write."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from jobs.config import load_config
from jobs.main_job import run_stage
from jobs.run import Run
from jobs.stages.merge import merge
from pipeline.errors import InputError
from pipeline.modeling.adapter import build_adapter
from pipeline.modeling.answering import classes_of_heads
from pipeline.modeling.base_model import load_base
from pipeline.modeling.predictor import PREDICTOR_FILE, Predictor, PredictorSpec
from pipeline.stream import read_split
from tests.jobs.test_cli import ROWS, _configuration


def _trained(folder: Path, base: str) -> Run:
    config = load_config(
        Path(_configuration(folder, ROWS)), ["model.num_layers=1", f"model.base={base}", "model.dtype=float32"]
    )
    run = Run(config)
    run.folder.bind(config.digest())
    run_stage(run, "prepare")
    model = load_base(config.model)
    names = [task.name for task in config.tasks]
    adapted: Any = build_adapter(config.adapter, model, names, classes_of_heads(model, config.tasks))
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter += 0.05 * torch.randn_like(parameter)
    adapted.save_pretrained(run.folder.adapter)
    PredictorSpec(tasks=config.tasks, base=config.model).write(run.folder.adapter / PREDICTOR_FILE)
    return run


def test_an_encoders_task_becomes_a_classifier(tmp_path: Path) -> None:
    run = _trained(tmp_path, "minilm-l6")
    (task,) = run.config.tasks
    with pytest.raises(InputError, match="--task must be one of the run's, got 'spma'"):
        merge(run, "spma", tmp_path / "merged")
    folder = merge(run, task.name, tmp_path / "merged")
    sample = next(iter(read_split(run.config.manifest_path, "train", task=task.name)))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    with torch.no_grad():
        found = model(**tokenizer(*sample.fields.values(), return_tensors="pt")).logits.softmax(-1)[0]
    expected = Predictor.load(run.folder.adapter, "cpu").scorer.probabilities([sample])[0]
    assert found.tolist() == pytest.approx(expected.tolist(), abs=1e-5)
    with pytest.raises(InputError, match="--output must be a new folder"):
        merge(run, task.name, folder)


def test_a_language_models_task_becomes_a_language_model(tmp_path: Path) -> None:
    run = _trained(tmp_path, "smollm2-135m-instruct")
    (task,) = run.config.tasks
    folder = merge(run, task.name, tmp_path / "merged")
    ids = torch.tensor([[5, 9, 200, 31]])
    adapted: Any = Predictor.load(run.folder.adapter, "cpu").scorer.model.adapted
    merged = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        expected = adapted.merge_and_unload(task.name)(input_ids=ids).logits
        torch.testing.assert_close(merged(input_ids=ids).logits, expected, rtol=1e-4, atol=1e-4)
    assert len(AutoTokenizer.from_pretrained(folder)) > 1000


def test_a_run_that_is_not_trained_is_refused(tmp_path: Path) -> None:
    run = Run(load_config(Path(_configuration(tmp_path, ROWS))))
    with pytest.raises(InputError, match="run first: mtl-lora train"):
        merge(run, run.config.tasks[0].name, tmp_path / "merged")
