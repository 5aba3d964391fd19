"""The lower layers computed once give what the whole model gives, before and after training."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pipeline.contracts import Sample, TaskSpec
from pipeline.errors import InputError
from pipeline.ingestion import DataConfig, prepare
from pipeline.modeling.adapter_config import AdapterConfig
from pipeline.modeling.answering import class_scorer, sample_encoder
from pipeline.modeling.config import BaseModelConfig
from pipeline.modeling.scoring import Scorer
from pipeline.stream import read_split
from pipeline.study.frozen_part import without_frozen_part
from pipeline.study.loaded import loaded_base
from pipeline.study.trial import StudyTrial, trained
from pipeline.training.config import TrainingConfig
from pipeline.training.loop import TrainingJob
from tests.pipeline.training.ranks import tiny_base, tiny_encoder

TASKS = (
    TaskSpec(name="tone", template="{text}", label_words=(" no", " yes")),
    TaskSpec(name="size", template="{text} {other}", label_words=(" no", " yes")),
)


def job_on(folder: Path, base: Path, **adapter: Any) -> TrainingJob:
    lines = {
        split: [f'{{"text": "the {split} tone {i} is {i % 3}", "other": "or {i}", "label": {i % 2}}}' for i in range(n)]
        for split, n in {"train": 12, "test": 8}.items()
    }
    for task in TASKS:
        (folder / "data" / task.name).mkdir(parents=True)
        for split, text in lines.items():
            (folder / "data" / task.name / f"{split}.jsonl").write_text("\n".join(text) + "\n")
    prepare(DataConfig(source="records", root=str(folder / "data")), TASKS, folder / "shards", seed=0)
    return TrainingJob(
        folder / "shards/manifest.json",
        TASKS,
        BaseModelConfig(base=str(base), dtype="float32", max_length=32),
        AdapterConfig(r=2, lora_dropout=0.0, temperature=0.8, **adapter),
        TrainingConfig(num_workers=1, global_batch_size=8, max_steps=4, checkpoint_steps=100, learning_rate=0.02),
        seed=3,
    )


def _answers(adapted: Any, encoder: Any, samples: list[Sample]) -> np.ndarray:
    return np.stack(Scorer(class_scorer(adapted), encoder).probabilities(samples))


def test_training_above_the_kept_states_is_training_the_upper_layers_of_the_whole_model(tmp_path: Path) -> None:
    job = job_on(tmp_path, tiny_encoder(tmp_path / "base"), layers_to_transform=(1,))
    samples = list(read_split(job.manifest_path, "test"))
    whole, encoder, told = trained(StudyTrial(job, "test", tmp_path / "study/rows/s/a/1"))
    cut_job = replace(job, adapter=job.adapter.model_copy(update={"layers_to_transform": (0,)}))
    for _ in range(2):  # the second one reads the states that the first one has kept
        upper, kept, cut = trained(StudyTrial(cut_job, "test", tmp_path / "study/rows/s/a/2", frozen_layers=1))
        np.testing.assert_allclose(
            _answers(upper, kept, samples), _answers(whole, encoder, samples), rtol=1e-5, atol=1e-6
        )
    assert [row["loss"] for row in cut["history"]] == pytest.approx([row["loss"] for row in told["history"]], rel=1e-5)
    assert cut["adapter_parameters"] == told["adapter_parameters"]
    assert len(list((tmp_path / "study/states").iterdir())) == 1


def test_a_run_leaves_the_loaded_base_as_it_was(tmp_path: Path) -> None:
    job = job_on(tmp_path, tiny_encoder(tmp_path / "base"))
    before = {name: value.clone() for name, value in loaded_base(job.base).state_dict().items()}
    trained(StudyTrial(job, "test", tmp_path / "study/rows/s/a/1"))
    after = loaded_base(job.base).state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


def test_tasks_that_share_a_head_answer_alike_on_a_plain_base(tmp_path: Path) -> None:
    job = job_on(tmp_path, tiny_encoder(tmp_path / "base"))
    encoder = sample_encoder(job.base, job.tasks)
    sample = Sample(key="k", task="tone", fields={"text": "a", "other": "b"}, label=0)
    rows = [encoder.encode([sample.model_copy(update={"task": task.name})])[0].head_rows for task in TASKS]
    assert rows == [(0, 1), (2, 3)]
    encoder.share_heads()  # type: ignore[attr-defined]
    rows = [encoder.encode([sample.model_copy(update={"task": task.name})])[0].head_rows for task in TASKS]
    assert rows == [(0, 1), (0, 1)]


@pytest.mark.parametrize("layers", [2, 5])
def test_layers_must_be_left(tmp_path: Path, layers: int) -> None:
    job = job_on(tmp_path, tiny_encoder(tmp_path / "base"))
    with pytest.raises(InputError, match=f"must leave a layer of 2, got {layers}"):
        without_frozen_part(job, loaded_base(job.base), layers, tmp_path)


def test_a_language_model_has_no_such_part(tmp_path: Path) -> None:
    job = job_on(tmp_path, tiny_base(tmp_path / "base"))
    with pytest.raises(InputError, match="frozen_layers needs an encoder"):
        without_frozen_part(job, loaded_base(job.base), 1, tmp_path)
