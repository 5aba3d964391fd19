"""What a task may say of answers that are written, and which texts answer a sample."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from pipeline.answer import answer_texts, written_class
from pipeline.contracts import Sample, TaskSpec
from pipeline.generation import GenerationConfig

CAPTION = {"name": "caption", "kind": "generation", "template": "{text}\nColour:"}
LABELS = {"name": "spam", "template": "{text}\nSpam:", "label_words": (" no", " yes")}
CHOICE = {"name": "quiz", "kind": "choice", "template": "{text}\nAnswer:", "answer_by": "generation"}


def test_a_task_without_written_answers_is_stored_as_it_was_before_there_were_any() -> None:
    assert not {"answer_by", "generation"} & TaskSpec(**LABELS).model_dump().keys()
    assert "answers" not in Sample(key="a", task="spam", fields={}, label=1).model_dump()


def test_a_generation_task_reads_the_answer_and_is_measured_by_its_tokens() -> None:
    spec = TaskSpec(**CAPTION)
    assert (spec.label_field, spec.metric, spec.is_written) == ("answer", "token_f1", True)
    written = TaskSpec(**LABELS, answer_by="generation")
    assert (written.label_field, written.metric, written.is_written) == ("label", "accuracy", True)


@pytest.mark.parametrize(
    ("values", "rule"),
    [
        ({**CAPTION, "label_words": (" a", " b")}, "has no classes, got ['label_words']"),
        ({**CAPTION, "answer_by": "scores"}, "got answer_by: scores"),
        ({**CAPTION, "length_normalized": True}, "got ['length_normalized']"),
        ({**LABELS, "answer_by": "generation", "length_normalized": True}, "got length_normalized"),
        ({**CAPTION, "metric": "auc"}, "metric of a generation task that is written must be one of ['bleu'"),
        ({**CAPTION, "generation": {"stop": [""]}}, "at least one character"),
        ({**LABELS, "generation": {"num_beams": 2}}, "add answer_by: generation"),
        ({**LABELS, "answer_by": "generation", "metric": "auc"}, "must be one of ['accuracy'"),
        ({**LABELS, "answer_by": "generation", "class_weights": {"yes": 2.0}}, "got class_weights"),
        (
            {**LABELS, "kind": "ordinal", "label_values": (0, 1), "answer_by": "generation"},
            "got kind: ordinal",
        ),
    ],
)
def test_what_contradicts_a_written_answer_is_refused(values: dict[str, Any], rule: str) -> None:
    with pytest.raises(ValidationError) as refusal:
        TaskSpec(**values)
    assert rule in str(refusal.value)


def test_shards_do_not_depend_on_how_answers_are_written() -> None:
    beams = GenerationConfig(num_beams=3)
    assert TaskSpec(**CAPTION, generation=beams).as_prepared() == TaskSpec(**CAPTION).as_prepared()
    assert TaskSpec(**LABELS, answer_by="generation").as_asked().answer_by == "scores"


def test_a_sample_is_answered_by_its_references_or_by_the_word_of_its_label() -> None:
    said = Sample(key="a", task="caption", fields={}, label=0, answers=("red", "dark red"))
    assert answer_texts(TaskSpec(**CAPTION), said) == ("red", "dark red")
    assert answer_texts(TaskSpec(**LABELS), Sample(key="a", task="spam", fields={}, label=1)) == ("yes",)
    chosen = Sample(key="a", task="quiz", fields={}, label=1, choices=("one", " two "))
    assert answer_texts(TaskSpec(**CHOICE), chosen) == ("two",)


def test_a_written_text_is_a_class_only_as_the_whole_word() -> None:
    words = (" no", " yes")
    assert [written_class(text, words) for text in ("Yes ", "no", "yes, it is", "")] == [1, 0, None, None]
