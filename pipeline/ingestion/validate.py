"""A record becomes a sample, or is rejected with the reason."""

from __future__ import annotations

import hashlib
import json
import math
import re
from typing import Any, NamedTuple

from pipeline.contracts import TaskSpec

_UNSAFE = re.compile(r"[^A-Za-z0-9_]+|-{2,}")
_ENCODE = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"), check_circular=False).encode
MAX_KEY = 60
"""Longest key out of an id, so that a suffix and an extension fit into the 100 characters of a tar header."""


class Rejected(Exception):
    """A record that breaks its task's schema; the message is the reason, free of the record's own words."""


class Checked(NamedTuple):
    """What a valid record says."""

    fields: dict[str, str]
    label: float
    choices: tuple[str, ...]
    group: str | None
    weight: float = 1.0

    def payload(self, spec: TaskSpec, key: str, time: str | None) -> bytes:
        """Return the content of ``KEY.json``: the sample's fields that are not at their defaults."""
        sample: dict[str, Any] = {"key": key, "task": spec.name, "fields": self.fields, "label": self.label}
        if self.choices:
            sample["choices"] = self.choices
        if self.group is not None:
            sample["group"] = self.group
        if self.weight != 1:
            sample["weight"] = self.weight
        if time is not None:
            sample["time"] = time
        return _ENCODE(sample).encode()

    def digest(self, image: bytes) -> bytes:
        """Return the 128-bit digest of all that the model is shown: texts, choices and the image's digest."""
        shown = "\x1f".join((*self.fields.values(), "\x1e", *self.choices, "\x1e", ""))
        return hashlib.blake2b(shown.encode() + image, digest_size=16).digest()

    def prompt(self, spec: TaskSpec) -> str:
        """Return what the model is shown, with the choices at the end."""
        return "".join((spec.template.format_map(self.fields), *self.choices))


def sanitize_key(text: str) -> str:
    """Return a name of letters, digits, ``_`` and single ``-`` only, at most 60 long; empty where nothing is left."""
    return _UNSAFE.sub("-", text).strip("-")[:MAX_KEY].rstrip("-")


def check_record(record: dict[str, Any], spec: TaskSpec, text_fields: tuple[str, ...]) -> Checked:
    """Validate one record against its task; ``text_fields`` are ``spec.text_fields``, which take time to find.

    Raises:
        Rejected: the record breaks the schema.
    """
    fields = {name: _text(record, name) for name in text_fields}
    if not any(value.strip() for value in fields.values()):
        raise Rejected("every text field is blank")
    choices = _choices(record, spec)
    label = _label(record, spec, choices)
    group = record.get(spec.group_field) if spec.group_field else None
    return Checked(fields, label, choices, None if group is None else str(group), _weight(record, spec))


def _weight(record: dict[str, Any], spec: TaskSpec) -> float:
    if spec.weight_field is None:
        return 1.0
    value = record.get(spec.weight_field)
    try:
        weight = float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError, OverflowError):
        weight = math.nan
    if not 0 < weight < math.inf or isinstance(value, bool):
        raise Rejected(f"weight {spec.weight_field!r} is not a number > 0")
    return weight


def _text(record: dict[str, Any], name: str) -> str:
    value = record.get(name)
    if isinstance(value, str):
        if not value.isascii():
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
    try:
        "".join(value).encode()
    except UnicodeEncodeError:
        raise Rejected(f"field {spec.choices_field!r} is not valid Unicode") from None
    return tuple(value)


def _label(record: dict[str, Any], spec: TaskSpec, choices: tuple[str, ...]) -> float:
    """Return the class index (for ordinal tasks the number): a label word wins over a numeric reading."""
    name = spec.label_field
    value = record.get(name)
    words = choices if spec.kind == "choice" else spec.label_words
    if type(value) is int and spec.kind != "ordinal" and 0 <= value < len(words):  # the usual case
        return float(value)
    if value is None or value == "":
        raise Rejected(f"label {name!r} is missing")
    if isinstance(value, str):
        stripped = value.strip()
        matches = [i for i, word in enumerate(words) if word.strip() == stripped]
        if matches and spec.kind != "ordinal":
            return float(matches[0])
        try:
            value = float(stripped)
        except ValueError:
            raise Rejected(f"label {name!r} is neither a number nor a label word") from None
    if spec.kind == "ordinal" and isinstance(value, bool):
        raise Rejected(f"label {name!r} is a truth value, not a number")
    if not isinstance(value, bool | int | float) or not abs(value) < math.inf:
        raise Rejected(f"label {name!r} is not a finite number")
    try:
        number = float(value)
    except OverflowError:
        raise Rejected(f"label {name!r} is not a finite number") from None
    if spec.kind == "ordinal":
        if not min(spec.label_values) <= number <= max(spec.label_values):
            raise Rejected(f"label {name!r} lies outside {min(spec.label_values):g} to {max(spec.label_values):g}")
        return number
    if number != int(number) or not 0 <= number < len(words):
        what = "its choices" if spec.kind == "choice" else f"0 to {len(words) - 1}"
        raise Rejected(f"label {name!r} is not a class index within {what}")
    return number
