"""Whatever a file of records holds, preparing it ends in samples and rejects, or in an error that a user can fix."""

from __future__ import annotations

import datetime as dt
import decimal
import gzip
import json
import math
import tempfile
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.contracts import TaskSpec
from pipeline.errors import InputError
from pipeline.ingestion import DataConfig, prepare
from pipeline.stream import read_split

MORE = {"template": "{text}:", "group_field": "group", "weight_field": "weight"}
TASKS = (
    TaskSpec(name="t", label_words=(" no", " yes"), **MORE),
    TaskSpec(name="t", kind="multiclass", label_words=(" 1", " 2", " true"), **MORE),
    TaskSpec(name="t", kind="choice", label_field="label", **MORE),
    TaskSpec(name="t", kind="ordinal", label_words=(" 0", " 1"), label_values=(0, 1), **MORE),
)
FIELDS = ("text", "label", "choices", "group", "weight", "id", "date", "task", "label_probabilities", "other")
TEXTS = st.one_of(
    st.text(max_size=8),
    st.sampled_from(
        ["\ud83d", "a\udcffb", "nan", "NaN", "inf", "1", "true", "t", "2026-01-05", "\0", "", " ", "9" * 400]
    ),
    st.sampled_from(['["a", "b"]', '["a", "\\ud800"]', "[" * 2000, '["1", 2]', "[NaN, 1]", '{"a": 1, "a": 2}']),
)
NUMBERS = st.one_of(st.integers(-2, 3), st.floats(), st.sampled_from([10**400, -(10**30), 0.5, float("nan")]))
VALUES = st.recursive(
    st.one_of(st.none(), st.booleans(), NUMBERS, TEXTS),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(TEXTS, inner, max_size=2)),
    max_leaves=4,
)
RECORDS = st.dictionaries(st.sampled_from(FIELDS), VALUES, max_size=len(FIELDS))
SANE = {"text": "a text", "label": 1, "choices": ["a", "b"], "group": "g", "weight": 1}
EXAMPLES = settings(max_examples=60)


def put_to_the_test(name: str, data: bytes, spec: TaskSpec) -> int | None:
    """Prepare one file and read every stored sample back; return how many records it had, None where it is refused."""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        (root / "t").mkdir()
        (root / "t" / name).write_bytes(data)
        config = DataConfig(source="records", root=folder, max_rejected_share=1)
        try:
            manifest = prepare(config, [spec], root / "out", seed=0)
        except InputError as error:
            assert str(error).encode()
            return None
        stored = list(read_split(root / "out", "train")) if manifest.shards else []
        highest = max(spec.label_values, default=spec.num_classes)
        for sample in stored:
            assert 0 <= sample.label <= (highest or len(sample.choices) - 1)
            assert sample.fields["text"].strip() and sample.group != "" and 0 < sample.weight < math.inf
        return len(stored) + sum(reject.records for reject in manifest.rejected)


@EXAMPLES
@given(
    spec=st.sampled_from(TASKS),
    records=st.lists(RECORDS.map(lambda record: {**SANE, **record}), max_size=3),
    noise=st.lists(st.tuples(st.integers(0, 400), st.binary(min_size=1, max_size=4)), max_size=2),
    double=st.booleans(),
    zipped=st.booleans(),
)
def test_hostile_jsonl_gives_samples_rejects_or_a_typed_error(
    spec: TaskSpec, records: list[dict[str, Any]], noise: list[tuple[int, bytes]], double: bool, zipped: bool
) -> None:
    lines = [json.dumps(record) for record in records]
    data = "\n".join([*(line[:-1] + ', "label": 0}' if double else line for line in lines), ""]).encode()
    data = gzip.compress(data) if zipped else data
    for place, piece in noise:
        data = data[:place] + piece + data[place + len(piece) :]
    put_to_the_test("train.jsonl.gz" if zipped else "train.jsonl", data, spec)


@EXAMPLES
@given(
    spec=st.sampled_from(TASKS),
    header=st.lists(st.sampled_from((*FIELDS, " text", "", "text\0", '"')), min_size=1, max_size=8),
    rows=st.lists(st.lists(st.one_of(TEXTS, NUMBERS.map(str)), max_size=9), max_size=4),
    separator=st.sampled_from([",", ",", ", ", ";", "\t"]),
    quote=st.booleans(),
    encoding=st.sampled_from(["utf-8", "utf-8-sig", "utf-16", "latin-1"]),
)
def test_hostile_csv_gives_samples_rejects_or_a_typed_error(
    spec: TaskSpec, header: list[str], rows: list[list[str]], separator: str, quote: bool, encoding: str
) -> None:
    def cell(text: str) -> str:
        return '"' + text.replace('"', '""') + '"' if quote else text

    lines = [separator.join(header), *(separator.join(map(cell, row)) for row in rows)]
    data = "\n".join(lines).encode(encoding, "replace")
    put_to_the_test("train.csv", data, spec)


