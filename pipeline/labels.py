"""One rule by which a label is read, whatever the source: index of a class, or one of the label words.

JSON and Parquet tell 1 from "1", CSV does not, so the type of a value decides nothing where the words are fixed: a
label that could be an index and a word of another class is refused until the task says which (``labels_are``).
"""

from __future__ import annotations

import functools
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from decimal import Decimal
from typing import Any

from pipeline.contracts import TaskSpec
from pipeline.errors import InputError
from pipeline.json_text import parse_json
from pipeline.label_names import class_set, label_of
from pipeline.record import Rejected, as_text, value_of

_Target = int | float | str
_TRUTH = {"true": True, "false": False}
_NUMBERS = ("ordinal", "regression")
"""Kinds whose labels are numbers."""
_SAYS = {True: ("true", "yes", "1"), False: ("false", "no", "0")}


def read_label(record: Mapping[Any, Any], spec: TaskSpec, choices: Sequence[str]) -> float:
    """Return the class index, for ordinal and regression tasks the number, for multilabel tasks the set of classes.

    In a choice task a number is the index of the answer, as ``answer`` is defined; its text may be a choice, too.

    Raises:
        Rejected: it is neither.
        InputError: it could be an index and another class's word, and the task does not say which.
    """
    if spec.kind == "multilabel":
        return label_of(int(_read_one({spec.label_field: each}, spec, ())) for each in _listed(record, spec))
    return _read_one(record, spec, choices)


def _listed(record: Mapping[Any, Any], spec: TaskSpec) -> list[Any]:
    """Return the labels of a multilabel record: a list, or a list in JSON text, as CSV has it; it may be empty."""
    value = value_of(record, spec.label_field)
    if value is None or value == "":
        raise Rejected(f"label {spec.label_field!r} is missing")
    if isinstance(value, str):
        try:
            value = parse_json(value)
        except ValueError:
            value = None
    if not isinstance(value, list):
        raise Rejected(f"label {spec.label_field!r} is not a list of labels")
    return value


def _read_one(record: Mapping[Any, Any], spec: TaskSpec, choices: Sequence[str]) -> float:
    value, words = record.get(spec.label_field), choices if spec.kind == "choice" else spec.class_names
    if spec.label_map:
        return _mapped(value_of(record, spec.label_field), spec, len(words))
    if type(value) is int and 0 <= value < len(words) and _is_index(spec.kind, spec.labels_are, spec.class_names):
        return float(value)
    name = spec.label_field
    value = value_of(record, name)
    value = value.strip() if isinstance(value, str) else value
    if value is None or value == "":
        raise Rejected(f"label {name!r} is missing")
    if spec.kind in _NUMBERS and _truth(value) is not None:
        raise Rejected(f"label {name!r} is a truth value, not a number")
    is_index = spec.kind == "choice" and spec.labels_are is None and _is_number(value)
    word = None if spec.labels_are == "index" or is_index else _word(value, words)
    if spec.labels_are == "word":
        if word is None:
            raise Rejected(f"label {name!r} is none of the {'choices' if spec.kind == 'choice' else 'label words'}")
        return _of_class(spec, word)
    try:
        found = _number(value, spec, len(words))
    except Rejected:
        if word is None:
            raise
        return _of_class(spec, word)
    if word is not None and _of_class(spec, word) != found:
        raise InputError(_ambiguous(spec, words, value, found, word))
    return found


def _mapped(value: Any, spec: TaskSpec, num_classes: int) -> float:
    """Return the class or number that ``label_map`` gives a label."""
    value = value.strip() if isinstance(value, str) else value
    if value is None or value == "":
        raise Rejected(f"label {spec.label_field!r} is missing")
    by_text, by_number = _map_of(tuple(spec.label_map.items()))
    target = by_text.get(_folded(as_text(value) or ""))
    if target is None and _truth(value) is None and (number := number_of(value)) is not None:
        target = by_number.get(number)
    if target is None:
        raise Rejected(f"label {spec.label_field!r} is not in label_map")
    if isinstance(target, str):
        return _of_class(spec, [word.strip() for word in spec.class_names].index(target.strip()))
    if spec.kind not in _NUMBERS and target >= num_classes:
        raise Rejected(f"label {spec.label_field!r} is not a class index within its choices")
    return float(target)


