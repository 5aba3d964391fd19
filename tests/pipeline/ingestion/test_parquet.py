"""Parquet: the columns asked for, in bounded memory, and one bad value costs one record."""

from __future__ import annotations

import datetime as dt
import io
import tracemalloc
from collections import Counter
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.contracts import TaskSpec
from pipeline.errors import InputError
from pipeline.ingestion import DataConfig, parquet, prepare
from pipeline.ingestion.parquet import Row, parquet_rows
from pipeline.ingestion.records import MAX_LINE_BYTES
from pipeline.stream import read_split

SPEC = TaskSpec(name="t", template="{text}:", label_words=(" no", " yes"))
LONG = "x" * (10 << 20)


def rows_of(table: pa.Table, columns: set[str] | None = None, limit: int = MAX_LINE_BYTES, **more: Any) -> list[Row]:
    file = io.BytesIO()
    pq.write_table(table, file, **more)
    return list(parquet_rows(file, columns, limit, "f.parquet"))


def prepared(folder: Path, table: pa.Table, spec: TaskSpec = SPEC) -> tuple[list[Any], dict[str, int]]:
    (folder / "t").mkdir()
    pq.write_table(table, folder / "t" / "train.parquet")
    config = DataConfig(source="records", root=str(folder), max_rejected_share=0.5)
    manifest = prepare(config, [spec], folder / "out", seed=0)
    rejected = {reject.reason: reject.records for reject in manifest.rejected}
    return list(read_split(folder / "out", "train")), rejected


def not_utf8(values: list[bytes]) -> pa.Array:
    raw = pa.array(values, pa.binary())
    return pa.Array.from_buffers(pa.string(), len(raw), raw.buffers())


def test_one_bad_value_costs_its_own_record(tmp_path: Path) -> None:
    text = not_utf8([b"a", b"caf\xe9", b"c", b"d"])
    late = pa.array([1, 2, 2**63 - 1, 4], pa.timestamp("us"))
    samples, rejected = prepared(tmp_path, pa.table({"text": text, "label": [0, 1, 0, 1], "date": late}))
    assert [sample.fields["text"] for sample in samples] == ["a", "d"]
    assert rejected == {"field 'text' is not valid UTF-8": 1, "field 'date' is not a valid timestamp[us]": 1}


def test_columns_that_nobody_asks_for_cost_nothing(tmp_path: Path) -> None:
    late = pa.array([2**63 - 1, 2], pa.timestamp("us"))
    table = pa.table({"text": ["a", "b"], "label": [0, 1], "valid_to": late, "more": not_utf8([b"\xff", b"\xfe"])})
    samples, rejected = prepared(tmp_path, table)
    assert (len(samples), rejected) == (2, {})
    assert rows_of(table, {"text"}) == [Row({"text": "a"}), Row({"text": "b"})]


def test_warehouse_types_are_read(tmp_path: Path) -> None:
    spec = SPEC.model_copy(update={"template": "{text} {day} {new} {price}:", "weight_field": "weight"})
    table = pa.table(
        {
            "text": pa.array([b"caf\xc3\xa9", b"\xff"], pa.binary()),
            "day": pa.array([dt.date(2026, 1, 5)] * 2),
            "new": [True, False],
            "price": pa.array([Decimal("1.50")] * 2, pa.decimal128(10, 2)),
            "label": pa.array([Decimal(1)] * 2, pa.decimal128(3, 0)),
            "weight": pa.array([Decimal("0.5")] * 2, pa.decimal128(3, 1)),
            "id": pa.array([b"\x01\xff" * 8] * 2, pa.binary(16)),
        }
    )
    (sample,), rejected = prepared(tmp_path, table, spec)
    assert sample.fields == {"text": "café", "day": "2026-01-05", "new": "true", "price": "1.50"}
    assert (sample.label, sample.weight, sample.key) == (1.0, 0.5, "01ff" * 8)
    assert rejected == {"field 'text' is not valid UTF-8": 1}


def test_a_column_that_comes_twice_is_refused() -> None:
    table = pa.Table.from_arrays([pa.array([1]), pa.array([2]), pa.array([3])], ["label", "text", "label"])
    with pytest.raises(InputError, match=r"must have each column once, f.parquet has \['label'\] more than once"):
        rows_of(table)
    with pytest.raises(InputError, match=r"must have a field that the task asks for .* it has the fields \['a'\]"):
        rows_of(pa.table({"a": [1]}), {"text"})


