"""Batch scoring's files: each row once, in its place, however the input is cut, and never half a file."""

from __future__ import annotations

import csv
import datetime as dt
import gzip
import io
import json
import tarfile
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow.parquet as pq
import pytest

from pipeline.answer import answer_columns
from pipeline.contracts import Sample, TaskSpec
from pipeline.errors import InputError
from pipeline.ingestion import DataConfig
from pipeline.ingestion.shards import write_shard
from pipeline.serving import batch_input
from pipeline.serving.batch_input import InputFile, Reader, Stretch, check_task, find_files, scores_name
from pipeline.serving.batch_output import LIKELIHOODS, Output, ScoringPlan
from tests.pipeline.serving.null_model import TASKS, NullModel

ROWS = [
    {"id": f"r{i}", "task": ("clicks", "topic")[i % 2], "text": f"text {'x' * (i % 7)}", "day": i} for i in range(25)
]


def _write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        pd.DataFrame(rows).to_parquet(path)
    elif path.suffix == ".csv":
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    else:
        text = "".join(json.dumps(row) + "\n" for row in rows).encode()
        path.write_bytes(gzip.compress(text) if path.suffix == ".gz" else text)
    return path


def _score(output: Output, unit: int, file: InputFile, reader: Reader, done: frozenset[int] = frozenset()) -> int:
    number = 0
    for stretch in reader.stretches(unit, file, done):
        columns = list(zip(*NullModel().answer(Stretch.load(stretch.dump()).samples), strict=True)) or [()] * 5
        output.write_stretch(Stretch.load(stretch.dump()), dict(zip(output.answered, columns, strict=True)))
        number = stretch.number + 1
    return number


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.csv", "a.parquet"])
@pytest.mark.parametrize("stretch_rows", [1, 10, 1000])
def test_each_row_is_scored_once_in_its_place(
    name: str, stretch_rows: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batch_input, "STRETCH_ROWS", stretch_rows)
    _write(tmp_path / "in" / name, ROWS)
    (file,) = find_files(str(tmp_path / "in"))
    output = Output(str(tmp_path / "out"), ["day"])
    stretches = _score(output, 0, file, Reader(TASKS, None, ["day"]))
    assert stretches == -(-len(ROWS) // stretch_rows)
    assert output.join(0, file, stretches).rows == len(ROWS)
    found = pq.read_table(tmp_path / "out" / scores_name(name)).to_pylist()
    assert [row["id"] for row in found] == [row["id"] for row in ROWS]
    assert [row["day"] for row in found] == [str(row["day"]) for row in ROWS]
    assert [len(row["probabilities"]) for row in found] == [2 + i % 2 for i in range(len(ROWS))]
    assert len({row["row"] for row in found}) == len(ROWS)


def test_a_bad_row_goes_aside_with_its_number_and_reason(tmp_path: Path) -> None:
    rows = [*ROWS[:3], {"task": "clicks"}, {"task": "other", "text": "x"}, {"text": "y"}, *ROWS[3:5]]
    path = _write(tmp_path / "in/a.jsonl", rows)
    path.write_bytes(path.read_bytes() + b"{half\n")
    (file,) = find_files(str(path))
    output = Output(str(tmp_path / "out"), [])
    scored = output.join(0, file, _score(output, 0, file, Reader(TASKS, None, [])))
    assert scored.rows == 5 and sum(scored.reasons.values()) == 4
    lines = [json.loads(line) for line in (tmp_path / "out/_quarantine/a.jsonl.jsonl").read_text().splitlines()]
    assert [line["row"] for line in lines] == [4, 5, 6, 9]
    assert "field 'text' is missing" in lines[0]["reason"] and "names no task" in lines[1]["reason"]
    assert lines[1]["record"] == {"task": "other", "text": "x"}


def test_rows_without_a_task_take_the_one_that_was_named(tmp_path: Path) -> None:
    path = _write(tmp_path / "a.jsonl", [{"text": "x"}, {"text": "y", "task": "topic"}])
    (stretch,) = Reader(TASKS, "clicks", []).stretches(0, find_files(str(path))[0])
    assert [sample.task for sample in stretch.samples] == ["clicks", "topic"]
    with pytest.raises(InputError, match="--task must be one of the model's, got 'click'; did you mean 'clicks'"):
        check_task("click", TASKS)


def test_what_stands_is_left_out_but_for_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batch_input, "STRETCH_ROWS", 10)
    path = _write(tmp_path / "a.jsonl", ROWS)
    found = list(Reader(TASKS, None, []).stretches(0, find_files(str(path))[0], frozenset({0, 2})))
    assert [(stretch.number, stretch.is_last) for stretch in found] == [(1, False), (2, True)]
    assert [row[1] for row in found[0].rows] == [f"r{i}" for i in range(10, 20)]


