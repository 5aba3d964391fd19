"""Errors a user can fix: each message states the rule, the value found, and the remedy."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable
from typing import Any


class InputError(ValueError):
    """Configuration, data or usage that breaks a rule; the command ends with exit code 2."""


class HeldBack(Exception):
    """A gate held the run back; the command ends with exit code 3.

    Args:
        message: why.
        result: what the command has to show nevertheless, plain values.
    """

    def __init__(self, message: str, result: Any = None) -> None:
        super().__init__(message)
        self.result = result


def masked(text: str) -> str:
    """Return a text without the passwords of the URLs in it: errors of a server's client name its whole address."""
    return re.sub(r"(?<=://)([^/@:\s]*):[^/\s]*@", r"\1:***@", text)


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return ``"; did you mean 'x'?"`` for the nearest known name, else the list of known names."""
    known = sorted(known)
    near = difflib.get_close_matches(name, known, n=1)
    return f"; did you mean {near[0]!r}?" if near else f"; known: {', '.join(known) or 'none'}"