def bomb(kind: str) -> tuple[pa.Table, dict[str, Any]]:
    """Return a table of a few kilobytes in its file that unpacks to gigabytes, and how to write it."""
    places = pa.array([0] * 400)
    whole = {"dictionary_pagesize_limit": 1 << 30, "store_schema": False, "compression": "zstd"}
    if kind == "dictionary":
        return pa.table({"text": pa.DictionaryArray.from_arrays(places, pa.array([LONG]))}), whole
    lists = pa.ListArray.from_arrays(
        pa.array(range(0, 40_001, 100), pa.int32()),
        pa.DictionaryArray.from_arrays(pa.array([0] * 40_000), pa.array(["x" * (1 << 20)])),
    )
    return pa.table({"text": lists}), whole


@pytest.mark.parametrize("kind", ["dictionary", "lists"])
def test_texts_that_unpack_to_gigabytes_are_rejected_in_bounded_memory(kind: str) -> None:
    table, options = bomb(kind)
    file = io.BytesIO()
    pq.write_table(table, file, **options)
    assert file.getbuffer().nbytes < 10_000
    del table
    before = pa.default_memory_pool().bytes_allocated()
    tracemalloc.start()
    errors, most = Counter[str | None](), 0
    try:
        for row in parquet_rows(file, None, MAX_LINE_BYTES, "f.parquet"):
            errors[row.error] += 1
            most = max(most, pa.default_memory_pool().bytes_allocated() - before)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert errors == {f"record is longer than {MAX_LINE_BYTES} bytes": 400}
    assert most < 200 << 20 and peak < 20 << 20


def test_texts_that_repeat_their_beginnings_are_read_row_by_row() -> None:
    table = pa.table({"text": ["x" * (1 << 20)] * 200})
    file = io.BytesIO()
    pq.write_table(table, file, use_dictionary=False, column_encoding={"text": "DELTA_BYTE_ARRAY"}, compression="zstd")
    del table
    before, most = pa.default_memory_pool().bytes_allocated(), 0
    for row in parquet_rows(file, None, MAX_LINE_BYTES, "f.parquet"):
        assert len(row.record["text"]) == 1 << 20
        most = max(most, pa.default_memory_pool().bytes_allocated() - before)
    assert most < 150 << 20


def test_a_column_whose_texts_are_too_long_on_average_is_refused_unread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parquet, "MAX_CHUNK_BYTES", 1000)
    with pytest.raises(
        InputError, match=r"a record may have 100 bytes, those of f.parquet have 10\d\d on average in 'a'"
    ):
        rows_of(pa.table({"a": ["x" * 1000] * 50}), limit=100, use_dictionary=False)


def test_a_row_group_of_more_list_values_than_memory_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parquet, "MAX_VALUES", 1000)
    table = pa.table({"a": pa.array([[None] * 2000], pa.list_(pa.string()))})
    with pytest.raises(InputError, match=r"may have 1000 values in the lists of 'a.* write smaller row groups"):
        rows_of(table)


def test_long_and_short_rows_are_told_apart_in_one_batch() -> None:
    texts = ["x" * n for n in (10, 300, 20, 30, 500, 90, 80)]
    rows = rows_of(pa.table({"n": range(7), "a": texts, "b": [["y" * 10, "z"]] * 7}), limit=200)
    assert [row.record.get("n") for row in rows] == [0, None, 2, 3, None, 5, 6]
    assert [len(row.record["a"]) for row in rows if row.error is None] == [10, 20, 30, 90, 80]
    assert Counter(row.error for row in rows) == {None: 5, "record is longer than 200 bytes": 2}


def test_row_groups_and_names_with_dots_are_read_in_order() -> None:
    table = pa.table(
        {"a.b": [str(n) for n in range(5000)], "a": range(5000), "c": [[{"d": str(n)}] for n in range(5000)]}
    )
    rows = rows_of(table, row_group_size=700)
    assert [row.record for row in rows] == table.to_pylist()
    assert [row.record for row in rows_of(table, {"a.b"}, row_group_size=700)] == table.select(["a.b"]).to_pylist()


def test_maps_are_read_by_their_keys_and_one_with_a_key_twice_costs_its_own_record(tmp_path: Path) -> None:
    kind = pa.map_(pa.string(), pa.list_(pa.struct([("t", pa.string())])))
    maps = pa.array([[("k", [{"t": f"text {n}"}])] * (2 if n == 2 else 1) for n in range(4)], kind)
    spec = SPEC.model_copy(update={"columns": {"text": "m.k.0.t"}})
    samples, rejected = prepared(tmp_path, pa.table({"m": maps, "label": [0, 1, 0, 1]}), spec)
    assert [sample.fields["text"] for sample in samples] == ["text 0", "text 1", "text 3"]
    (reason,) = rejected
    assert "'m' is not a valid map" in reason and rejected[reason] == 1
