"""Text is read in the encoding it is in, or refused: never in another one."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from pipeline.contracts import TaskSpec
from pipeline.errors import InputError
from pipeline.ingestion import DataConfig, prepare
from pipeline.ingestion.encodings import HEAD_BYTES, AsUtf8, readings, text_encoding
from pipeline.ingestion.records import Unit, read_unit, split_units
from pipeline.ingestion.source_file import SourceFile
from pipeline.stream import read_split

WIDE = ["utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-32-le", "utf-32-be"]
BY_BYTES = ["utf-8", "utf-8-sig", *WIDE]
NARROW = ["cp1252", "latin-1", "cp1250", "iso8859-15", "mac-roman", "cp437"]
TEXTS = ["Größe für Mädchen", "être naïf", "plain", 'ñandú, "dice"', "two\nlines"]
CELL = st.text(st.characters(codec="utf-8", exclude_characters="\0\r"), max_size=12)
TASK = TaskSpec(name="t", template="{text}:", label_words=(" no", " yes"))


def written(texts: list[str], form: str, encoding: str) -> bytes:
    rows = [{"id": f"r{i}", "text": f"{i} {text}", "label": i % 2} for i, text in enumerate(texts)]
    if form == "csv":
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, ["id", "text", "label"])
        writer.writeheader()
        writer.writerows(rows)
        return text.getvalue().encode(encoding)
    if form == "json":
        return json.dumps(rows, ensure_ascii=False).encode(encoding)
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode(encoding)


def read(folder: Path, data: bytes, form: str, unit_bytes: int = 1 << 20, **config: Any) -> list[Any]:
    path = folder / f"train.{form}"
    path.write_bytes(data)
    source = SourceFile("t", "train", str(path), path.name, size=len(data))
    config = {"source": "records", "root": str(folder), **config}
    units: list[Unit] = split_units([source], unit_bytes)
    lines = [line for unit in units for line in read_unit(unit, DataConfig.model_validate(config))]
    assert not [line.error for line in lines if line.error]
    return [line.record["text"] for line in lines]


@pytest.mark.parametrize("form", ["csv", "jsonl", "json"])
@pytest.mark.parametrize("encoding", BY_BYTES)
@pytest.mark.parametrize("told", ["utf-8", "auto"])
def test_encodings_that_are_certain_need_not_be_told(tmp_path: Path, form: str, encoding: str, told: str) -> None:
    data = written(TEXTS, form, encoding)
    expected = [f"{i} {text}" for i, text in enumerate(TEXTS)]
    assert read(tmp_path, data, form, json_encoding=told, csv={"encoding": told}) == expected


@pytest.mark.parametrize("form", ["csv", "jsonl", "json"])
@pytest.mark.parametrize("encoding", NARROW)
def test_encodings_of_one_byte_are_read_where_they_are_told_and_else_refused(
    tmp_path: Path, form: str, encoding: str
) -> None:
    texts = [text for text in TEXTS if text.encode(encoding, "replace").decode(encoding) == text]
    data = written(texts, form, encoding)
    expected = [f"{i} {text}" for i, text in enumerate(texts)]
    assert read(tmp_path, data, form, json_encoding=encoding, csv={"encoding": encoding}) == expected
    with pytest.raises(InputError, match=r"found none of them: .* is .* in cp125.*; name the encoding: data"):
        read(tmp_path, data, form, json_encoding="auto", csv={"encoding": "auto"})


@given(texts=st.lists(CELL, min_size=1, max_size=5), encoding=st.sampled_from([*BY_BYTES, *NARROW]))
def test_no_bytes_are_taken_for_another_text(texts: list[str], encoding: str) -> None:
    data = written(texts, "jsonl", "utf-8").decode().encode(encoding, "ignore")
    try:
        found = text_encoding(data[:HEAD_BYTES], "auto", "rows.jsonl", "key")
    except InputError:
        assert encoding in NARROW
        return
    text = AsUtf8(io.BytesIO(data), found).read().decode().removeprefix("\ufeff")
    assert text == data.decode(encoding).removeprefix("\ufeff")


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-be", "utf-32", "utf-8"])
def test_a_file_is_read_once_however_it_is_cut_into_units(tmp_path: Path, encoding: str) -> None:
    texts = [f"text {'ö' * (i % 40)}" for i in range(500)]
    found = read(tmp_path, written(texts, "jsonl", encoding), "jsonl", unit_bytes=1000)
    assert found == [f"{i} {text}" for i, text in enumerate(texts)]


@given(data=st.binary(max_size=200), size=st.sampled_from([1, 3, 4096]))
def test_any_bytes_in_a_narrow_encoding_come_through_or_stay_no_utf8(data: bytes, size: int) -> None:
    file, found = AsUtf8(io.BytesIO(data), "cp1252"), b""
    while piece := file.read(size):
        found += piece
    assert found.decode("utf-8", "surrogateescape") == data.decode("cp1252", "surrogateescape")


def test_a_byte_that_an_encoding_lacks_costs_its_record_only(tmp_path: Path) -> None:
    path = tmp_path / "in" / "t" / "train.jsonl"
    path.parent.mkdir(parents=True)
    lines = written(TEXTS * 8, "jsonl", "cp1252").splitlines(keepends=True)
    path.write_bytes(b"".join([*lines, b'{"text": "\x81", "label": 1}\n']))
    config = DataConfig(source="records", root=str(tmp_path / "in"), json_encoding="cp1252")
    manifest = prepare(config, [TASK], tmp_path / "out", seed=0)
    assert [(reject.reason, reject.records) for reject in manifest.rejected] == [("line is not JSON", 1)]
    assert {sample.fields["text"] for sample in read_split(tmp_path / "out", "train")} >= {"0 Größe für Mädchen"}


@pytest.mark.parametrize("form", ["csv", "jsonl"])
def test_text_that_is_cut_off_within_a_sign_is_refused(tmp_path: Path, form: str) -> None:
    data = written(TEXTS, form, "utf-16")[:-1]
    with pytest.raises(InputError, match=r"must be text in data\.\w+[._]encoding utf-16, it is not"):
        read(tmp_path, data, form)


def test_a_refusal_shows_what_each_encoding_makes_of_the_words() -> None:
    shown = readings("id,text\n1,Größe\n".encode("cp1252"))
    assert "'Größe' in cp1252 and cp1250" in shown and "in cp1251" in shown
    assert readings(b"plain") == ""


@pytest.mark.parametrize("name", ["utf-99", "hex"])
def test_an_encoding_that_is_none_is_refused(name: str) -> None:
    with pytest.raises(ValidationError, match=r"data\.json_encoding must be one"):
        DataConfig(json_encoding=name)
