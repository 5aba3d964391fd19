"""Columns as they are: records under other names, nested ones, labels in the words of others."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from pipeline.contracts import ShardManifest, TaskSpec
from pipeline.errors import InputError
from pipeline.ingestion import DataConfig, prepare
from pipeline.labels import read_label
from pipeline.record import Rejected, renamed
from pipeline.stream import read_split

WORDS = (" no", " yes")
ROWS = [{"id": f"r{n}", "text_a": f"text {n}", "label": n % 2, "date": f"2026-01-0{n % 9 + 1}"} for n in range(20)]
THEIRS = {"id": "Row Id", "text_a": "Product Title", "label": "relevance.gold", "date": "when"}


def task(**more: Any) -> TaskSpec:
    return TaskSpec.model_validate({"name": "t", "template": "{text_a}:", "label_words": WORDS, **more})


def prepared(folder: Path, rows: list[dict[str, Any]], spec: TaskSpec, form: str = "jsonl", **data: Any) -> Path:
    """Prepare rows and return the folder of the shards."""
    (folder / "in" / "t").mkdir(parents=True)
    path = folder / "in" / "t" / f"train.{form}"
    if form == "jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif form == "csv":
        pd.DataFrame(rows).to_csv(path, index=False)
    else:
        pq.write_table(pa.Table.from_pylist(rows), path)
    config = DataConfig(source="records", root=str(folder / "in"), max_rejected_share=0.5, **data)
    prepare(config, [spec], folder / "out", seed=0)
    return folder / "out"


def shards_of(folder: Path) -> dict[str, str]:
    return {shard.path: shard.sha256 for shard in ShardManifest.read(folder / "manifest.json").shards}


@pytest.mark.parametrize("form", ["jsonl", "csv", "parquet"])
def test_columns_give_the_shards_of_a_file_that_was_renamed_first(tmp_path: Path, form: str) -> None:
    theirs = [{THEIRS[field]: value for field, value in row.items()} for row in ROWS]
    own = prepared(tmp_path / "own", ROWS, task(), form)
    of_task = prepared(tmp_path / "task", theirs, task(columns=THEIRS), form)
    of_data = prepared(tmp_path / "data", theirs, task(), form, columns=THEIRS)
    assert shards_of(own) == shards_of(of_task) == shards_of(of_data)


@pytest.mark.parametrize("form", ["jsonl", "parquet"])
def test_dotted_paths_reach_into_nested_values(tmp_path: Path, form: str) -> None:
    nested = [
        {
            "meta": {"id": row["id"], "when": row["date"], "more": "unread"},
            "products": [{"title": row["text_a"]}],
            "relevance": {"gold": row["label"]},
        }
        for row in ROWS
    ]
    columns = {"id": "meta.id", "text_a": "products.0.title", "label": "relevance.gold", "date": "meta.when"}
    own = prepared(tmp_path / "own", ROWS, task(), form)
    assert shards_of(prepared(tmp_path / "nested", nested, task(columns=columns), form)) == shards_of(own)


_NAMES = st.sampled_from(["a", "b", "c", "text", "A title", "x.y"])


@given(
    record=st.dictionaries(_NAMES, st.integers()),
    columns=st.dictionaries(_NAMES, _NAMES),
)
def test_renaming_a_record_is_renaming_its_columns(record: dict[str, int], columns: dict[str, str]) -> None:
    before = dict(record)
    found = renamed(record, columns)
    assert record == before
    for field in {*record, *columns}:
        source = columns.get(field, field)
        assert found.get(field) == record.get(source)
        assert (field in found) == (source in record)


def test_fields_may_change_places_and_one_column_may_feed_two() -> None:
    record = {"a": 1, "b": {"c": [10, {"d": 20}]}}
    assert renamed({"a": 1, "b": 2}, {"a": "b", "b": "a"}) == {"a": 2, "b": 1}
    assert renamed(record, {"x": "a", "y": "a", "z": "b.c.1.d"}) == {**record, "x": 1, "y": 1, "z": 20}
    assert "w" not in renamed(record, {"w": "b.c.7"})


def test_records_that_name_their_task_are_read_by_that_tasks_columns(tmp_path: Path) -> None:
    one, other = task(name="one", columns={"text_a": "title"}), task(name="other", columns={"text_a": "body"})
    rows = [{"kind": "one", "title": "first", "body": "unread", "label": 0}, {"kind": "other", "body": "b", "label": 1}]
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = DataConfig(source="records", root=str(tmp_path / "in"), columns={"task": "kind"})
    prepare(config, [one, other], tmp_path / "out", seed=0)
    found = {sample.task: sample.fields for sample in read_split(tmp_path / "out", "train")}
    assert found == {"one": {"text_a": "first"}, "other": {"text_a": "b"}}


def test_a_missing_column_is_said_with_the_nearest_one(tmp_path: Path) -> None:
    rows = [{"Product Title ": row["text_a"], "text_a": "not this one", "label": 0} for row in ROWS]
    with pytest.raises(InputError, match=r"for 'Product Title' did you mean 'Product Title '\?"):
        prepared(tmp_path, rows, task(columns={"text_a": "Product Title"}))


def test_a_rejected_record_is_kept_under_its_own_columns(tmp_path: Path) -> None:
    theirs = [{THEIRS[field]: value for field, value in row.items()} for row in ROWS] + [
        {"Product Title": "unlabelled"}
    ]
    folder = prepared(tmp_path, theirs, task(columns=THEIRS))
    (kept,) = folder.glob("quarantine/*.gz")
    assert json.loads(gzip.decompress(kept.read_bytes()))["record"] == {"Product Title": "unlabelled"}


def test_a_field_that_nothing_reads_cannot_be_mapped(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"did you mean 'text_a'\?"):
        prepared(tmp_path / "1", ROWS, task(columns={"text_aa": "x"}))
    with pytest.raises(InputError, match=r"data\.columns must map fields that are read"):
        prepared(tmp_path / "2", ROWS, task(), columns={"colour": "x"})


def test_what_is_mapped_decides_whether_shards_stand(tmp_path: Path) -> None:
    digests = {
        ShardManifest.read(prepared(tmp_path / str(n), ROWS, spec, **data) / "manifest.json").source_sha256
        for n, (spec, data) in enumerate(
            [
                (task(), {}),
                (task(label_map={"0": 1, "1": 0}), {}),
                (task(columns={"text_a": "id"}), {}),
                (task(), {"columns": {"date": "id"}}),
                (task(), {"csv": {"delimiter": ";"}}),
            ]
        )
    }
    assert len(digests) == 5


def test_weights_of_classes_leave_the_shards_as_they_are(tmp_path: Path) -> None:
    folder = prepared(tmp_path, ROWS, task())
    manifest = ShardManifest.read(folder / "manifest.json")
    config = DataConfig(source="records", root=str(tmp_path / "in"), max_rejected_share=0.5)
    assert prepare(config, [task(class_weights={"yes": 3})], folder, seed=0) == manifest


@pytest.mark.parametrize("form", ["jsonl", "csv", "parquet"])
def test_labels_are_mapped_whatever_the_file(tmp_path: Path, form: str) -> None:
    spec = task(label_map={"Exact": 1, "Substitute": "yes", "Irrelevant": "no", "no": 0})
    labels = ["Exact", "Substitute", "Irrelevant", "no", "Other"] * 4
    rows = [{**row, "label": label} for row, label in zip(ROWS, labels, strict=True)]
    folder = prepared(tmp_path, rows, spec, form)
    assert [sample.label for sample in read_split(folder, "train")] == [1, 1, 0, 0] * 4
    (rejected,) = ShardManifest.read(folder / "manifest.json").rejected
    assert (rejected.reason, rejected.records) == ("label 'label' is not in label_map", 4)


@pytest.mark.parametrize(
    ("value", "expected"),
    [(1, 0), ("1", 0), (1.0, 0), ("1.0", 0), (True, 1), ("true", 1), ("True", 1), ("TRUE", 1), (" yes ", 1), (-2.5, 0)],
)
def test_a_label_is_taken_by_its_text_else_as_the_same_number(value: Any, expected: int) -> None:
    spec = task(label_map={1: 0, "true": 1, "yes": 1, "-2.50": 0})
    assert read_label({"label": value}, spec, ()) == expected


@pytest.mark.parametrize("value", [0, "2", False, "YES", None, "", [1], float("nan")])
def test_a_label_that_is_not_listed_is_rejected(value: Any) -> None:
    with pytest.raises(Rejected, match=r"label 'label' is (not in label_map|missing)"):
        read_label({"label": value}, task(label_map={1: 0, "true": 1, "yes": 1}), ())


def test_codes_that_are_one_number_are_told_apart_by_their_texts() -> None:
    spec = task(label_map={"01": 0, "1": 1})
    assert [read_label({"label": value}, spec, ()) for value in ("01", "1", 1)] == [0, 1, 1]
    with pytest.raises(Rejected):
        read_label({"label": "1.0"}, spec, ())


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"label_map": {False: 0, "yes": 1}}, "YAML reads bare no, off and false as that"),
        ({"label_map": {None: 0}}, "YAML reads bare null"),
        ({"label_map": {"Exact": True}}, "write the class's index, or its word in quotes"),
        ({"label_map": {"Exact": 2}}, "is no index within 0 to 1"),
        ({"label_map": {"Exact": "maybe"}}, "is none of the label words"),
        ({"label_map": {1: 0, "1": 1}}, "keys must differ as texts"),
        ({"class_weights": {True: 2}}, "YAML reads bare yes, on and true as that"),
        ({"class_weights": {"maybe": 2}}, "must name one of the classes"),
        ({"class_weights": {"yes": 2, 1: 3}}, "must name class 1 once"),
        ({"class_weights": {"yes": 0}}, "greater than 0"),
        ({"label_words": (" 1", " 0"), "class_weights": {"1": 2}}, "say labels_are"),
        ({"kind": "choice", "label_words": (), "class_weights": {0: 2}}, "a choice task has no classes to weigh"),
    ],
)
def test_maps_and_weights_that_mean_nothing_are_refused(more: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        task(**more)


def test_class_weights_are_read_by_word_and_by_index_and_between_two_classes() -> None:
    assert task(class_weights={"yes": 3}).loss_weights() == task(class_weights={1: 3}).loss_weights() == (1.0, 3.0)
    assert [task(class_weights={"yes": 3}).loss_weight(label) for label in (0, 1)] == [1.0, 3.0]
    stars = task(kind="ordinal", label_words=(" 1", " 3", " 2"), label_values=(1, 3, 2), class_weights={3: 5})
    assert [stars.loss_weight(label) for label in (1, 2, 2.5, 3)] == [1.0, 1.0, 3.0, 5.0]


def test_a_spec_without_them_is_written_as_earlier_releases_wrote_it() -> None:
    assert not {"columns", "label_map", "class_weights"} & task().model_dump(mode="json").keys()
    assert not {"columns", "csv"} & DataConfig().model_dump(mode="json").keys()