def _strings(values: list[bytes]) -> pa.Array:
    raw = pa.array(values, pa.binary())
    return pa.Array.from_buffers(pa.string(), len(raw), raw.buffers())


COLUMNS = st.sampled_from(
    [
        pa.array(["a", None, "\ud83dx".encode("utf-8", "replace").decode()]),
        _strings([b"caf\xe9", b"fine", b"\xed\xa0\xbd"]),
        pa.array([b"x", b"\xff\xfe", None], pa.binary()),
        pa.array([b"ab", b"\xff\xff", None], pa.binary(2)),
        pa.array(["a", "b", None], pa.large_string()),
        pa.array(["a", "b, long enough to stand apart", None], pa.string_view()),
        pa.array(["a", "b", "a"]).dictionary_encode(),
        pa.array([1, None, 3]),
        pa.array([1, 0, 1], pa.uint8()),
        pa.array([float("nan"), float("inf"), 1.0]),
        pa.array([1.0, 0.0, float("nan")], pa.float16()),
        pa.array([decimal.Decimal(1), decimal.Decimal("0.5"), None], pa.decimal128(10, 3)),
        pa.array([decimal.Decimal(10) ** 60, decimal.Decimal(0), None], pa.decimal256(70, 3)),
        pa.array([True, False, None]),
        pa.array([dt.date(2026, 1, 5), None, dt.date(1, 1, 1)]),
        pa.array([1, 2**63 - 1, -(2**63) + 1], pa.timestamp("us")),
        pa.array([1, 2, 3], pa.timestamp("ns", tz="Mars/Olympus")),
        pa.array([1, 2, None], pa.time64("us")),
        pa.array([1, 2**62, None], pa.duration("us")),
        pa.array([["a", "b"], None, ["a"]]),
        pa.array([[b"a", b"\xff"], [b"a", b"b"], []], pa.list_(pa.binary())),
        pa.array([["a", None], ["b", "b"], ["", " "]], pa.large_list(pa.string())),
        pa.array([["a", "b"], ["b", "c"], ["c", "d"]], pa.list_(pa.string(), 2)),
        pa.array([[["a"], ["b"]], [["c"]], None]),
        pa.array([{"a": 1}, {"a": None}, None]),
        pa.array([[("k", 1)], [], None], pa.map_(pa.string(), pa.int64())),
        pa.nulls(3),
    ]
)


@EXAMPLES
@given(
    spec=st.sampled_from(TASKS),
    columns=st.dictionaries(st.sampled_from(FIELDS), COLUMNS, min_size=1, max_size=5),
    more=st.lists(st.tuples(st.sampled_from(FIELDS), COLUMNS), max_size=1),
    noise=st.lists(st.tuples(st.integers(0, 3000), st.binary(min_size=1, max_size=4)), max_size=1),
    dictionary=st.booleans(),
)
def test_hostile_parquet_gives_samples_rejects_or_a_typed_error(
    spec: TaskSpec,
    columns: dict[str, pa.Array],
    more: list[tuple[str, pa.Array]],
    noise: list[tuple[int, bytes]],
    dictionary: bool,
) -> None:
    sane = {name: pa.array([value] * 3) for name, value in SANE.items()}
    named = [*({**sane, **columns}).items(), *more]
    table = pa.Table.from_arrays([column for _, column in named], [name for name, _ in named])
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, use_dictionary=dictionary)
    data = sink.getvalue().to_pybytes()
    for place, piece in noise:
        place %= len(data)
        data = data[:place] + piece + data[place + len(piece) :]
    assert put_to_the_test("train.parquet", data, spec) in (3, None)


@pytest.mark.parametrize("depth", [90, 300, 900, 5000])
def test_records_of_any_depth_are_kept_or_put_aside(depth: int) -> None:
    deep = b"[" * depth + b"]" * depth
    lines = [b'{"text": "a", "label": 1, "other": ' + deep + b"}", b'{"text": "a", "label": 7, "other": ' + deep + b"}"]
    spec = TaskSpec(name="t", template="{text}:", label_words=(" no", " yes"))
    assert put_to_the_test("train.jsonl", b"\n".join(lines), spec) == 2
