from __future__ import annotations

import gzip
import json
import tracemalloc
from importlib import import_module
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.contracts import TaskSpec
from pipeline.errors import InputError
from pipeline.ingestion import DataConfig, prepare
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


def rows_of(path: Path, data: bytes) -> list[tuple[int, dict[str, str], str | None]]:
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return [(line.number, line.record, line.error) for line in read_unit(Unit(source_of(path), 0), CONFIG)]


@pytest.mark.parametrize(
    ("bad", "raw", "reason"),
    [
        (b'"stray" quote,1\n', '"stray" quote,1\n', "',' expected after '\"'"),
        (b'"open,1\n', '"open,1\n', "',' expected after '\"'"),
        (b"caf\xe9,1\n", "caf\ufffd,1\n", "not UTF-8"),
        (b"x" * MAX_LINE_BYTES + b",1\n", "x" * 200, f"longer than {MAX_LINE_BYTES} characters"),
        (b"x" * (3 * MAX_LINE_BYTES) + b",1\n", "x" * 200, f"longer than {MAX_LINE_BYTES} characters"),
    ],
)
@pytest.mark.parametrize("name", ["train.csv", "train.csv.gz"])
def test_a_bad_csv_row_is_put_aside_with_its_line(tmp_path: Path, name: str, bad: bytes, raw: str, reason: str) -> None:
    data = b'\xef\xbb\xbftext,label\n"two\nlines",0\n' + bad + 'é,1\n"quoted",0\n'.encode()
    assert rows_of(tmp_path / name, data) == [
        (2, {"text": "two\nlines", "label": "0"}, None),
        (4, {"raw": raw}, f"row cannot be read: {reason}"),
        (5, {"text": "é", "label": "1"}, None),
        (6, {"text": "quoted", "label": "0"}, None),
    ]


def test_a_quote_that_stays_open_costs_its_own_row_only(tmp_path: Path) -> None:
    assert rows_of(tmp_path / "train.csv", b'text,label\n"open,1\r\na,0\r\n\r\nb,1') == [
        (2, {"raw": '"open,1\r\n'}, "row cannot be read: unexpected end of data"),
        (3, {"text": "a", "label": "0"}, None),
        (5, {"text": "b", "label": "1"}, None),
    ]


def test_an_endless_csv_line_is_refused_in_bounded_memory(tmp_path: Path) -> None:
    path = tmp_path / "train.csv.gz"
    with gzip.open(path, "wb", compresslevel=1) as file:
        file.write(b"text,label\n")
        for _ in range(32):
            file.write(b"x" * MAX_LINE_BYTES)
    tracemalloc.start()
    try:
        lines = list(read_unit(Unit(source_of(path), 0), CONFIG))
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert [line.error for line in lines] == [f"row cannot be read: longer than {MAX_LINE_BYTES} characters"]
    assert peak < 8 * MAX_LINE_BYTES


def test_a_csv_header_that_cannot_be_read_stops_the_run(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="must be a whole file of its kind, reading stopped: not UTF-8"):
        rows_of(tmp_path / "train.csv", b"t\xffxt,label\na,1\n")


@given(rows=st.integers(0, 60), group=st.integers(1, 20), unit_bytes=st.integers(1, 3000))
@settings(deadline=None, max_examples=30)
def test_row_groups_cut_anywhere_give_each_row_once(
    tmp_path_factory: pytest.TempPathFactory, rows: int, group: int, unit_bytes: int
) -> None:
    path = tmp_path_factory.mktemp("rows") / "train.parquet"
    table = pa.table({"n": list(range(rows)), "text": [f"text {n}" * (n % 7) for n in range(rows)]})
    pq.write_table(table, path, row_group_size=group)
    whole = [(line.place, line.record, line.error) for line in read_unit(Unit(source_of(path), 0), CONFIG)]
    units = split_units([source_of(path)], unit_bytes)
    parts = [(line.place, line.record, line.error) for unit in units for line in read_unit(unit, CONFIG)]
    assert parts == whole
    assert [record["n"] for _, record, _ in whole] == list(range(rows))
    assert [unit.start for unit in units[1:]] == [unit.stop for unit in units[:-1]]


def test_a_large_parquet_file_gives_the_shards_of_a_whole_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "in" / "t").mkdir(parents=True)
    table = pa.table({"text": [f"text {n}" for n in range(400)], "label": [n % 2 for n in range(400)]})
    pq.write_table(table, tmp_path / "in" / "t" / "train.parquet", row_group_size=30)
    task = TaskSpec(name="t", template="{text}:", label_words=(" no", " yes"))
    config = DataConfig(source="records", root=str(tmp_path / "in"), samples_per_shard=50)
    whole = prepare(config, [task], tmp_path / "whole", seed=0)
    monkeypatch.setattr(
        import_module("pipeline.ingestion.prepare"), "split_units", lambda sources: split_units(sources, 1000)
    )
    cut = prepare(config, [task], tmp_path / "cut", seed=0)
    assert [shard.sha256 for shard in cut.shards] == [shard.sha256 for shard in whole.shards]


def test_a_damaged_parquet_file_is_said_where_it_is_read(tmp_path: Path) -> None:
    path = tmp_path / "train.parquet"
    path.write_bytes(b"PAR1 no footer" * 100)
    (unit,) = split_units([source_of(path)], 10)
    with pytest.raises(InputError, match="must be a whole file of its kind"):
        list(read_unit(unit, CONFIG))
