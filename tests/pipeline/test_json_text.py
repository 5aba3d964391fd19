"""JSON from outside ends in a value or a ValueError, wherever it is read."""

from __future__ import annotations

import contextlib
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.json_text import parse_json

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize(
    "text", ["[" * 100_000, '{"a":' * 100_000, "[" * 100_000 + "]" * 100_000, "1" * 5_000, b"\xff"]
)
def test_what_cannot_be_read_is_a_value_error(text: str | bytes) -> None:
    with pytest.raises(ValueError):
        parse_json(text)


@given(st.text() | st.binary())
def test_anything_else_is_a_value_or_a_value_error(text: str | bytes) -> None:
    with contextlib.suppress(ValueError):
        parse_json(text)


def test_nothing_else_parses_json() -> None:
    files = [path for part in ("pipeline", "jobs") for path in (ROOT / part).rglob("*.py")]
    found = [path.relative_to(ROOT) for path in files if re.search(r"\bjson\.loads?\b", path.read_text())]
    assert found == [Path("pipeline/json_text.py")]
