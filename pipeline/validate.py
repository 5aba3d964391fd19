"""A record becomes a sample, or is rejected with the reason."""

from __future__ import annotations

import datetime as dt
import hashlib
import json
import math
import re
from typing import Any, NamedTuple

from pipeline.contracts import TaskSpec
from pipeline.labels import read_label
from pipeline.record import Rejected as Rejected
from pipeline.record import answers_of, choices_of, is_unicode, plain, texts_of, value_of

_UNSAFE = re.compile(r"[^A-Za-z0-9_]+|-{2,}")
_ENCODE = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"), check_circular=False).encode
MAX_KEY = 60
"""Longest key out of an id, so that a suffix and an extension fit into the 100 characters of a tar header."""


class Checked(NamedTuple):
    """What a valid record says."""

    fields: dict[str, str]
    label: float
    choices: tuple[str, ...]
    group: str | None
    weight: float = 1.0
    answers: tuple[str, ...] = ()

    @property
    def told(self) -> float:
        """What the record says of its texts: the label, or a number that other answers than these do not have."""
        if not self.answers:
            return self.label
        digest = hashlib.blake2b("\x1f".join(self.answers).encode(), digest_size=6).digest()
        return float(int.from_bytes(digest, "little"))  # 48 bits, which a float holds exactly

    def payload(self, spec: TaskSpec, key: str, time: str | None) -> bytes:
        """Return the content of ``KEY.json``: the sample's fields that are not at their defaults."""
        sample: dict[str, Any] = {"key": key, "task": spec.name, "fields": self.fields, "label": self.label}
        if self.choices:
            sample["choices"] = self.choices
        if self.answers:
            sample["answers"] = self.answers
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
        """Return what the model is shown in training, with the choices, or the answer that it learns, at the end."""
        texts = [text.format_map(self.fields) for text in (spec.template, *spec.segments)]
        return "".join((*texts, *self.choices, *self.answers[:1]))


def sanitize_key(text: str) -> str:
    """Return a name of letters, digits, ``_`` and single ``-`` only, at most 60 long; empty where nothing is left."""
    return _UNSAFE.sub("-", text).strip("-")[:MAX_KEY].rstrip("-")


def fields_asked(spec: TaskSpec) -> tuple[str, ...]:
    """Return the fields of a record that a task reads."""
    choices = spec.choices_field if spec.kind == "choice" else None
    optional = (choices, spec.image_field, spec.group_field, spec.weight_field)
    return tuple(dict.fromkeys((*spec.text_fields, spec.label_field, *filter(None, optional))))


def check_record(record: dict[str, Any], spec: TaskSpec, text_fields: tuple[str, ...]) -> Checked:
    """Validate one record against its task; ``text_fields`` are ``spec.text_fields``, which take time to find.

    Raises:
        Rejected: the record breaks the schema.
        InputError: its label can be read in two ways.
    """
    fields = texts_of(record, text_fields)
    choices = choices_of(record, spec) if spec.kind == "choice" else ()
    answers = answers_of(record, spec)
    label = 0.0 if answers else read_label(record, spec, choices)
    group = _group(record, spec.group_field) if spec.group_field else None
    weight = _weight(record, spec.weight_field) if spec.weight_field else 1.0
    return Checked(fields, label, choices, group, weight, answers)


def _weight(record: dict[str, Any], name: str) -> float:
    value = value_of(record, name)
    try:
        weight = float(value)
    except (TypeError, ValueError, OverflowError):
        weight = math.nan
    if not 0 < weight < math.inf or isinstance(value, bool):
        raise Rejected(f"weight {name!r} is not a number > 0")
    return weight


def _group(record: dict[str, Any], name: str) -> str | None:
    """Return the group's name; None where it is missing, as an empty cell of a CSV file is."""
    value = value_of(record, name)
    group = None if value is None or value == "" else str(value)
    if group is not None and not is_unicode(group):
        raise Rejected(f"group {name!r} is not valid Unicode")
    return group


def day_of(record: dict[str, Any], field: str) -> str | None:
    """Return the ISO date that a record's field holds; None where it holds none."""
    if record.get(field) is None:
        return None
    try:
        value = value_of(record, field)
    except Rejected:
        return None
    text = value.isoformat() if isinstance(value, dt.date) else value
    if isinstance(text, str):
        try:
            return dt.date.fromisoformat(text[:10]).isoformat()
        except ValueError:
            pass
    return None


def key_of(identity: Any) -> str:
    """Return the key that an id gives, empty where it is missing or has no letter or digit; bytes that are no text
    (a UUID) are taken in hexadecimal digits."""
    if type(identity) is not str:
        try:
            identity = plain(identity)
        except UnicodeDecodeError:
            identity = bytes(identity).hex()
    return "" if identity is None else sanitize_key(str(identity))
