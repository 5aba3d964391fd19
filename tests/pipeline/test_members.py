from __future__ import annotations

import json
import math

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from pipeline.members import record_of
from pipeline.record import Rejected

TEXT = st.text() | st.sampled_from(["\ud83d", "é", "\0", '"'])
SCALAR = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | TEXT
VALUE = st.recursive(SCALAR, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3))


@given(value=VALUE, is_ascii=st.booleans(), encoding=st.sampled_from(["utf-8", "utf-16", "utf-8-sig"]))
def test_a_json_member_is_what_json_makes_of_it(value: object, is_ascii: bool, encoding: str) -> None:
    data = json.dumps(value, ensure_ascii=is_ascii).encode(encoding, "surrogatepass")
    found = record_of({"a.json": data})["a.json"]
    assert repr(found) == repr(json.loads(data))


@given(data=st.binary(max_size=12))
@example(b'{"a": 1, "a": 2}')
@example(b"[1e400, -1e400, NaN, Infinity, -Infinity]")
@example(b"1" * 5000)
@example(b"[" * 100_000)
@example(b'"\\ud83d"')
def test_what_json_refuses_is_refused(data: bytes) -> None:
    try:
        expected = json.loads(data)
    except (ValueError, RecursionError):
        with pytest.raises(Rejected, match="is not JSON"):
            record_of({"a.json": data})
        return
    found = record_of({"a.json": data})["a.json"]
    assert repr(found) == repr(expected) or (isinstance(found, float) and math.isnan(found))
