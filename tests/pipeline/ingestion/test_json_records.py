"""The elements of a JSON array are the records that lines of JSON would give."""

from __future__ import annotations

import io
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.ingestion import json_records
from pipeline.ingestion.json_records import is_array, json_array

_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=6,
)


@given(
    records=st.lists(st.dictionaries(st.text(), _VALUES, max_size=4)),
    indent=st.sampled_from([None, 2]),
    ascii_only=st.booleans(),
    chunk=st.sampled_from([1, 2, 7, 1 << 20]),
)
def test_an_array_gives_its_elements_wherever_reads_cut_it(
    records: list[dict[str, Any]], indent: int | None, ascii_only: bool, chunk: int
) -> None:
    data = json.dumps(records, indent=indent, ensure_ascii=ascii_only).encode(errors="surrogatepass")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(json_records, "_CHUNK", chunk)
        lines = list(json_array(io.BytesIO(b"\xef\xbb\xbf \n" + data + b"\n")))
    assert [line.record for line in lines if not line.error] == records
    assert [line.number for line in lines] == list(range(1, len(records) + 1))


@pytest.mark.parametrize(
    ("data", "expected"), [(b" \n[1]", True), (b"\xef\xbb\xbf[", True), (b'{"a": [1]}', False), (b"", False)]
)
def test_an_array_is_told_by_its_first_sign(data: bytes, expected: bool) -> None:
    stream = io.BytesIO(data)
    assert is_array(stream) is expected
    assert stream.tell() == 0


def test_a_bad_element_costs_its_own_record_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json_records, "MAX_LINE_BYTES", 40)
    data = b'[{"a": 1}, 2, {"a": 1, "a": 2}, {"a": nul}, {"a": "' + b"x" * 50 + b'"}, {"a": 3}]'
    lines = list(json_array(io.BytesIO(data)))
    assert [line.error for line in lines] == [
        None,
        "record is not a JSON object",
        "record has a key twice",
        "record is not JSON",
        "record is longer than 40 bytes",
        None,
    ]
    assert lines[-1].record == {"a": 3}


@pytest.mark.parametrize("data", [b'[{"a": 1}', b'[{"a": 1}, {"a', b'[{"a": 1}] x'])
def test_an_array_that_is_cut_off_or_followed_is_no_whole_file(data: bytes) -> None:
    with pytest.raises((EOFError, OSError)):
        list(json_array(io.BytesIO(data)))
