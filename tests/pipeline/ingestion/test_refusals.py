"""A refusal leads to the cause: what the file is, what it has instead, which rule emptied it."""

from __future__ import annotations

import csv
import gzip
import io
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.contracts import TaskSpec
from pipeline.errors import InputError
from pipeline.ingestion import DataConfig, prepare
from pipeline.stream import read_split

SPEC = TaskSpec(name="t", template="{text}:", label_words=(" no", " yes"))
ROWS = [{"id": f"r{n}", "text": f"sample text {n}", "label": n % 2} for n in range(20)]
JSONL = "".join(json.dumps(row) + "\n" for row in ROWS)


def as_csv(header: str, separator: str = ",") -> str:
    return "\n".join([header, *(separator.join(map(str, row.values())) for row in ROWS), ""])


def as_parquet(table: pa.Table) -> bytes:
    file = io.BytesIO()
    pq.write_table(table, file)
    return file.getvalue()


def prepared(root: Path, inputs: dict[str, bytes | str], spec: TaskSpec = SPEC, **more: Any) -> list[Any]:
    for name, data in inputs.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data.encode() if isinstance(data, str) else data)
    config = DataConfig.model_validate({"source": "records", "root": str(root), **more})
    prepare(config, [spec], root.parent / "out", seed=0)
    return list(read_split(root.parent / "out", "train"))


@pytest.mark.parametrize(
    ("name", "data", "cause"),
    [
        ("csv", as_csv("id;text;label", ";"), r"has the fields \['id;text;label'\]; its fields are separated by ';'"),
        ("csv", as_csv("id\ttext\tlabel", "\t"), r"its fields are separated by '\\t': write them with commas"),
        ("csv", as_csv("id, text, label"), r"for 'text' did you mean ' text'\? .* take the space out of"),
        ("csv", as_csv("id,Text,label"), r"for 'text' did you mean 'Text'\?"),
        ("csv", as_csv("id,texts,label"), r"for 'text' did you mean 'texts'\?"),
        ("csv", as_csv("id,text,lable"), r"for 'label' did you mean 'lable'\?"),
        ("csv.gz", gzip.compress(as_csv("id;text;label", ";").encode()), "its fields are separated by ';'"),
        ("csv", as_csv("id,texts,label").encode("utf-16"), r"for 'text' did you mean 'texts'\?"),
        ("jsonl", b"\0" * 100, "the file is no text: it is full of NUL bytes"),
        ("csv", b"sep=;\n" + as_csv("id;text;label", ";").encode(), "CSV with a line sep= before its header"),
        ("csv", b"BZh91AY" + b"\xff" * 100, "compressed with bzip2"),
        ("csv", b"id,text,label\n" + "1,Größe,0\n".encode("cp1252") * 9, r"'Größe' in cp1252 .*: data\.csv\.enc"),
        ("jsonl", b'{"text": "caf\xe9"}\n' * 9, r"'café' in cp1252 and cp1250.*: data\.json_enc"),
        ("csv", gzip.compress(as_csv("id,text,label").encode()), r"compressed with gzip; name it \.gz"),
        ("csv", b"PK\x03\x04\xff" + b"\0" * 100, "a zip archive or a spreadsheet"),
        ("jsonl", b"\x28\xb5\x2f\xfd" + b"\xff" * 100, "compressed with zstd"),
        ("jsonl.gz", b"\x28\xb5\x2f\xfd" + b"\xff" * 100, "compressed with zstd"),
        ("jsonl", b"\xfd7zXZ\0" + b"\xff" * 100, "compressed with xz"),
        ("jsonl", json.dumps(ROWS).encode("utf-16"), "the file is one JSON array; write one JSON object a line"),
        ("jsonl", json.dumps(ROWS), "the file is one JSON array; write one JSON object a line"),
        ("jsonl", json.dumps(ROWS, indent=2), "the file is one JSON array; write one JSON object a line"),
        ("jsonl", json.dumps(ROWS[0], indent=2), "JSON over several lines; write one JSON object a line"),
        ("jsonl", as_csv("id,text,label"), r"not JSON; a file with a header and commas is named \.csv"),
        ("jsonl", JSONL.replace('"text"', '"texts"'), r"for 'text' did you mean 'texts'\?"),
        ("jsonl", JSONL.replace('"label"', '"lable"'), r"for 'label' did you mean 'lable'\?"),
        ("jsonl", gzip.compress(JSONL.encode()), r"compressed with gzip; name it \.gz"),
        ("parquet", as_parquet(pa.table({"texts": ["a"], "label": [1]})), r"for 'text' did you mean 'texts'\?"),
        ("parquet", as_csv("id,text,label"), "the file is not Parquet, by its first bytes"),
    ],
)  # fmt: skip
def test_a_refused_file_is_said_with_its_fields_and_what_it_is(
    tmp_path: Path, name: str, data: bytes | str, cause: str
) -> None:
    with pytest.raises(InputError, match=cause):
        prepared(tmp_path / "in", {f"t/train.{name}": data})


