"""What a record says, whether it came from JSONL, CSV, Parquet or a table: one reading for ingestion and for serving.

A value is missing where it is None, NaN, infinite, NaT or ``pandas.NA``: none of them is a word.
"""

from __future__ import annotations

import base64
import datetime as dt
import difflib
import math
import uuid
from collections.abc import Container, Mapping, Sequence
from decimal import Decimal
from typing import Any

import numpy as np

from pipeline.contracts import Sample, TaskSpec
from pipeline.images import EXTENSIONS, MAX_BYTES, UnreadableImage, decoded
from pipeline.json_text import parse_json

_PANDAS_MISSING = ("NAType", "NaTType")
_SHOWN_FIELDS = 20


class Rejected(Exception):
    """A record that breaks its task's schema; the message is the reason, free of the record's own words."""


def plain(value: Any) -> Any:
    """Return a value as plain Python, None where it is missing; bytes become text, arrays become lists.

    Raises:
        UnicodeDecodeError: bytes that are not UTF-8.
    """
    kind = type(value)
    if kind is str or kind is int or kind is bool or value is None:
        return value
    if kind is float:
        return value if math.isfinite(value) else None
    if isinstance(value, bytes | bytearray | memoryview):
        return bytes(value).decode()
    if isinstance(value, tuple):
        return list(value)
    if isinstance(value, np.datetime64):
        return None if np.isnat(value) else str(value)
    if isinstance(value, np.ndarray | np.generic) and not isinstance(value, np.timedelta64):
        return plain(value.tolist())
    if isinstance(value, Decimal):
        return value if value.is_finite() else None
    return None if kind.__name__ in _PANDAS_MISSING else value


def value_of(record: Mapping[Any, Any], name: str) -> Any:
    """Return a field's plain value, None where it is missing.

    Raises:
        Rejected: it is bytes that are not UTF-8.
    """
    try:
        return plain(record.get(name))
    except UnicodeDecodeError:
        raise Rejected(f"field {name!r} is not valid UTF-8") from None


_ABSENT = object()


def renamed(record: Mapping[Any, Any], columns: Mapping[str, str]) -> dict[Any, Any]:
    """Return a record as it was read with its fields under the names that tasks know; the original stays as it is.

    The result is that of renaming the columns in the file: a field whose column is absent is absent, even where the
    record has one of the field's own name. Fields that ``columns`` does not name stay.

    Args:
        record: column → value.
        columns: field → its column, or a dotted path into nested values; see ``TaskSpec.columns``.
    """
    found = dict(record)
    for field, path in columns.items():
        value = _at(record, path)
        if value is _ABSENT:
            found.pop(field, None)
        else:
            found[field] = value
    return found


def column_of(path: str, known: Container[str]) -> str:
    """Return the column in which a dotted path begins, of those that are known."""
    return path if path in known else path.partition(".")[0]


def _at(record: Mapping[Any, Any], path: str) -> Any:
    if path in record:
        return record[path]
    return _within(record, path.split("."))


def _within(value: Any, parts: Sequence[str]) -> Any:
    if not parts:
        return value
    if isinstance(value, Mapping):
        for end in range(1, len(parts) + 1):  # a name may have dots of its own, as a member ``meta.json`` of a tar
            if (name := ".".join(parts[:end])) in value:
                found = _within(value[name], parts[end:])
                if found is not _ABSENT:
                    return found
    elif isinstance(value, list | tuple | np.ndarray) and parts[0].isdecimal() and int(parts[0]) < len(value):
        return _within(value[int(parts[0])], parts[1:])
    return _ABSENT


def as_text(value: Any) -> str | None:
    """Return a plain value as a prompt shows it, None where it has no one text: numbers, dates, and true and false."""
    if isinstance(value, str):
        return value
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int | float):
        try:
            return str(value)
        except ValueError:  # an integer of thousands of digits
            return None
    if isinstance(value, Decimal):
        return format(value, "f")
    if isinstance(value, dt.date | dt.time):
        return value.isoformat()
    return str(value) if isinstance(value, uuid.UUID) else None


def is_unicode(text: str) -> bool:
    """Whether a text can be stored: it holds no half of a surrogate pair."""
    try:
        return text.isascii() or bool(text.encode())
    except UnicodeEncodeError:
        return False


def text_of(record: Mapping[Any, Any], name: str) -> str:
    """Return a field as the prompt shows it.

    Raises:
        Rejected: it is missing, has no one text, or cannot be stored.
    """
    value = record.get(name)
    if type(value) is not str:
        value = value_of(record, name)
        if value is None:
            raise Rejected(f"field {name!r} is missing")
        value = as_text(value)
        if value is None:
            raise Rejected(f"field {name!r} is not text")
    if not value.isascii() and not is_unicode(value):
        raise Rejected(f"field {name!r} is not valid Unicode")
    return value


def texts_of(record: Mapping[Any, Any], text_fields: Sequence[str]) -> dict[str, str]:
    """Return the texts that a prompt names.

    Raises:
        Rejected: one is missing or no text, or all are blank.
    """
    fields, is_blank = {}, True
    for name in text_fields:
        value = record.get(name)
        if type(value) is not str or not value.isascii():  # the usual case needs no more
            value = text_of(record, name)
        fields[name] = value
        is_blank = is_blank and not value.strip()
    if is_blank:
        raise Rejected("every text field is blank")
    return fields


