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
from pipeline.contracts import Sample, TaskSpec
from pipeline.evaluation.adapter_view import adapter_view
from pipeline.evaluation.features import TaskFeatures, plane, read_features, separation, write_features
from pipeline.modeling.base_model import BaseModelConfig, load_base, load_tokenizer
from pipeline.modeling.encoding import Encoder
from pipeline.modeling.scoring import LabelScorer, Scorer

TASKS = ("ads", "pages", "queries")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("transform", ["full", "diagonal"])
def test_view_of_the_files_agrees_with_the_model(tmp_path: Path, transform: Any, dtype: torch.dtype) -> None:
    base = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 4)).to(dtype)
    config = MTLLoRAConfig(task_names=TASKS, r=2, target_modules=("0", "1"), transform=transform)
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
    assert len(view.mixing_by_layer) == 2
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


def test_features_are_the_hidden_states_that_answer(tmp_path: Path) -> None:
    specs = (
        TaskSpec(name="ads", template="{text}\nRelevant?", label_words=(" no", " yes")),
        TaskSpec(name="pages", kind="multiclass", template="{text}\nTopic:", label_words=(" hotel booking", " sport")),
    )
    config = BaseModelConfig(num_layers=1, dtype="float32")
    base: Any = load_base(config)
    tokenizer = load_tokenizer(config)
    scorer = Scorer(LabelScorer(base), Encoder(tokenizer, specs, 64))
    samples = [
        Sample(key=f"k{i}", task=specs[i % 2].name, fields={"text": "shoes " * (1 + i % 5)}, label=0) for i in range(20)
    ]
    states = [state for _, state in scorer.answers(samples)]
    write_features(tmp_path / "f.safetensors", {(s.task, s.key): h for s, h in zip(samples, states, strict=True)})
    found = read_features(tmp_path / "f.safetensors")
    place = {name: i for i, name in enumerate(zip(found.tasks, found.keys, strict=True))}
    assert set(place) == {(s.task, s.key) for s in samples}
    for i in (0, 1, 18, 19):
        prompt = specs[i % 2].template.format(**samples[i].fields)
        hidden = base.model(**tokenizer(prompt, return_tensors="pt")).last_hidden_state[0, -1]
        np.testing.assert_allclose(states[i], hidden.detach().numpy(), atol=2e-3)
        np.testing.assert_array_equal(found.features[place[samples[i].task, samples[i].key]], states[i])


def test_plane_is_reproducible_and_separation_tells_tasks_apart() -> None:
    rng = np.random.default_rng(0)
    centres, codes = rng.normal(size=(3, 8)) * 4, np.repeat(np.arange(3), 12)
    names = [TASKS[c] for c in codes]
    keys = [str(i) for i in range(36)]
    apart = TaskFeatures(centres[codes] + rng.normal(size=(36, 8)), names, keys)
    mixed = TaskFeatures(rng.normal(size=(36, 8)), names, keys)
    assert separation(apart) > 0.4 > separation(mixed)
    places = plane(apart.features)
    assert places.shape == (36, 2)
    np.testing.assert_array_equal(places, plane(apart.features))