@pytest.mark.parametrize("name", ["csv", "parquet", "jsonl"])
def test_a_name_twice_is_refused(tmp_path: Path, name: str) -> None:
    if name == "jsonl":
        lines = [line[:-1] + f', "label": {1 - n % 2}}}' for n, line in enumerate(JSONL.splitlines())]
        with pytest.raises(InputError, match="20 of 20: 20 x line has a key twice"):
            prepared(tmp_path / "in", {"t/train.jsonl": "\n".join(lines)})
        return
    table = pa.Table.from_arrays([pa.array(["a"]), pa.array([1]), pa.array([0])], ["text", "label", "label"])
    data = as_parquet(table) if name == "parquet" else "text,label,label\na,1,0\n"
    with pytest.raises(InputError, match=r"\['label'\] more than once; rename one"):
        prepared(tmp_path / "in", {f"t/train.{name}": data})


@pytest.mark.parametrize("header", ["text,label, label", "\ufefftext,label,text", "text,note,note,label"])
def test_a_csv_name_twice_is_seen_through_spaces_and_in_fields_that_nobody_asks_for(
    tmp_path: Path, header: str
) -> None:
    with pytest.raises(InputError, match="more than once; rename one"):
        prepared(tmp_path / "in", {"t/train.csv": f"{header}\na,1,0,1\n"})


@pytest.mark.parametrize(
    "line",
    [
        '{"text": "a: \\"b\\": c", "label": 1, "other": {"x": 1, "x": 2}}',
        '{"text" : "a", "label" : 1, "label" : 0}',
        '{"text":"a","label":1,"text":"b"}',
        '{"text": "a", "label": 1, "other": [[{"x": {"y": 1, "\\u0079": 2}}]]}',
    ],
)
def test_a_json_key_twice_is_seen_at_any_depth_and_spelling(tmp_path: Path, line: str) -> None:
    good = '{"text": "it says \\"label\\": 1, \\"label\\": 2", "label": 1, "other": {"label": 2}}'
    samples = prepared(tmp_path / "in", {"t/train.jsonl": f"{good}\n{line}\n"}, max_rejected_share=0.5)
    assert [sample.fields["text"] for sample in samples] == ['it says "label": 1, "label": 2']


@pytest.mark.parametrize("folder", ["run[1]", "run*", "run?[!a]", "a[b]c*"])
@pytest.mark.parametrize("files", [{}, {"t": {"train": "t/train.jsonl"}}, {"t": {"train": "t/*.jsonl"}}])
def test_a_folder_with_the_signs_of_a_glob_is_none(tmp_path: Path, folder: str, files: dict[str, Any]) -> None:
    (tmp_path / "run1" / "t").mkdir(parents=True)
    (tmp_path / "run1" / "t" / "train.jsonl").write_text(JSONL * 2)
    samples = prepared(tmp_path / folder, {"t/train.jsonl": JSONL}, files=files)
    assert len(samples) == 20
    place = {"t": {"train": str(tmp_path / folder / "t" / "tra*.jsonl")}}
    assert len(prepared(tmp_path / folder, {}, files=place)) == 20