def choices_of(record: Mapping[Any, Any], spec: TaskSpec) -> tuple[str, ...]:
    """Return the answers that a record brings, a list or a list in JSON text; none where the task has label words.

    Raises:
        Rejected: there are fewer than two, or one is blank or no text.
    """
    if spec.kind != "choice":
        return ()
    name = spec.choices_field
    value = value_of(record, name)
    if value is None:
        raise Rejected(f"field {name!r} is missing")
    if isinstance(value, str):  # CSV carries the list as JSON
        try:
            value = parse_json(value)
        except ValueError:
            value = None
    if not isinstance(value, list) or len(value) < 2:
        raise Rejected(f"field {name!r} is not a list of at least 2 choices")
    try:
        choices = tuple(plain(choice) for choice in value)
    except UnicodeDecodeError:
        raise Rejected(f"field {name!r} is not valid UTF-8") from None
    if not all(isinstance(choice, str) and choice.strip() for choice in choices):
        raise Rejected(f"field {name!r} holds a blank choice or one that is not text")
    if not is_unicode("".join(choices)):
        raise Rejected(f"field {name!r} is not valid Unicode")
    return choices


def answers_of(record: Mapping[Any, Any], spec: TaskSpec) -> tuple[str, ...]:
    """Return the texts that are right answers, the one that is learned first; none but for ``generation``.

    Raises:
        Rejected: there is none, or one is blank or no text.
    """
    if spec.kind != "generation":
        return ()
    name = spec.label_field
    value = value_of(record, name)
    if value is None:
        raise Rejected(f"answer {name!r} is missing")
    if isinstance(value, list) and not value:
        raise Rejected(f"answer {name!r} is an empty list")
    try:
        texts = [as_text(plain(each)) for each in (value if isinstance(value, list) else [value])]
    except UnicodeDecodeError:
        raise Rejected(f"answer {name!r} is not valid UTF-8") from None
    answers = tuple(text.strip() for text in texts if text is not None)
    if len(answers) < len(texts) or not all(answers):
        raise Rejected(f"answer {name!r} is blank or no text")
    if not is_unicode("".join(answers)):
        raise Rejected(f"answer {name!r} is not valid Unicode")
    return answers


def asked(record: Mapping[Any, Any], spec: TaskSpec, text_fields: Sequence[str], key: str) -> Sample:
    """Return what a model is asked by a record without a label.

    Args:
        record: as it came in: a field under its column of ``spec.columns``, or, where that is absent, its own name.
        spec: its task.
        text_fields: ``spec.text_fields``, which take time to find.
        key: that the sample gets.

    Raises:
        Rejected: it lacks a field, or one is no text.
    """
    if spec.columns:
        read = (*text_fields, spec.choices_field, spec.image_field)
        columns = {field: path for field, path in spec.columns.items() if field in read}
        record = {**record, **renamed(record, columns)} if columns else record
    fields, choices = texts_of(record, text_fields), choices_of(record, spec)
    label = spec.label_values[0] if spec.label_values else 0.0
    image = image_asked(record, spec.image_field) if spec.image_field else None
    return Sample(key=key, task=spec.name, fields=fields, label=label, choices=choices, image=image)


def image_asked(record: Mapping[Any, Any], name: str) -> bytes:
    """Return the encoded image that a model is asked about: bytes, or their base64 as text, also as a ``data:`` URL.

    In a record of a shard it may stand under its extension. A path is not followed: who asks may not be who may read.

    Raises:
        Rejected: there is none, or it cannot be decoded.
    """
    found = record.get(name)
    if found is None or found != found:
        found = next((record[each] for each in EXTENSIONS if isinstance(record.get(each), bytes)), None)
    if isinstance(found, str):
        try:
            found = base64.b64decode(found.rpartition(",")[2] if found.startswith("data:") else found, validate=True)
        except ValueError:
            raise Rejected(f"image {name!r} is neither bytes nor base64") from None
    if not isinstance(found, bytes | bytearray | memoryview):
        raise Rejected(f"image {name!r} is missing" if found is None else f"image {name!r} is neither bytes nor base64")
    if len(found) > MAX_BYTES:
        raise Rejected(f"image {name!r} is larger than {MAX_BYTES} bytes")
    try:
        decoded(bytes(found))
    except UnreadableImage as reason:
        raise Rejected(f"{reason} ({name!r})") from None
    return bytes(found)


def fields_found(fields: Sequence[str], wanted: Sequence[str]) -> str:
    """Return ``"it has the fields [...]"`` and the nearest one to each that is wanted and not there, ready to show."""
    shown = [str(field)[:60] for field in fields[:_SHOWN_FIELDS]]
    text = f"it has the fields {shown}{' …' if len(fields) > _SHOWN_FIELDS else ''}"
    for name in (name for name in wanted if name not in fields):
        near = [field for field in fields if field.strip().casefold() == name.casefold()]
        near = near or difflib.get_close_matches(name, [field[:200] for field in fields[:1000]], n=1)
        if not near:
            continue
        text += f"; for {name!r} did you mean {near[0]!r}?"
        if near[0] != near[0].strip():
            text += " (names are taken as they stand: take the space out of the file's header)"
    return text
