"""Task features are what the model answers from, and their plane and separation are reproducible."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from pipeline.contracts import Sample, TaskSpec
from pipeline.evaluation.features import TaskFeatures, plane, read_features, separation, write_features
from pipeline.modeling.base_model import BaseModelConfig, load_base, load_tokenizer
from pipeline.modeling.encoding import Encoder
from pipeline.modeling.scoring import LabelScorer, Scorer

TASKS = ("ads", "pages", "queries")


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
