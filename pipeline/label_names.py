"""How labels and classes are named and numbered: keys of YAML become texts, and none of them two things at once."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

MOST_LABELS = 52
"""Classes of a multilabel task: so many bits a label holds exactly, which is a float64 as all labels are."""
THRESHOLD = 0.5
"""Probability from which a class of a multilabel task is one of the answer's."""


def class_set(label: float, num_classes: int) -> tuple[bool, ...]:
    """Return for each class of a multilabel task whether the sample has it: bit c of its label is class c."""
    return tuple(bool(int(label) >> c & 1) for c in range(num_classes))


def label_of(classes: Iterable[int]) -> float:
    """Return the label that :func:`class_set` takes apart: of the indices of a sample's classes."""
    return float(sum(1 << c for c in set(classes)))


def label_key(key: Any, place: str) -> str:
    """Return a key of a mapping of labels as text.

    YAML reads the bare words ``no``, ``off`` and ``false`` as one truth value, and ``null`` as nothing: as keys they
    are refused, since what was meant is no longer to be seen.

    Args:
        key: as YAML or JSON gave it.
        place: key of the mapping, for the error.

    Raises:
        ValueError: it is a truth value or nothing.
    """
    if isinstance(key, bool) or key is None:
        words = "null and ~" if key is None else "yes, on and true" if key else "no, off and false"
        raise ValueError(
            f"{place}: a key must be text or a number, got {key!r}: YAML reads bare {words} as that; write the label "
            "of the data in quotes, such as 'no': 0"
        )
    return str(key).strip()


def with_label_keys(values: Any, place: str) -> Any:
    """Return a mapping with its keys as texts; what is no mapping as it is.

    Raises:
        ValueError: a key is a truth value or nothing, or two are the same text.
    """
    if not isinstance(values, Mapping):
        return values
    found = {label_key(key, place): value for key, value in values.items()}
    if len(found) != len(values):
        raise ValueError(f"{place}: keys must differ as texts, got {list(values)}; leave one out")
    return found


def class_of(name: str, words: Sequence[str], labels_are: str | None) -> int:
    """Return the class that a key names, by its label word or its index.

    Raises:
        ValueError: it is neither, or the word of one class and the index of another.
    """
    texts = [word.strip() for word in words]
    by_word = texts.index(name) if name in texts and labels_are != "index" else None
    by_index = int(name) if name.isdecimal() and int(name) < len(words) and labels_are != "word" else None
    if by_word is None and by_index is None:
        raise ValueError(f"must name one of the classes {texts} or its index, got {name!r}")
    if by_word is not None and by_index is not None and by_word != by_index:
        raise ValueError(f"must name a class in one way, {name!r} is a word and another class's index; say labels_are")
    return by_word if by_word is not None else int(name)
