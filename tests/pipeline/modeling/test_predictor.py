"""Serving takes what ingestion takes, and refuses what it refuses."""

from __future__ import annotations

import datetime as dt
from concurrent.futures import ThreadPoolExecutor
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from pipeline.answer import ANSWER
from pipeline.contracts import TaskSpec
from pipeline.errors import InputError
from pipeline.modeling.adapter import AdapterConfig, build_adapter
from pipeline.modeling.base_model import BaseModelConfig, load_base, load_tokenizer
from pipeline.modeling.encoding import Encoder
from pipeline.modeling.predictor import Predictor, PredictorSpec
from pipeline.modeling.scoring import LabelScorer, Scorer
from pipeline.record import Rejected
from pipeline.validate import check_record
from tests.pipeline.modeling.tiny import tiny_folder

PICK = TaskSpec(name="pick", kind="choice", template="{question} {size}:")
GOOD = {"question": "which?", "size": "1", "choices": ["one", "two"], "answer": 0}


@pytest.fixture(scope="module")
def predictor() -> Predictor:
    base = BaseModelConfig(num_layers=1, dtype="float32", max_length=48)
    adapted = build_adapter(AdapterConfig(target_modules=("q_proj",)), load_base(base), ["pick"])
    encoder = Encoder(load_tokenizer(base), (PICK,), base.max_length)
    return Predictor(PredictorSpec(tasks=(PICK,), base=base), Scorer(LabelScorer(adapted), encoder))


def ask(predictor: Predictor, **values: Any) -> list[float]:
    frame = pd.DataFrame([{"task": "pick", **GOOD, **values}], dtype=object)
    return list(predictor.predict(frame)["probabilities"][0])


@pytest.mark.parametrize(
    "values",
    [
        {"choices": np.array(["one", "two"], dtype=object)},
        {"choices": ("one", "two")},
        {"choices": '["one", "two"]'},
        {"choices": [b"one", np.str_("two")]},
        {"size": 1},
        {"size": np.int64(1)},
        {"size": Decimal("1")},
        {"size": b"1"},
    ],
    ids=repr,
)
def test_every_form_that_ingestion_takes_is_answered_alike(predictor: Predictor, values: dict[str, Any]) -> None:
    assert ask(predictor, **values) == pytest.approx(ask(predictor))


def test_choices_through_parquet_are_answered(predictor: Predictor, tmp_path: Path) -> None:
    pd.DataFrame([{"task": "pick", **GOOD}]).to_parquet(tmp_path / "rows.parquet")
    answered = predictor.predict(pd.read_parquet(tmp_path / "rows.parquet"))
    assert answered["probabilities"][0] == pytest.approx(ask(predictor))
    assert answered["label_word"][0] in ("one", "two")


VALUES = [
    *("text", "", 1, 1.5, True, None, float("nan"), float("inf"), pd.NA, pd.NaT, b"x", b"\xff", "\ud83d", "a\udcff"),
    *(
        dt.date(2026, 1, 5),
        dt.timedelta(1),
        Decimal("NaN"),
        Decimal("2.50"),
        ["a"],
        ["a", "b"],
        '["a", "b"]',
        "[" * 5000,
    ),
    *(np.array(["a", "b"]), np.array(["a", None], object), ["a", " "], [1, 2], {"a": 1}, np.float32("nan"), 10**5000),
]


@pytest.mark.parametrize("field", ["question", "size", "choices"])
def test_serving_refuses_what_ingestion_rejects_and_takes_what_it_takes(predictor: Predictor, field: str) -> None:
    for value in VALUES:
        try:
            check_record({**GOOD, field: value}, PICK, PICK.text_fields)
        except Rejected as reason:
            with pytest.raises(InputError, match=r"row 0 of task 'pick' must hold what the task asks for") as caught:
                ask(predictor, **{field: value})
            assert str(reason) in str(caught.value)
        else:
            assert sum(ask(predictor, **{field: value})) == pytest.approx(1)


def test_a_missing_field_is_said_with_the_fields_there_are(predictor: Predictor) -> None:
    frame = pd.DataFrame([{"task": "pick", "Question": "which?", "size": 1, "choices": ["one", "two"]}])
    with pytest.raises(
        InputError, match=r"it has the fields \['task', 'Question', .*for 'question' did you mean 'Question'"
    ):
        predictor.predict(frame)


