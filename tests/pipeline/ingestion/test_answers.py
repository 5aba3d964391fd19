"""Records that bring texts as answers, through ingestion."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from jsonschema import Draft202012Validator

from pipeline.contracts import TaskSpec
from pipeline.ingestion import DataConfig, prepare
from pipeline.ingestion.schemas import record_schema
from pipeline.record import Rejected, answers_of
from pipeline.shard_index import ShardIndex, index_path
from pipeline.stream import read_split
from tests.pipeline.ingestion.foreign_tars import write_tar

SPEC = TaskSpec(name="colour", kind="generation", template="{text}\nColour:")


def _prepared(folder: Path, records: dict[str, list[dict[str, Any]]], **more: Any) -> Any:
    for split, rows in records.items():
        path = folder / "in" / "colour" / f"{split}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = DataConfig(source="records", root=str(folder / "in"), max_rejected_share=1, **more)
    return prepare(config, [SPEC], folder / "out", seed=0)


def test_one_answer_or_several_come_back_as_they_were_in_every_split(tmp_path: Path) -> None:
    train = [{"id": "a", "text": "a red ball", "answer": " red "}, {"id": "b", "text": "7 of 9", "answer": 7}]
    manifest = _prepared(
        tmp_path, {"train": train, "test": [{"id": "c", "text": "a sky", "answer": ["blue", "light blue"]}]}
    )
    assert [s.answers for s in read_split(tmp_path / "out", "train")] == [("red",), ("7",)]
    assert [s.answers for s in read_split(tmp_path / "out", "test")] == [("blue", "light blue")]
    assert {count for shard in manifest.shards for count in shard.label_counts} == {"0"}


@pytest.mark.parametrize("answer", [None, "", "  ", [], ["red", ""], ["red", ["blue"]], {"a": 1}, "\ud800"])
def test_an_answer_that_is_no_text_is_rejected(answer: Any) -> None:
    with pytest.raises(Rejected):
        answers_of({"answer": answer}, SPEC)


def test_different_answers_to_one_text_are_kept_and_equal_ones_once(tmp_path: Path) -> None:
    rows = [{"id": f"r{i}", "text": "a ball", "answer": answer} for i, answer in enumerate(["red", "blue", "red"])]
    _prepared(tmp_path, {"train": rows, "test": [{"id": "t", "text": "a sky", "answer": "blue"}]})
    assert [s.answers[0] for s in read_split(tmp_path / "out", "train")] == ["red", "blue"]


def test_a_text_in_train_and_test_is_overlap_whatever_its_answers(tmp_path: Path) -> None:
    rows = [{"id": "a", "text": "a ball", "answer": "red"}, {"id": "b", "text": "a sky", "answer": "blue"}]
    _prepared(tmp_path, {"train": rows, "test": [{"id": "t", "text": "a ball", "answer": "green"}]})
    assert [s.key for s in read_split(tmp_path / "out", "train")] == ["b"]


def test_the_length_that_samples_are_grouped_by_holds_the_learned_answer(tmp_path: Path) -> None:
    rows = [{"id": "a", "text": "a ball", "answer": ["red", "not counted"]}]
    manifest = _prepared(tmp_path, {"train": rows, "test": rows}, overlap="keep")
    (shard,) = manifest.shards_of("colour", "train")
    index = ShardIndex.from_bytes((tmp_path / "out" / index_path(shard.path)).read_bytes(), shard.path)
    assert index.lengths.tolist() == [len("a ball\nColour:red")]


def test_a_schema_takes_what_ingestion_takes() -> None:
    schema = Draft202012Validator(record_schema(SPEC))
    for answer in ("red", 7, ["red", "blue"]):
        assert schema.is_valid({"text": "x", "answer": answer})
    for answer in ("", [], ["red", " "]):
        assert not schema.is_valid({"text": "x", "answer": answer})


def test_adopted_tars_bring_answers(tmp_path: Path) -> None:
    for split in ("train", "test"):
        content = json.dumps({"text": f"a ball of {split}", "answer": ["red", "crimson"]}).encode()
        write_tar(tmp_path / f"{split}.tar", [("one.json", content)])
    config = DataConfig(
        source="webdataset",
        root=str(tmp_path),
        files={"colour": {"train": "train.tar", "test": "test.tar"}},
    )
    manifest = prepare(config, [SPEC], tmp_path / "out", seed=0)
    assert [s.answers for s in read_split(tmp_path / "out", "test")] == [("red", "crimson")]
    assert {count for shard in manifest.shards for count in shard.label_counts} == {"0"}