@functools.lru_cache(maxsize=256)
def _map_of(items: tuple[tuple[str, _Target], ...]) -> tuple[dict[str, _Target], dict[float, _Target]]:
    """Return a label map by texts, and by those numbers that one key alone stands for."""
    by_text = {_folded(key): target for key, target in items}
    numbers = Counter(number for key, _ in items if (number := number_of(key)) is not None)
    by_number = {number: t for key, t in items if (number := number_of(key)) is not None and numbers[number] == 1}
    return by_text, by_number


def _folded(text: str) -> str:
    """Return a truth value in its JSON form, other text as it is."""
    return text.casefold() if text.casefold() in _TRUTH else text


@functools.lru_cache(maxsize=256)
def _is_index(kind: str, labels_are: str | None, words: tuple[str, ...]) -> bool:
    """Whether an integer within the classes is an index and can be nothing else."""
    if kind in _NUMBERS or labels_are == "word":
        return False
    numbers = [number_of(word.strip()) for word in words]
    return kind == "choice" or labels_are == "index" or all(number in (None, at) for at, number in enumerate(numbers))


def _of_class(spec: TaskSpec, index: int) -> float:
    return float(spec.label_values[index]) if spec.kind == "ordinal" else float(index)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float | Decimal) and not isinstance(value, bool)


def number_of(value: Any) -> float | None:
    """Return a finite number, or a text of one as a number; None for all else."""
    if isinstance(value, str) and "_" in value:  # Python's own digit separator
        return None
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None


def _truth(value: Any) -> bool | None:
    if isinstance(value, str):
        return _TRUTH.get(value.casefold())
    return value if isinstance(value, bool) else None


def _word(value: Any, words: Sequence[str]) -> int | None:
    """Return the class whose word the value is: letter by letter, else as the same number or truth value."""
    texts = [word.strip() for word in words]
    text = as_text(value)
    if text in texts:
        return texts.index(text)
    truth = _truth(value)
    if truth is not None:
        return next((at for at, word in enumerate(texts) if word.casefold() in _SAYS[truth]), None)
    number = number_of(value)
    return None if number is None else next((at for at, word in enumerate(texts) if number_of(word) == number), None)


def _number(value: Any, spec: TaskSpec, num_classes: int) -> float:
    name, truth = spec.label_field, _truth(value)
    if isinstance(value, str) and truth is None:
        try:
            value = float(value.replace("_", "?"))
        except ValueError:
            raise Rejected(f"label {name!r} is neither a number nor a label word") from None
    number = float(truth) if truth is not None else number_of(value)
    if number is None:
        raise Rejected(f"label {name!r} is not a finite number")
    if spec.kind == "regression":
        return number
    if spec.kind == "ordinal":
        low, high = min(spec.label_values), max(spec.label_values)
        if not low <= number <= high:
            raise Rejected(f"label {name!r} lies outside {low:g} to {high:g}")
        return number
    if number != int(number) or not 0 <= number < num_classes:
        what = "its choices" if spec.kind == "choice" else f"0 to {num_classes - 1}"
        raise Rejected(f"label {name!r} is not a class index within {what}")
    return number


def _ambiguous(spec: TaskSpec, words: Sequence[str], value: Any, number: float, word: int) -> str:
    said = f"the number {number:g}" if spec.kind == "ordinal" else f"class {number:g}, {words[int(number)]!r}"
    return (
        f"task {spec.name!r}: label {spec.label_field!r} must be read in one way, {value!r} may be meant as an index "
        f"({said}) or as a word (class {word}, {words[word]!r}); say which in the task: labels_are: index, or "
        "labels_are: word"
    )


def label_counts(labels: Counter[float], spec: TaskSpec | None = None) -> dict[str, int]:
    """Return how often each label occurs, by its text: of a multilabel task each class, of a regression task each
    eighth of its scale, named by its middle."""
    if spec is not None and spec.kind == "multilabel":
        sets = {label: class_set(label, len(spec.class_names)) for label in labels}
        counts = {c: sum(n for label, n in labels.items() if sets[label][c]) for c in range(len(spec.class_names))}
        return {str(c): count for c, count in counts.items() if count}
    if spec is not None and spec.kind == "regression":
        low, high = spec.label_values
        width = (high - low) / 8
        places: Counter[int] = Counter()
        for label, count in labels.items():
            places[math.floor((label - low) / width)] += count
        return {f"{low + (place + 0.5) * width:g}": places[place] for place in sorted(places)}
    return {f"{label:g}": labels[label] for label in sorted(labels)}
