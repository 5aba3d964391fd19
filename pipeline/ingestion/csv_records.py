"""Records out of CSV in the dialect that is told or found, a bad row costing its own record only."""

from __future__ import annotations

import codecs
import csv
import io
import re
from collections import Counter, deque
from collections.abc import Iterator
from typing import Any

from pipeline.errors import InputError
from pipeline.ingestion.config import CsvDialect
from pipeline.ingestion.encodings import HEAD_BYTES, codec_of, is_wide, text_encoding, undecodable
from pipeline.ingestion.source_file import MAX_LINE_BYTES, Line

KEY = "data.csv.encoding"
_DELIMITERS = ",;\t|"
_ESCAPED = re.compile("[\udc80-\udcff]")
"""A byte that ``surrogateescape`` has let through."""


def found_dialect(head: bytes, told: CsvDialect, name: str) -> CsvDialect:
    """Return a dialect in which nothing is left to be found, by a file's first ``HEAD_BYTES``.

    Raises:
        InputError: the beginning has no one reading.
    """
    encoding = text_encoding(head, told.encoding, name, KEY)
    if told.delimiter != "auto":
        return told.model_copy(update={"encoding": encoding})
    try:
        text = codecs.getincrementaldecoder(codec_of(encoding))("replace").decode(head)
    except UnicodeError as error:
        raise undecodable(name, encoding, KEY, error) from None
    scores = {delimiter: _fit(text, told, delimiter, len(head) == HEAD_BYTES) for delimiter in _DELIMITERS}
    best = max(scores.values())
    fitting = [delimiter for delimiter, score in scores.items() if score == best]
    if best[0] < 0.9 or len(fitting) > 1:
        raise InputError(
            f"data.csv.delimiter auto must find one sign that cuts the rows of {name} alike, "
            f"{'several do' if best[0] >= 0.9 else 'none does'} of {list(_DELIMITERS)}; name it: data.csv.delimiter"
        )
    return told.model_copy(update={"encoding": encoding, "delimiter": fitting[0]})


def _fit(text: str, told: CsvDialect, delimiter: str, is_cut: bool) -> tuple[float, int]:
    """Return which share of the rows a delimiter cuts into as many fields as the header, and into how many.

    csv.Sniffer is not asked: where fields are texts it may take a letter or a space for the delimiter.
    """
    try:
        reader = csv.reader(io.StringIO(text, newline=""), **_options(told.model_copy(update={"delimiter": delimiter})))
    except (TypeError, ValueError):  # the quote or escape is this sign
        return 0.0, 0
    counts: list[int] = []
    while True:
        try:
            row = next(reader, None)
        except csv.Error:
            counts.append(-1)
            continue
        if row is None:
            break
        if row:
            counts.append(len(row))
    counts = counts[:-1] if is_cut and len(counts) > 1 else counts
    if not counts or counts[0] < 2:
        return 0.0, 0
    return counts.count(counts[0]) / len(counts), counts[0]


def _options(dialect: CsvDialect) -> dict[str, Any]:
    return {
        "delimiter": dialect.delimiter,
        "quotechar": dialect.quote,
        "quoting": csv.QUOTE_NONE if dialect.quote is None else csv.QUOTE_MINIMAL,
        "escapechar": dialect.escape,
        "doublequote": dialect.doubled_quotes,
        "strict": True,
    }


class _CsvLines:
    """The physical lines of a CSV file, decoded; those of a row that proves bad are read again, but for its first."""

    def __init__(self, stream: Any, encoding: str) -> None:
        errors = "strict" if is_wide(encoding) else "surrogateescape"
        self._text = io.TextIOWrapper(stream, encoding=codec_of(encoding), errors=errors, newline="")
        self._encoding = encoding.upper()
        self._ahead: deque[str] = deque()
        self._row: list[str] = []
        self._size = 0
        self._number = 0

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        line = self._ahead.popleft() if self._ahead else self._next_line()
        if not line:
            raise StopIteration
        self._row.append(line)
        self._size += len(line)
        if self._size > MAX_LINE_BYTES:
            raise csv.Error(f"longer than {MAX_LINE_BYTES} characters")
        if not line.isascii() and _ESCAPED.search(line):
            raise csv.Error(f"not {self._encoding}")
        return line

    def _next_line(self) -> str:
        line = self._text.readline(MAX_LINE_BYTES + 1)
        rest = line
        while len(rest) >= MAX_LINE_BYTES and not rest.endswith(("\n", "\r")):
            rest = self._text.readline(MAX_LINE_BYTES)
        return line

    def begin_row(self) -> int:
        """Return the number of the line that the next row begins with."""
        self._number += len(self._row)
        self._row, self._size = [], 0
        return self._number + 1

    def take_back(self) -> str:
        """Return the first line of the row just read; the lines after it come again."""
        self._ahead.extendleft(reversed(self._row[1:]))
        del self._row[1:]
        return self._row[0]


def csv_rows(stream: Any, told: CsvDialect, name: str) -> Iterator[Line]:
    """Yield the rows of a file by the names in its first one; rows that cannot be read come with their error.

    Args:
        stream: the open file, unpacked.
        told: how it is written.
        name: of the file, for errors.

    Raises:
        InputError: the dialect is not found, the text is of another encoding, or the header names a field twice.
        csv.Error: the header is none.
    """
    dialect = found_dialect(stream.read(HEAD_BYTES), told, name)
    stream.seek(0)
    csv.field_size_limit(MAX_LINE_BYTES)
    try:
        yield from _rows(_CsvLines(stream, dialect.encoding), dialect, name)
    except UnicodeError as error:
        raise undecodable(name, dialect.encoding, KEY, error) from error


def _rows(lines: _CsvLines, dialect: CsvDialect, name: str) -> Iterator[Line]:
    reader = csv.reader(lines, **_options(dialect))
    header = [field.removeprefix("\ufeff") if not at else field for at, field in enumerate(next(reader, []))]
    counts = Counter(field.strip() for field in header)
    if double := [field for field, count in counts.items() if field and count > 1]:
        raise InputError(
            f"a CSV header must have each field once, that of {name} has {double} more than once; rename one"
        )
    while True:
        number = lines.begin_row()
        try:
            row = next(reader, None)
        except csv.Error as error:
            raw = lines.take_back()[:200].encode(errors="surrogateescape").decode(errors="replace")
            yield Line(number, number, {"raw": raw}, f"row cannot be read: {error}")
            continue
        if row is None:
            return
        if row:
            error_of_row = "row has more fields than the header" if len(row) > len(header) else None
            yield Line(number, number, dict(zip(header, row, strict=False)), error_of_row)
