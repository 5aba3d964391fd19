"""A record becomes a sample, or is rejected with the reason."""

from __future__ import annotations

import json
import math
import re
from typing import Any

from pipeline.contracts import Sample, TaskSpec

_UNSAFE = re.compile(r"[^A-Za-z0-9_-]+")
MAX_KEY = 80


class Rejected(Exception):
    """A record that breaks its task's schema; the message is the reason, free of the record's own words."""


def sanitize_key(text: str) -> str:
    """Return a name of letters, digits, ``_`` and ``-`` only, at most 80 long; empty where nothing is left."""
    return _UNSAFE.sub("-", text).strip("-")[:MAX_KEY]


def to_sample(record: dict[str, Any], spec: TaskSpec, key: str, time: str | None = None) -> Sample:
    """Validate one record against its task.

    Raises:
        Rejected: the record breaks the schema.
    """
    fields = {name: _text(record, name) for name in spec.text_fields}
    if not any(value.strip() for value in fields.values()):
        raise Rejected("every text field is blank")
    choices = _choices(record, spec)
    group = record.get(spec.group_field) if spec.group_field else None
    return Sample.model_construct(
        key=key,
        task=spec.name,
        fields=fields,
        label=_label(record, spec, choices),
        choices=choices,
        group=None if group is None else str(group),
        time=time,
    )


def _text(record: dict[str, Any], name: str) -> str:
    value = record.get(name)
    if isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError:
            raise Rejected(f"field {name!r} is not valid Unicode") from None
        return value
    if value is None:
        raise Rejected(f"field {name!r} is missing")
    if isinstance(value, int | float) and not isinstance(value, bool):
        return str(value)
    raise Rejected(f"field {name!r} is not text")


def _choices(record: dict[str, Any], spec: TaskSpec) -> tuple[str, ...]:
    if spec.kind != "choice":
        return ()
    value = record.get(spec.choices_field)
    if isinstance(value, str):  # CSV carries the list as JSON
        try:
            value = json.loads(value)
        except ValueError:
            value = None
    if not isinstance(value, list) or len(value) < 2:
        raise Rejected(f"field {spec.choices_field!r} is not a list of at least 2 choices")
    if not all(isinstance(choice, str) and choice.strip() for choice in value):
        raise Rejected(f"field {spec.choices_field!r} holds a blank choice or one that is not text")
    return tuple(value)


def _label(record: dict[str, Any], spec: TaskSpec, choices: tuple[str, ...]) -> float:
    """Return the class index (for ordinal tasks the number): a label word wins over a numeric reading."""
    name = spec.label_field
    value = record.get(name)
    if value is None or value == "":
        raise Rejected(f"label {name!r} is missing")
    words = choices if spec.kind == "choice" else spec.label_words
    if isinstance(value, str):
        stripped = value.strip()
        matches = [i for i, word in enumerate(words) if word.strip() == stripped]
        if matches and spec.kind != "ordinal":
            return float(matches[0])
        try:
            value = float(stripped)
        except ValueError:
            raise Rejected(f"label {name!r} is neither a number nor a label word") from None
    if not isinstance(value, bool | int | float) or not math.isfinite(value):
        raise Rejected(f"label {name!r} is not a finite number")
    number = float(value)
    if spec.kind == "ordinal":
        if not min(spec.label_values) <= number <= max(spec.label_values):
            raise Rejected(f"label {name!r} lies outside {min(spec.label_values):g} to {max(spec.label_values):g}")
        return number
    if number != int(number) or not 0 <= number < len(words):
        what = "its choices" if spec.kind == "choice" else f"0 to {len(words) - 1}"
        raise Rejected(f"label {name!r} is not a class index within {what}")
    return number