def test_a_file_with_the_signs_of_a_glob_is_itself_before_it_is_a_glob(tmp_path: Path) -> None:
    inputs: dict[str, bytes | str] = {"t/part[1].jsonl": JSONL, "t/part1.jsonl": JSONL.replace("sample", "other")}
    samples = prepared(tmp_path / "in", inputs, files={"t": {"train": "t/part[1].jsonl"}})
    assert samples[0].fields["text"] == "sample text 0"
    samples = prepared(tmp_path / "in", {}, files={"t": {"train": "t/part[0-9].jsonl"}})
    assert samples[0].fields["text"] == "other text 0"


@pytest.mark.parametrize("overlap", ["drop_train", "drop_evaluation"])
def test_the_same_file_as_train_and_test_is_refused_with_the_rule(tmp_path: Path, overlap: str) -> None:
    with pytest.raises(
        InputError, match=rf"data.overlap = '{overlap}' takes out .* here 20 of 20: is one file given as"
    ):
        prepared(tmp_path / "in", {"t/train.jsonl": JSONL, "t/test.jsonl": JSONL}, overlap=overlap)
    assert len(prepared(tmp_path / "in", {}, overlap="keep")) == 20


def test_a_field_with_a_space_in_its_name_is_read(tmp_path: Path) -> None:
    spec = TaskSpec(name="t", template="{Product Title}:", label_words=(" no", " yes"))
    samples = prepared(tmp_path / "in", {"t/train.csv": as_csv("id,Product Title,label")}, spec)
    assert samples[1].fields == {"Product Title": "sample text 1"}
    for template in ("{a.b}:", "{a[0]}:", "{a!r}:", "{a:>3}:", "{0}:", "{}:"):
        with pytest.raises(ValueError, match="template may name plain fields only"):
            TaskSpec(name="t", template=template, label_words=(" no", " yes"))


@pytest.mark.parametrize("field", ["text", "choices", "group", "id", "date"])
@pytest.mark.parametrize("value", ["\ud83d", "x\udfff", float("nan"), float("inf")])
def test_no_field_stores_half_a_character_or_what_is_missing(tmp_path: Path, field: str, value: Any) -> None:
    spec = TaskSpec(name="t", kind="choice", template="{text}:", group_field="group")
    good = {"text": "good", "choices": ["a", "b"], "answer": 0}
    bad = {"text": "a", "choices": ["a", "b"], "answer": 1, field: ["a", value] if field == "choices" else value}
    data = "".join(json.dumps(row) + "\n" for row in (good, bad))
    samples = prepared(tmp_path / "in", {"t/train.jsonl": data}, spec, max_rejected_share=1)
    stored = json.dumps([sample.model_dump() for sample in samples]).lower()
    assert not any(word in stored for word in ("nan", "inf", "\\ud83d", "\\udfff"))
    kept = field in ("id", "date") or (field == "group" and not isinstance(value, str))
    assert len(samples) == 1 + kept


@pytest.mark.parametrize("value", ["\ud83d", "x\udcff", "\0", "x" * 70_000, float("nan"), None, ["a"], 3])
def test_an_image_name_that_is_none_is_rejected(tmp_path: Path, value: Any) -> None:
    spec = SPEC.model_copy(update={"image_field": "image"})
    data = json.dumps({**ROWS[0], "image": value}) + "\n"
    with pytest.raises(InputError, match="1 of 1: 1 x image"):
        prepared(tmp_path / "in", {"t/train.jsonl": data}, spec)


def test_an_empty_group_is_none(tmp_path: Path) -> None:
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerows([["text", "label", "user"], ["a", 1, "u"], ["b", 0, ""]])
    spec = SPEC.model_copy(update={"group_field": "user"})
    assert [s.group for s in prepared(tmp_path / "in", {"t/train.csv": text.getvalue()}, spec)] == ["u", None]
