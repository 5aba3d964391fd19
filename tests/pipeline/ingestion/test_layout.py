"""The default layout: which file of a folder is which split of a task."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pipeline.contracts import TaskSpec
from pipeline.errors import InputError
from pipeline.ingestion import DataConfig
from pipeline.ingestion.sources import find_sources

TASK = TaskSpec(name="t", template="{text}:", label_words=(" no", " yes"))


def found(root: Path, names: list[str], folder: str = "t") -> list[tuple[str, str]]:
    for name in names:
        (root / folder / name).parent.mkdir(parents=True, exist_ok=True)
        (root / folder / name).write_text(json.dumps({"text": name, "label": 0}) + "\n")
    sources = find_sources(DataConfig(source="records", root=str(root)), [TASK])
    return [(source.split, source.name) for source in sources]


@pytest.mark.parametrize("name", ["validation", "valid", "val", "dev"])
@pytest.mark.parametrize("folder", ["t", "suite/t"])
def test_the_validation_split_goes_by_any_of_the_usual_names(tmp_path: Path, name: str, folder: str) -> None:
    names = ["train.jsonl", f"{name}.jsonl", "test.jsonl"]
    splits = ("train", "validation", "test")
    assert found(tmp_path, names, folder) == [(s, f"{folder}/{n}") for s, n in zip(splits, names, strict=True)]


def test_the_splits_of_mixed_files_are_found_as_those_of_tasks(tmp_path: Path) -> None:
    names = ["train.jsonl", "dev.jsonl"]
    assert found(tmp_path, names, ".") == [("train", "train.jsonl"), ("validation", "dev.jsonl")]


def test_validation_and_test_may_be_missing_and_train_may_not(tmp_path: Path) -> None:
    assert found(tmp_path / "1", ["train.csv"]) == [("train", "t/train.csv")]
    with pytest.raises(InputError, match=r"must have its train records in .*, found none of \['t/train.jsonl.gz', "):
        found(tmp_path / "2", ["test.csv"])


@pytest.mark.parametrize("other", ["dev.jsonl", "dev.csv.gz"])
def test_two_files_that_could_be_the_validation_split_are_refused(tmp_path: Path, other: str) -> None:
    with pytest.raises(
        InputError, match=r"split 'validation' of task 't' must have one name of .*name one in data\.files"
    ):
        found(tmp_path, ["train.jsonl", "valid.jsonl", other])


def test_a_task_in_two_folders_is_refused(tmp_path: Path) -> None:
    found(tmp_path, ["train.jsonl"], "one/t")
    with pytest.raises(InputError, match="must stand in one folder"):
        found(tmp_path, ["train.jsonl"], "two/t")


@pytest.mark.parametrize("name", ["train.tsv", "train.jsonl.zst", "train.CSV", "Train.csv"])
def test_a_file_of_another_ending_is_shown_where_its_split_is_missed(tmp_path: Path, name: str) -> None:
    with pytest.raises(InputError, match=rf"but \['.*{name}'\], whose name or ending is none of these: .* rename it"):
        found(tmp_path, [name])