def test_a_column_twice_is_refused(predictor: Predictor) -> None:
    frame = pd.DataFrame(
        [["pick", "a", "b", 1, ["one", "two"]]], columns=["task", "question", "question", "size", "choices"]
    )
    with pytest.raises(InputError, match=r"must have each column once, got \['question'\] more than once"):
        predictor.predict(frame)


@pytest.mark.parametrize("name", [None, float("nan"), "pikc", 3])
def test_a_row_of_no_known_task_is_refused(predictor: Predictor, name: Any) -> None:
    with pytest.raises(InputError, match="task must be one of the model's"):
        predictor.predict(pd.DataFrame([{**GOOD, "task": name}], dtype=object))


def test_rows_are_asked_under_the_columns_of_the_records_and_under_the_fields_own_names(predictor: Predictor) -> None:
    spec = PICK.model_copy(update={"columns": {"question": "Q.text", "choices": "options", "answer": "gold"}})
    mapped = Predictor(PredictorSpec(tasks=(spec,), base=predictor.spec.base), predictor.scorer)
    theirs = {"task": "pick", "Q": {"text": "which?"}, "size": "1", "options": ["one", "two"]}
    (expected,) = predictor.samples([{"task": "pick", **GOOD}])
    assert mapped.samples([theirs, {"task": "pick", **GOOD}]) == [expected, expected.model_copy(update={"key": "1"})]
    with pytest.raises(InputError, match="field 'question' is missing"):
        mapped.samples([{**theirs, "Q": {}}])


def test_an_answer_is_explained_by_the_likelihoods_it_comes_from(predictor: Predictor) -> None:
    samples = predictor.samples([{"task": "pick", **GOOD}, {"task": "pick", **GOOD, "choices": ["a", "b", "c"]}])
    for answer, (*explained, likelihoods) in zip(predictor.answer(samples), predictor.explain(samples), strict=True):
        assert tuple(explained) == answer
        assert len(likelihoods) == len(answer[-1]) and max(likelihoods) < 0
        assert np.exp(likelihoods) / np.exp(likelihoods).sum() == pytest.approx(answer[-1], abs=1e-6)


def test_several_threads_get_what_each_asked_alone(predictor: Predictor) -> None:
    frames = [
        pd.DataFrame([{"task": "pick", **GOOD, "question": f"is it {n}" * (1 + n % 5), "size": str(n)}] * (1 + n % 3))
        for n in range(24)
    ]
    alone = [predictor.predict(frame) for frame in frames]
    with ThreadPoolExecutor(8) as threads:
        for found, wanted in zip(threads.map(predictor.predict, frames), alone, strict=True):
            pd.testing.assert_frame_equal(found, wanted)


def test_a_model_that_writes_has_its_text_beside_the_columns_of_all(tmp_path: Path) -> None:
    base = BaseModelConfig(base=str(tiny_folder(tmp_path / "llama", "llama")), dtype="float32", max_length=64)
    tasks = (
        TaskSpec(name="colour", kind="generation", template="{text}:", generation={"max_new_tokens": 4}),
        TaskSpec(name="spam", template="{text}:", label_words=(" no", " yes")),
        PICK.model_copy(update={"answer_by": "generation"}),
    )
    adapted = build_adapter(AdapterConfig(target_modules=("q_proj",)), load_base(base), [task.name for task in tasks])
    scorer = Scorer(LabelScorer(adapted), Encoder(load_tokenizer(base), tasks, base.max_length))
    predictor = Predictor(PredictorSpec(tasks=tasks, base=base), scorer)
    rows = [{"task": "colour", "text": "a sky"}, {"task": "spam", "text": "a sky"}, {**GOOD, "task": "pick"}]
    found = predictor.predict(pd.DataFrame(rows))
    assert list(found.columns) == [*ANSWER, "generated_text"]
    assert found["label"].tolist()[0] == -1 and np.isnan(found["score"][0]) and found["probabilities"][0] == []
    assert found["generated_text"][0] == scorer.texts(predictor.samples(rows))[0]
    assert pd.isna(found["generated_text"][1]) and 0 < found["score"][1] < 1
    assert (found["label"][2], found["label_word"][2], found["score"][2]) == (-1, "", 0.0)  # no word of its choices
    assert isinstance(found["generated_text"][2], str)
