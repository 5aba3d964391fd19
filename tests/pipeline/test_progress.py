"""What one process tells another of its progress and result, and what is not taken for it."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.progress import TOKEN, Message, Result, Said, Track, WorkDone, received, send, sparkline

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=5,
)
SECONDS = st.floats(min_value=0, max_value=1e9)
WORK = st.builds(
    WorkDone, st.text(), st.integers(0), st.integers(0), st.text(), SECONDS, st.none() | SECONDS, note=st.text()
)
TOKENS = st.text("0123456789abcdef", min_size=16, max_size=16)


def _written(message: Message, token: str) -> list[str]:
    with pytest.MonkeyPatch.context() as patch:
        stream = io.StringIO()
        patch.setattr(sys, "stderr", stream)
        patch.setenv(TOKEN, token)
        send(message)
    return stream.getvalue().split("\n")


@given(WORK | st.builds(Result, VALUES) | st.builds(Said, st.text()), TOKENS)
def test_a_message_comes_back_from_its_one_line(message: Message, token: str) -> None:
    line, end = _written(message, token)
    assert received(line, token) == message
    assert end == ""


@given(WORK, TOKENS, TOKENS)
def test_a_line_without_the_token_of_the_job_is_text(message: Message, token: str, other: str) -> None:
    line, _ = _written(message, token)
    assert received(line, "") is None
    assert received(str(message), token) is None  # the words of an earlier version
    assert received(f"x{line}", token) is None
    if other != token:
        assert received(line, other) is None


@pytest.mark.parametrize("fields", ["", "{", "[]", '"x"', "{}", '{"kind": "order"}', '{"kind": "progress", "of": 1}'])
def test_a_line_that_was_cut_off_or_names_nothing_known_is_text(fields: str) -> None:
    assert received(f"@mtl-lora 00ff {fields}", "00ff") is None


def _tracked(capsys: pytest.CaptureFixture[str]) -> list[str]:
    with Track("read records", 3, "parts") as track:
        for _ in range(3):
            track.advance(note="a note")
    return capsys.readouterr().err.splitlines()


def test_work_is_told_in_words_where_nobody_reads_messages(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(TOKEN, raising=False)
    assert _tracked(capsys)[-1] == "read records 3/3 parts (100 %), 0 s spent, 0 s left, a note"


def test_work_is_told_in_messages_within_a_job(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(TOKEN, "00ff")
    last: Any = received(_tracked(capsys)[-1], "00ff")
    assert (last.what, last.done, last.total, last.unit, last.note) == ("read records", 3, 3, "parts", "a note")


def test_what_json_has_no_form_for_comes_as_text() -> None:
    line, _ = _written(Result({"path": io.StringIO}), "00ff")
    assert json.loads(line.split(" ", 2)[2])["value"] == {"path": str(io.StringIO)}


def test_what_a_followed_process_says_leaves_as_messages_and_otherwise_as_text() -> None:
    code = "from pipeline.progress import say, tell; say('[bold]12[/bold] shards'); tell('error: [a]\\n  b')"
    for token in ("00ff", ""):
        environment = {**os.environ, TOKEN: token}
        done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=60)
        lines = done.stderr.splitlines()
        texts = [str(received(line, token)) for line in lines] if token else lines
        assert texts == ["12 shards", "error: [a]", "  b"]


def test_nothing_is_told_of_work_that_has_just_begun(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(TOKEN, raising=False)
    assert len(_tracked(capsys)) == 1  # its end


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=300), st.integers(1, 60))
def test_a_sparkline_has_a_block_a_value_or_as_many_as_fit(values: list[float], width: int) -> None:
    assert len(sparkline(values, width)) == min(width, len(values))


def test_a_sparkline_falls_as_the_values_do() -> None:
    assert sparkline([8, 7, 6, 5, 4, 3, 2, 1]) == "█▇▆▅▄▃▂▁"
    assert sparkline([1, 1, 1]) == "▁▁▁"
