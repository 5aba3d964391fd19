"""One rule reads a label, whatever the source."""

from __future__ import annotations

import csv
import io
import json
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.contracts import TaskSpec
from pipeline.errors import InputError
from pipeline.ingestion import DataConfig, prepare
from pipeline.labels import read_label
from pipeline.record import Rejected
from pipeline.stream import read_split

STARS = (" 1", " 2", " 3", " 4", " 5")
FORMS = ("jsonl", "csv", "parquet")


def task(words: tuple[str, ...] = (" no", " yes"), **more: Any) -> TaskSpec:
    kind = "binary" if len(words) == 2 else "multiclass"
    return TaskSpec.model_validate({"name": "t", "kind": kind, "template": "{text}:", "label_words": words, **more})


def labels_from(form: str, folder: Path, spec: TaskSpec, labels: list[Any]) -> list[float]:
    """Write records in one form, prepare them and return the labels stored."""
    records = [{"text": f"text {n}", "label": label} for n, label in enumerate(labels)]
    path = folder / form / "t" / f"train.{form}"
    path.parent.mkdir(parents=True)
    if form == "jsonl":
        path.write_text("".join(json.dumps(record) + "\n" for record in records))
    elif form == "parquet":
        pq.write_table(pa.Table.from_pylist(records), path)
    else:
        text = io.StringIO()
        writer = csv.DictWriter(text, records[0].keys())
        writer.writeheader()
        writer.writerows(records)
        path.write_text(text.getvalue())
    config = DataConfig(source="records", root=str(folder / form))
    prepare(config, [spec], folder / form / "out", seed=0)
    return [sample.label for sample in read_split(folder / form / "out", "train")]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    ("labels_are", "values", "expected"),
    [
        ("word", [1, 2, 3, 4], [0, 1, 2, 3]),
        ("word", [1.0, 5.0], [0, 4]),
        ("word", ["1", "5"], [0, 4]),
        ("index", [1, 2, 3, 4], [1, 2, 3, 4]),
        ("index", ["0", "4"], [0, 4]),
        (None, [5, 5, 0], [4, 4, 0]),
    ],
)
def test_words_that_are_numbers_are_read_alike_from_every_source(
    tmp_path: Path, form: str, labels_are: str | None, values: list[Any], expected: list[int]
) -> None:
    assert labels_from(form, tmp_path, task(STARS, labels_are=labels_are), values) == expected


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    ("words", "value"),
    [
        (STARS, 3),
        (STARS, 1.0),
        (STARS, "2"),
        ((" 1", " 0"), 1),
        ((" 1.0", " 0.0"), 0),
        ((" True", " False"), True),
        ((" yes", " no"), False),
        ((" 1", " 0"), True),
    ],
)
def test_a_label_that_is_an_index_and_another_class_s_word_is_refused_until_the_task_says_which(
    tmp_path: Path, form: str, words: tuple[str, ...], value: Any
) -> None:
    with pytest.raises(InputError, match=r"line \d: task 't': .* say which in the task: labels_are: index, or labels"):
        labels_from(form, tmp_path, task(words), [value])
    read = {how: labels_from(form, tmp_path / how, task(words, labels_are=how), [value]) for how in ("index", "word")}
    assert read["index"] != read["word"]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("words", [(" no", " yes"), (" 0", " 1"), (" False", " True"), (" bad", " good")])
def test_truth_values_are_labels_in_every_source(tmp_path: Path, form: str, words: tuple[str, ...]) -> None:
    assert labels_from(form, tmp_path, task(words), [True, False, True]) == [1, 0, 1]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("values", [[float("nan")] * 3, [float("inf")] * 3, ["nan"] * 3, ["inf"] * 3, [""] * 3])
def test_a_label_that_is_no_finite_number_is_none(tmp_path: Path, form: str, values: list[Any]) -> None:
    for spec in (task(), task(STARS), task(kind="ordinal", label_values=(0, 1))):
        with pytest.raises(InputError, match=r"3 of 3: 3 x label 'label' is (missing|not a finite number)"):
            labels_from(form, tmp_path / f"{spec.kind}{len(spec.label_words)}", spec, values)


@pytest.mark.parametrize(
    ("choices", "answer", "expected"),
    [
        (["1", "3", "5", "7"], 3, 3),  # `answer` is an index where it is a number
        (["1", "27", "180"], "27", 1),
        (["a", "b"], "1", 1),
        (["a", "b"], "b", 1),
        (["no", "yes"], True, 1),
        (["1", "3", "5", "7"], "3", None),
        (["true", "false"], True, None),
    ],
)
def test_a_choice_s_number_is_its_index_and_a_text_that_could_be_both_is_refused(
    choices: list[str], answer: Any, expected: int | None
) -> None:
    spec = TaskSpec(name="t", kind="choice", template="{text}:")
    if expected is not None:
        assert read_label({"answer": answer}, spec, choices) == expected
        return
    with pytest.raises(InputError, match="say which in the task: labels_are"):
        read_label({"answer": answer}, spec, choices)


def test_an_ordinal_label_is_its_number_or_the_value_of_its_word() -> None:
    spec = task((" bad", " fair", " good"), kind="ordinal", label_values=(0, 5, 10))
    assert [read_label({"label": v}, spec, ()) for v in (7.5, "7.5", "good", Decimal("2.5"))] == [7.5, 7.5, 10, 2.5]
    shifted = task((" 1", " 2", " 3"), kind="ordinal", label_values=(0, 1, 2))
    with pytest.raises(InputError, match="say which in the task"):
        read_label({"label": 2}, shifted, ())
    assert read_label({"label": 2}, shifted.model_copy(update={"labels_are": "word"}), ()) == 1
    for value in (True, "true", 11, "nan"):
        with pytest.raises(Rejected):
            read_label({"label": value}, spec, ())


@pytest.mark.parametrize(
    "value", [np.int64(1), np.float32(1), np.bool_(True), Decimal("1"), Decimal("1.00"), b"1", b"yes"]
)
def test_labels_of_warehouse_types_are_read(value: Any) -> None:
    assert read_label({"label": value}, task(), ()) == 1


@pytest.mark.parametrize("value", [[1], {"a": 1}, 2, -1, 0.5, "1_0", "maybe", 10**400, b"\xff", Decimal("0.5")])
def test_what_is_neither_index_nor_word_is_rejected(value: Any) -> None:
    for spec in (task(), task(labels_are="word")):
        with pytest.raises(Rejected, match="label"):
            read_label({"label": value}, spec, ())


def test_a_task_that_leaves_the_reading_open_is_written_as_before() -> None:
    assert "labels_are" not in task().model_dump()
    assert task(labels_are="word").model_dump()["labels_are"] == "word"