def test_an_empty_file_has_scores_without_rows(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text("")
    (file,) = find_files(str(path))
    output = Output(str(tmp_path / "out"), ["day"])
    assert output.join(0, file, _score(output, 0, file, Reader(TASKS, None, ["day"]))).rows == 0
    assert pq.read_table(tmp_path / "out/a.parquet").column_names[-1] == "day"


def test_files_are_found_in_folders_and_by_globs_and_ours_are_passed_over(tmp_path: Path) -> None:
    for name in ("b/x.jsonl", "a/x.csv", "_work/y.jsonl", ".hidden.jsonl"):
        _write(tmp_path / name, ROWS[:1])
    assert [file.name for file in find_files(str(tmp_path))] == ["a/x.csv", "b/x.jsonl"]
    assert [file.name for file in find_files(f"{tmp_path}/*/x.csv")] == ["a/x.csv"]


@pytest.mark.parametrize(
    ("names", "words"),
    [
        ([], "found none at"),
        (["a.txt"], r"must end in one of .*, got .*a.txt"),
        (["a.csv", "a.jsonl"], r"several would be scored into \['a.parquet'\]"),
    ],
)
def test_an_input_that_cannot_be_scored_is_refused(names: list[str], words: str, tmp_path: Path) -> None:
    for name in names:
        _write(tmp_path / name, ROWS[:1])
    with pytest.raises(InputError, match=words):
        find_files(str(tmp_path))


def test_an_output_is_of_one_plan_and_of_nothing_else(tmp_path: Path) -> None:
    plan = ScoringPlan(model="models:/ads/3", input="in", task=None, keep=(), files=())
    output = Output(str(tmp_path / "out"), [])
    assert output.begin(plan) is None and output.begin(plan) is None
    with pytest.raises(InputError, match=r"differs in \['model'\] \(model there models:/ads/3, here models:/ads/4\)"):
        output.begin(plan.model_copy(update={"model": "models:/ads/4"}))
    manifest = output.finish(plan, [])
    assert output.begin(plan) == manifest
    (tmp_path / "other").mkdir()
    (tmp_path / "other/mine.txt").write_text("")
    with pytest.raises(InputError, match=r"must be a new folder, .* holds other files"):
        Output(str(tmp_path / "other"), []).begin(plan)


def test_rows_are_scored_under_the_columns_of_the_records(tmp_path: Path) -> None:
    tasks = [task.model_copy(update={"columns": {"text": "Their Text"}}) for task in TASKS]
    theirs = [{("Their Text" if field == "text" else field): value for field, value in row.items()} for row in ROWS]
    samples = []
    for rows, known in ((ROWS, TASKS), (theirs, tasks)):
        (file,) = find_files(str(_write(tmp_path / f"{len(samples)}" / "a.csv", rows)))
        (stretch,) = Reader(known, None, ["day"]).stretches(0, file)
        assert not stretch.rejected
        samples.append(stretch.samples)
    assert samples[0] == samples[1]


def test_the_samples_of_shards_are_scored_under_their_keys(tmp_path: Path) -> None:
    rows = [row | {"task": "clicks"} for row in ROWS]
    stored = [Sample(key=f"k{i}", task="clicks", fields={"text": row["text"]}, label=1) for i, row in enumerate(rows)]
    write_shard(tmp_path, "clicks", "test", 0, stored)
    with tarfile.open(tmp_path / "theirs.tar", "w") as tar:
        for i, row in enumerate(rows):
            for name, data in ((f"k{i}.txt", "no field of a task"), (f"k{i}.json", json.dumps(row | {"id": None}))):
                member = tarfile.TarInfo(name)
                member.size = len(data.encode())
                tar.addfile(member, io.BytesIO(data.encode()))
    found = []
    for file in find_files(f"{tmp_path}/*.tar"):
        (stretch,) = Reader(TASKS, None, []).stretches(0, file)
        assert not stretch.rejected
        samples = zip(stretch.rows, stretch.samples, strict=True)
        found.append([(row[1], sample.task, sample.fields) for row, sample in samples])
    assert found[0] == [(sample.key, sample.task, sample.fields) for sample in stored]
    assert found[1] == found[0]


def test_a_stretch_arrives_as_it_was_sent_with_its_images_and_what_was_put_aside() -> None:
    samples = [
        Sample(key="1", task="clicks", fields={"text": "a"}, label=0, image=b"\x89PNG"),
        Sample(key="2", task="topic", fields={"text": "\u6f22"}, label=0, choices=("x", "y"), weight=0.5),
    ]
    rejected = [(3, "field 'text' is missing", {"day": dt.date(2026, 1, 5), "image": b"\xff"})]
    stretch = Stretch(4, 2, True, 77, [(1, "r1", ["k"]), (2, None, [None])], samples, rejected)
    assert Stretch.load(stretch.dump()) == stretch


def test_what_explains_writes_a_column_more(tmp_path: Path) -> None:
    (file,) = find_files(str(_write(tmp_path / "a.jsonl", ROWS)))
    output = Output(str(tmp_path / "out"), ["day"], (*answer_columns(TASKS), LIKELIHOODS))
    (stretch,) = Reader(TASKS, None, ["day"]).stretches(0, file)
    answers = NullModel().explain(stretch.samples)
    output.write_stretch(stretch, dict(zip(output.answered, zip(*answers, strict=True), strict=True)))
    output.join(0, file, 1)
    table = pq.read_table(tmp_path / "out/a.parquet")
    assert table.column_names[-2:] == ["log_likelihoods", "day"]
    assert table["log_likelihoods"].to_pylist() == [answer[-1] for answer in answers]


def test_what_a_model_wrote_has_a_column_beside_the_kept_fields(tmp_path: Path) -> None:
    tasks = (*TASKS, TaskSpec(name="colour", kind="generation", template="{text}:"))
    _write(tmp_path / "in" / "a.jsonl", [{"task": "colour", "text": "a sky", "day": 1}, ROWS[0]])
    (file,) = find_files(str(tmp_path / "in"))
    names = answer_columns(tasks)
    output = Output(str(tmp_path / "out"), ["day"], names)
    (stretch,) = Reader(tasks, None, ["day"]).stretches(0, file)
    answers = [("colour", None, -1, "", [], "blue"), ("clicks", 0.5, 1, "yes", [0.5, 0.5], None)]
    output.write_stretch(stretch, dict(zip(names, zip(*answers, strict=True), strict=True)))
    output.join(0, file, 1)
    found = pq.read_table(tmp_path / "out" / scores_name("a.jsonl")).to_pylist()
    assert [row["generated_text"] for row in found] == ["blue", None]
    assert [row["score"] for row in found] == [None, 0.5]
    assert [row["day"] for row in found] == ["1", "0"]


def test_files_are_read_in_the_dialect_and_by_the_columns_that_are_told(tmp_path: Path) -> None:
    data = DataConfig.model_validate(
        {
            "source": "records",
            "root": ".",
            "csv": {"delimiter": ";", "encoding": "cp1252"},
            "columns": {"id": "Row Id", "kind": "Aufgabe"},
            "task_field": "kind",
        }
    )
    rows = [{**row, "text": f"Größe {row['text']}"} for row in ROWS]
    names = {"id": "Row Id", "task": "Aufgabe", "text": "Text", "day": "Tag"}
    theirs = [{names[field]: value for field, value in row.items()} for row in rows]
    path = tmp_path / "a.csv"
    pd.DataFrame(theirs).to_csv(path, sep=";", encoding="cp1252", index=False)
    (file,) = find_files(str(path))
    tasks = [task.model_copy(update={"columns": {"text": "Text"}}) for task in TASKS]
    (stretch,) = Reader(tasks, None, ["Tag"], data).stretches(0, file)
    (plain,) = Reader(TASKS, None, ["day"]).stretches(0, find_files(str(_write(tmp_path / "b.jsonl", rows)))[0])
    assert not stretch.rejected
    assert [(row[1], row[2]) for row in stretch.rows] == [(row[1], row[2]) for row in plain.rows]
    assert [sample.fields for sample in stretch.samples] == [sample.fields for sample in plain.samples]
    assert [sample.task for sample in stretch.samples] == [sample.task for sample in plain.samples]


def test_an_output_goes_on_only_as_its_files_were_read(tmp_path: Path) -> None:
    plan = ScoringPlan(model="m", input="in", task=None, keep=(), files=())
    assert "reading" not in plan.model_dump(mode="json", by_alias=True)
    output = Output(str(tmp_path / "out"), [])
    output.begin(plan)
    with pytest.raises(InputError, match=r"differs in \['reading'\]"):
        output.begin(plan.model_copy(update={"reading": {"csv": {"delimiter": ";"}}}))
