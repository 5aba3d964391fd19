"""CSV is read in the dialect that is told or found, or refused."""

from __future__ import annotations

import codecs
import csv
import io
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from pipeline.errors import InputError
from pipeline.ingestion.config import CsvDialect, DataConfig
from pipeline.ingestion.csv_records import csv_rows

ROWS = [["id", "text"], ["1", "Grüße, wie; sie\tsind"], ["2", 'sagt "ja"\nund geht'], ["3", "plain"]]


def written(encoding: str = "utf-8", **options: Any) -> bytes:
    text = io.StringIO(newline="")
    csv.writer(text, **options).writerows(ROWS)
    return text.getvalue().encode(encoding)


def read(data: bytes, **dialect: Any) -> list[list[str]]:
    lines = list(csv_rows(io.BytesIO(data), CsvDialect(**dialect), "rows.csv"))
    assert not [line.error for line in lines if line.error]
    return [list(lines[0].record), *(list(line.record.values()) for line in lines)]


@pytest.mark.parametrize("delimiter", [",", ";", "\t", "|"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "cp1252"])
def test_a_told_dialect_is_read(delimiter: str, encoding: str) -> None:
    data = written(encoding, delimiter=delimiter)
    assert read(data, delimiter=delimiter, encoding=encoding) == ROWS
    assert encoding == "cp1252" or read(data, delimiter="auto", encoding="auto") == ROWS


def test_quote_and_escape_are_those_that_are_told() -> None:
    data = written(quotechar="'", escapechar="\\", doublequote=False)
    assert read(data, quote="'", escape="\\", doubled_quotes=False) == ROWS


_CELL = st.text(st.characters(codec="utf-8", exclude_characters="\0\r"), max_size=8)


@given(rows=st.lists(st.tuples(_CELL, _CELL), min_size=1), delimiter=st.sampled_from(",;\t|"))
def test_what_is_written_in_a_dialect_is_read_in_it(rows: list[tuple[str, str]], delimiter: str) -> None:
    text = io.StringIO(newline="")
    csv.writer(text, delimiter=delimiter, quoting=csv.QUOTE_ALL).writerows([("a", "b"), *rows])
    found = read(text.getvalue().encode("utf-16"), delimiter=delimiter, encoding="utf-16")
    assert found == [["a", "b"], *map(list, rows)]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"text\none\ntwo\n", "none does"),
        (b"a,b;c\n1,2;3\n", "several do"),
        (
            "id,text\n1,Grüße\n".encode("cp1252"),
            r"found none of them: .* is 'Grüße' in cp1252 and cp1250.*, .*in cp1251",
        ),
    ],
)
def test_what_has_no_one_reading_is_refused(data: bytes, message: str) -> None:
    with pytest.raises(InputError, match=message):
        read(data, delimiter="auto", encoding="auto")


def test_text_of_another_encoding_is_refused() -> None:
    with pytest.raises(InputError, match=r"must be text in data\.csv\.encoding utf-16"):
        read(codecs.BOM_UTF16_LE + b"a\0,\0b\0\n\0\x00\xd8a\0", encoding="utf-16")


@pytest.mark.parametrize(
    ("dialect", "message"),
    [
        ({"delimiter": ";;"}, "pattern"),
        ({"encoding": "utf-99"}, "must be one that Python knows"),
        ({"encoding": "hex"}, "must be one of text"),
        ({"delimiter": '"'}, "must differ"),
    ],
)
def test_a_dialect_that_is_none_is_refused(dialect: dict[str, str], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        CsvDialect(**dialect)


def test_the_word_auto_leaves_all_to_be_found() -> None:
    assert DataConfig(csv="auto").csv == CsvDialect(delimiter="auto", encoding="auto")  # type: ignore[arg-type]
