from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.errors import InputError
from pipeline.ingestion import DataConfig
from pipeline.ingestion.records import MAX_LINE_BYTES, Unit, read_unit, split_units
from pipeline.ingestion.sources import SourceFile

CONFIG = DataConfig(source="records", root=".")


def source_of(path: Path) -> SourceFile:
    return SourceFile("spam", "train", str(path), path.name, size=path.stat().st_size)


@given(
    lines=st.lists(st.one_of(st.just(b""), st.just(b"{"), st.binary(max_size=30)), max_size=20),
    unit_bytes=st.integers(1, 60),
    ends=st.booleans(),
)
@settings(deadline=None)
def test_stretches_of_any_size_give_each_line_once(
    tmp_path_factory: pytest.TempPathFactory, lines: list[bytes], unit_bytes: int, ends: bool
) -> None:
    path = tmp_path_factory.mktemp("lines") / "train.jsonl"
    body = [json.dumps({"n": n, "text": line.hex()}).encode() if line != b"{" else line for n, line in enumerate(lines)]
    path.write_bytes(b"\n".join(body) + (b"\n" if ends else b""))
    whole = [(line.place, line.record, line.error) for line in read_unit(Unit(source_of(path), 0), CONFIG)]
    assert len(whole) == len(lines)
    parts = [
        (line.place, line.record, line.error)
        for unit in split_units([source_of(path)], unit_bytes)
        for line in read_unit(unit, CONFIG)
    ]
    assert parts == whole


def test_an_endless_line_is_rejected_without_being_held(tmp_path: Path) -> None:
    path = tmp_path / "train.jsonl"
    with path.open("wb") as file:
        for _ in range(3):
            file.write(b"x" * MAX_LINE_BYTES)
        file.write(b'\n{"a": 1}\n')
    lines = list(read_unit(Unit(source_of(path), 0), CONFIG))
    assert [line.error for line in lines] == [f"line is longer than {MAX_LINE_BYTES} bytes", None]


def test_deeply_nested_json_is_a_bad_line_not_a_crash(tmp_path: Path) -> None:
    path = tmp_path / "train.jsonl"
    path.write_bytes(b"[" * 100_000 + b"\n")
    assert [line.error for line in read_unit(Unit(source_of(path), 0), CONFIG)] == ["line is not JSON"]


@pytest.mark.parametrize("name", ["train.jsonl.gz", "train.csv.gz", "train.parquet"])
def test_a_damaged_file_stops_the_run(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.write_bytes(b"\x1f\x8b\x08\0damaged")
    with pytest.raises(InputError, match=r"must be a whole file of its kind, reading stopped: .*; copy it again"):
        list(read_unit(Unit(source_of(path), 0), CONFIG))
