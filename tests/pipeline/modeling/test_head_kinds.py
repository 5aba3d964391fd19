"""Sets of classes and plain numbers, which only heads answer: read, learned, scored and exported by one definition."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.functional import binary_cross_entropy_with_logits, mse_loss

from pipeline.contracts import Sample, ShardManifest, TaskSpec
from pipeline.errors import InputError
from pipeline.ingestion import DataConfig, prepare
from pipeline.label_names import MOST_LABELS, class_set, label_of
from pipeline.labels import label_counts, read_label
from pipeline.modeling.answering import sample_encoder
from pipeline.modeling.base_model import BaseModelConfig
from pipeline.modeling.head_scoring import HeadScorer
from pipeline.modeling.packing import HeadExample, pack
from pipeline.modeling.predictor import NO_CLASS, Predictor, PredictorSpec
from pipeline.modeling.scoring import even_target, label_loss
from pipeline.record import Rejected
from tests.pipeline.modeling.test_encoders import _adapted_for, _config

TOPICS = TaskSpec(name="topics", kind="multilabel", segments=("{a}",), labels=("cars", "sofas", "music"))
PRICE = TaskSpec(name="price", kind="regression", segments=("{a}",), label_values=(10, 50))
TOPIC = TaskSpec(name="topic", kind="multiclass", segments=("{a}",), labels=("x", "y"))
TASKS = (TOPICS, PRICE, TOPIC)
SAMPLES = [
    Sample(key="1", task="topics", fields={"a": "red sofa radio"}, label=label_of([1, 2])),
    Sample(key="2", task="price", fields={"a": "an expensive one"}, label=70.0),
    Sample(key="3", task="topics", fields={"a": "nothing"}, label=0.0),
    Sample(key="4", task="topic", fields={"a": "some"}, label=1),
]


@given(st.sets(st.integers(0, MOST_LABELS - 1)))
def test_a_set_of_classes_survives_as_a_label(classes: set[int]) -> None:
    assert {c for c, has in enumerate(class_set(label_of(classes), MOST_LABELS)) if has} == classes


@pytest.mark.parametrize(
    ("value", "classes"),
    [(["sofas", "music"], {1, 2}), ([0, "music"], {0, 2}), ("[1]", {1}), ([], set()), (np.array(["cars"]), {0})],
)
def test_a_list_of_names_or_indices_is_a_set_of_classes(value: Any, classes: set[int]) -> None:
    assert read_label({"label": value}, TOPICS, ()) == label_of(classes)


@pytest.mark.parametrize(
    ("spec", "value", "reason"),
    [
        (TOPICS, "sofas", "not a list"),
        (TOPICS, 1, "not a list"),
        (TOPICS, None, "missing"),
        (TOPICS, ["boats"], "neither a number nor a label word"),
        (TOPICS, [3], "not a class index"),
        (PRICE, "cheap", "neither a number"),
        (PRICE, True, "truth value"),
        (PRICE, float("nan"), "missing"),
    ],
)
def test_what_is_no_set_or_no_number_is_rejected(spec: TaskSpec, value: Any, reason: str) -> None:
    with pytest.raises(Rejected, match=reason):
        read_label({"label": value}, spec, ())


def test_labels_are_counted_by_class_and_by_stretch_of_the_scale() -> None:
    from collections import Counter

    assert label_counts(Counter({label_of([0, 2]): 3, label_of([2]): 1, 0.0: 5}), TOPICS) == {"0": 3, "2": 4}
    assert label_counts(Counter({10.0: 1, 14.9: 1, 70.1: 1}), PRICE) == {"12.5": 2, "72.5": 1}


@pytest.mark.parametrize("spec", [TOPICS, PRICE])
def test_a_language_model_refuses_them_with_the_remedy(spec: TaskSpec) -> None:
    with pytest.raises(InputError, match=rf"got kind '{spec.kind}'; take an encoder as model.base"):
        sample_encoder(BaseModelConfig(), [spec.model_copy(update={"template": "{a}:"})])


@pytest.mark.parametrize(
    ("changes", "rule"),
    [
        ({"kind": "regression", "label_values": (5, 5)}, "the lower first"),
        ({"kind": "regression", "label_values": (0, 5), "labels": ("a", "b")}, "has no classes"),
        ({"kind": "regression", "label_values": (0, 5), "metric": "auc"}, "metric of a regression task"),
        ({"kind": "multilabel", "labels": [str(i) for i in range(MOST_LABELS + 1)]}, "at most 52 classes"),
        ({"kind": "multilabel", "labels": ("a", "b"), "class_weights": {"a": 2}}, "several classes at once"),
    ],
)
def test_tasks_that_cannot_be_are_refused(changes: dict[str, Any], rule: str) -> None:
    with pytest.raises(ValueError, match=rule):
        TaskSpec(name="t", segments=("{a}",), **changes)


def _scored(folder: Path) -> tuple[HeadScorer, Any]:
    config = _config(folder, "bert")
    adapted = _adapted_for(config, TASKS)
    return HeadScorer(adapted), sample_encoder(config, TASKS)


def test_losses_and_gradients_are_those_of_torchs_own_functions(tmp_path: Path) -> None:
    scorer, encoder = _scored(tmp_path)
    heads: Any = scorer.adapted.task_heads
    batch = encoder.collate(encoder.encode(SAMPLES))
    scores, states = scorer.answer(batch)
    states = states.detach()
    logits = states @ heads.weight.t() + heads.bias  # the rows of topics, price, topic one after another
    expected = torch.stack(
        [
            binary_cross_entropy_with_logits(logits[0, :3], torch.tensor([0.0, 1, 1])),
            mse_loss(logits[1, 3], torch.tensor(2.0)),  # 70 is twice as far from 30 as 50
            binary_cross_entropy_with_logits(logits[2, :3], torch.zeros(3)),
            -logits[3, 4:].log_softmax(0)[1],
        ]
    )
    loss = label_loss(scores, batch)
    assert torch.allclose(loss, expected, atol=1e-6)
    found = torch.autograd.grad(loss.sum(), [heads.weight, heads.bias])
    for ours, theirs in zip(found, torch.autograd.grad(expected.sum(), [heads.weight, heads.bias]), strict=True):
        assert torch.allclose(ours, theirs, atol=1e-6)
    answers = batch.answers(scores)
    assert torch.allclose(answers[0, :3], logits[0, :3].sigmoid().double(), atol=1e-6)
    assert float(answers[1, 0].detach()) == pytest.approx(30 + 20 * float(logits[1, 3].detach()), abs=1e-4)


@pytest.mark.parametrize("score", [-80.0, 0.0, 80.0])
def test_sure_classes_have_finite_losses_and_gradients(score: float) -> None:
    example = HeadExample("t/1", 0, ((1,),), ((0,),), (0, 1), (0.0, 1.0), link="sigmoid")
    batch, logits = pack([example]), torch.full((1, 2), score, requires_grad=True)
    loss = label_loss(torch.nn.functional.logsigmoid(logits), batch)
    (gradient,) = torch.autograd.grad(loss.sum(), logits)
    expected = binary_cross_entropy_with_logits(logits, torch.tensor([[0.0, 1.0]]))
    assert float(loss.detach()) == pytest.approx(float(expected.detach()), rel=1e-6)
    assert torch.allclose(gradient, torch.autograd.grad(expected, logits)[0], atol=1e-6)


def test_smoothing_mixes_in_what_says_nothing(tmp_path: Path) -> None:
    _, encoder = _scored(tmp_path)
    batch = encoder.collate(encoder.encode(SAMPLES))
    assert even_target(batch).tolist() == [[0.5, 0.5, 0.5], [2.0, 0, 0], [0.5, 0.5, 0.5], [0.5, 0.5, 0]]


def test_an_answer_names_the_classes_or_the_number(tmp_path: Path) -> None:
    from pipeline.modeling.scoring import Scorer

    scorer, encoder = _scored(tmp_path)
    heads: Any = scorer.adapted.task_heads
    with torch.no_grad():
        heads.weight.zero_()
        heads.bias.copy_(torch.tensor([3.0, -3.0, 3.0, 0.5, 0.0, 0.0]))
    spec = PredictorSpec(tasks=TASKS, base=_config(tmp_path, "bert"))
    rows = pd.DataFrame({"task": ["topics", "price"], "a": ["x", "y"]})
    found = Predictor(spec, Scorer(scorer, encoder)).predict(rows)
    assert found["label_word"].tolist() == ["cars, music", "40"]
    assert found["label"].tolist() == [NO_CLASS, NO_CLASS]
    assert found["score"].tolist() == pytest.approx([1 / (1 + np.exp(-3)), 40.0])


def test_csv_and_json_records_become_the_same_samples(tmp_path: Path) -> None:
    rows = [{"a": f"text {i}", "label": names} for i, names in enumerate([["cars"], [], ["sofas", "music"]])]
    labels = {}
    for kind in ("csv", "jsonl"):
        (tmp_path / kind).mkdir()
        with (tmp_path / kind / f"topics.{kind}").open("w", newline="") as file:
            if kind == "csv":
                writer = csv.DictWriter(file, ["a", "label"])
                writer.writeheader()
                writer.writerows({**row, "label": json.dumps(row["label"])} for row in rows)
            else:
                file.writelines(json.dumps(row) + "\n" for row in rows)
        data = DataConfig(source="records", root=str(tmp_path / kind), files={"topics": {"train": f"topics.{kind}"}})
        prepare(data, [TOPICS], tmp_path / f"{kind}-shards", seed=0)
        manifest = ShardManifest.read(tmp_path / f"{kind}-shards" / "manifest.json")
        labels[kind] = manifest.shards[0].label_counts
    assert labels["csv"] == labels["jsonl"] == {"0": 1, "1": 1, "2": 1}
