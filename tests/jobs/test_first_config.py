"""A first configuration from a look at the data: what it proposes can be read, and fits the data."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from jobs.config import load_config
from jobs.first_config import first_config
from pipeline.contracts import TaskSpec
from pipeline.errors import InputError
from pipeline.ingestion import prepare
from tests.jobs.test_cli import Run, mtl_lora  # noqa: F401 - a fixture
from tests.pipeline.ingestion.foreign_tars import JPEG, members_of, texts, write_shards, write_tar

SHARED = Path(__file__).resolve().parents[3] / "shared" / "data"
MANY = range(80)


def _task(folder: Path, records: list[dict[str, Any]], name: str = "train.jsonl") -> TaskSpec:
    """Propose a configuration for records, prepare them by it, and return the task as it was understood."""
    data = folder / "data"
    (data / "t").mkdir(parents=True)
    path = data / "t" / name
    if name.endswith(".jsonl"):
        path.write_text("".join(json.dumps(record) + "\n" for record in records))
    elif name.endswith(".csv"):
        pd.DataFrame(records).to_csv(path, index=False)
    else:
        pd.DataFrame(records).to_parquet(path)
    (folder / "c.yaml").write_text(first_config(data))
    config = load_config(folder / "c.yaml", [f"run_root={folder}/runs"])
    manifest = prepare(config.data, config.tasks, config.shards, 0)
    assert sum(shard.samples for shard in manifest.shards) == len(records)
    return config.tasks[0]


@pytest.mark.parametrize("name", ["train.jsonl", "train.csv", "train.parquet"])
def test_zeros_and_ones_are_a_binary_task_whatever_the_file(tmp_path: Path, name: str) -> None:
    task = _task(tmp_path, [{"id": f"r{i}", "text_a": f"a text {i}", "label": i % 2} for i in MANY], name)
    assert (task.kind, task.text_fields, task.label_words) == ("binary", ("text_a",), (" no", " yes"))


def test_words_are_the_label_words(tmp_path: Path) -> None:
    records = [{"message": f"a text {i}", "class": ("ham", "spam", "offer")[i % 3]} for i in MANY]
    task = _task(tmp_path, records)
    assert (task.kind, task.label_field) == ("multiclass", "class")
    assert task.label_words == (" ham", " offer", " spam")


def test_a_field_that_names_the_classes_gives_their_words(tmp_path: Path) -> None:
    names = ("music", "travel", "home")
    records = [{"text": f"a text {i}", "label": i % 3, "label_name": names[i % 3]} for i in MANY]
    task = _task(tmp_path, records)
    assert task.label_words == (" music", " travel", " home")
    assert task.text_fields == ("text",)


def test_choices_and_their_answer(tmp_path: Path) -> None:
    records = [{"question": f"what is {i}?", "choices": ["one", "two"], "answer": i % 2} for i in MANY]
    task = _task(tmp_path, records)
    assert (task.kind, task.label_field) == ("choice", "answer")


def test_numbers_between_whole_ones_are_ordinal(tmp_path: Path) -> None:
    task = _task(tmp_path, [{"text_a": f"a {i}", "text_b": f"b {i}", "score": i % 26 / 5} for i in MANY])
    assert (task.kind, task.label_values) == ("ordinal", (0.0, 1.0, 2.0, 3.0, 4.0, 5.0))
    assert task.text_fields == ("text_a", "text_b")


def test_texts_of_their_own_are_answers_that_the_model_writes(tmp_path: Path) -> None:
    records = [{"question": f"who wrote book {i}?", "response": f"it was author number {i}"} for i in range(250)]
    task = _task(tmp_path, records)
    assert (task.kind, task.label_field, task.text_fields) == ("generation", "response", ("question",))
    assert task.generation.max_new_tokens == 16


def test_data_without_a_label_is_refused_with_its_fields(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_text("".join(json.dumps({"id": i, "text": f"text {i}"}) + "\n" for i in range(900)))
    with pytest.raises(InputError, match=r"one of the fields must be a label, none of \['id', 'text'\]"):
        first_config(tmp_path / "x.jsonl")
    with pytest.raises(InputError, match="must be a record file or hold some"):
        first_config(tmp_path / "nowhere")


@pytest.mark.skipif(not SHARED.is_dir(), reason="no real data beside the repository")
@pytest.mark.parametrize("suite", ["ads", "glue", "commonsense", "reviews"])
def test_every_task_of_a_real_suite_gets_a_configuration_that_loads(tmp_path: Path, suite: str) -> None:
    (tmp_path / "c.yaml").write_text(first_config(SHARED / suite))
    tasks = {task.name: task for task in load_config(tmp_path / "c.yaml").tasks}
    known = json.loads((SHARED / "manifest.json").read_text())
    assert set(tasks) == {path.name for path in (SHARED / suite).iterdir()}
    assert known
    if suite == "ads":
        assert len(tasks["banking_intent"].label_words) == 77
        assert tasks["offer_match_software"].text_fields == ("text_a", "text_b")


def test_init_writes_a_new_file_only(mtl_lora: Run, tmp_path: Path) -> None:  # noqa: F811
    data = tmp_path / "clicks-train.jsonl"
    data.write_text("".join(json.dumps({"text": f"text {i}", "label": i % 2}) + "\n" for i in MANY))
    out = str(tmp_path / "c.yaml")
    assert mtl_lora("init", str(data), "--out", out).code == 0
    refused = mtl_lora("init", str(data), "--out", out)
    assert refused.code == 2
    assert "give --force to write over it" in refused.err
    printed = mtl_lora("init", str(data))
    assert printed.out == Path(out).read_text()
    assert "add test: FILE" in printed.out


@pytest.mark.parametrize(
    ("names", "splits"),
    [
        (["train", "dev"], {"train": "train", "test": "dev"}),
        (["train", "dev", "test"], {"train": "train", "validation": "dev", "test": "test"}),
        (["train", "val", "eval"], {"train": "train", "validation": "val", "test": "eval"}),
    ],
)
def test_no_split_hides_another_one(tmp_path: Path, names: list[str], splits: dict[str, str]) -> None:
    (tmp_path / "t").mkdir()
    for name in names:
        rows = [{"text": f"{name} {i}", "label": i % 2} for i in MANY]
        (tmp_path / "t" / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "c.yaml").write_text(first_config(tmp_path))
    found = load_config(tmp_path / "c.yaml").data.files["t"]
    assert found == {split: f"t/{name}.jsonl" for split, name in splits.items()}


@pytest.mark.parametrize("encoding", ["utf-8", "utf-16"])
@pytest.mark.parametrize("separator", [";", "\t"])
def test_csv_in_another_dialect_is_proposed_as_it_is_read(tmp_path: Path, separator: str, encoding: str) -> None:
    (tmp_path / "t").mkdir()
    frame = pd.DataFrame([{"text": f"Größe {i}, rot", "label": i % 2} for i in MANY])
    frame.to_csv(tmp_path / "t" / "train.csv", sep=separator, index=False, encoding=encoding)
    (tmp_path / "c.yaml").write_text(first_config(tmp_path))
    config = load_config(tmp_path / "c.yaml", [f"run_root={tmp_path}/runs"])
    assert config.tasks[0].text_fields == ("text",)
    assert sum(shard.samples for shard in prepare(config.data, config.tasks, config.shards, 0).shards) == len(MANY)


def test_csv_whose_encoding_must_be_told_is_said_with_its_readings(tmp_path: Path) -> None:
    frame = pd.DataFrame([{"text": f"Größe {i}", "label": i % 2} for i in MANY])
    frame.to_csv(tmp_path / "train.csv", index=False, encoding="cp1252")
    with pytest.raises(InputError, match=r"not UTF-8: .*'Größe' in cp1252"):
        first_config(tmp_path)


def _understood(folder: Path) -> dict[str, Any]:
    """Propose a configuration for a folder of tars and adopt them by it; return files and samples by split."""
    (folder / "c.yaml").write_text(first_config(folder / "data"))
    config = load_config(folder / "c.yaml", [f"run_root={folder}/runs"])
    assert config.data.source == "webdataset"
    manifest = prepare(config.data, config.tasks, config.shards, 0)
    samples = {split: manifest.samples_of(config.tasks[0].name, split) for split in ("train", "test")}
    return {"files": config.data.files, "task": config.tasks[0], **samples}


def test_a_folder_of_tars_is_adopted_with_its_tasks_and_splits(tmp_path: Path) -> None:
    write_shards(tmp_path / "data" / "spam-train-%04d.tar", texts(40), 10)
    write_tar(tmp_path / "data" / "spam-test.tar", members_of(texts(8, start=100)))
    found = _understood(tmp_path)
    assert found["files"] == {"spam": {"train": "spam-train-{0000..0003}.tar", "test": "spam-test.tar"}}
    assert (found["train"], found["test"]) == (40, 8)
    task = found["task"]
    assert (task.text_fields, task.label_field, task.label_words) == (("txt",), "cls", (" no", " yes"))


def test_nested_tars_of_several_members_a_sample_are_adopted_by_their_folders(tmp_path: Path) -> None:
    rows = [
        {
            "__key__": f"x/{i}",
            "json": {"title": f"a title {i}", "label": ("ham", "spam")[i % 2]},
            "jpg": JPEG,
            "npy": b"\x93",
        }
        for i in range(40)
    ]
    for number, some in ((0, rows[:20]), (7, rows[20:])):
        write_tar(tmp_path / "data" / "mail" / "train" / f"part-{number}.tar", members_of(some))
    (tmp_path / "data" / "mail" / "train" / "part-8.tar").write_bytes(b"no tar")
    found = _understood(tmp_path)
    assert found["files"] == {"mail": {"train": "mail/train/part-[0-9]*.tar"}}
    assert found["train"] == 40
    assert (found["task"].text_fields, found["task"].image_field) == (("title",), "jpg")
    assert found["task"].label_words == (" ham", " spam")


def test_tars_without_samples_are_refused(tmp_path: Path) -> None:
    write_tar(tmp_path / "data" / "train.tar", [])
    with pytest.raises(InputError, match="must hold tars with readable samples"):
        first_config(tmp_path / "data")
