"""Errors a user can fix: each message states the rule, the value found, and the remedy."""

from __future__ import annotations

import difflib
import os
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


_ADDRESS = re.compile(
    # scheme://user:password@, the password up to the first @, over spaces and slashes, and to the last @ of its word;
    # or a user alone, which is a token where the scheme is http
    r"(?P<scheme>[a-z][a-z0-9+.-]{0,30})://(?P<user>[^/@:\s'\"]*)(?P<rest>:(?:(?!://)[^\n])*?@(?:[^\s'\"@]*@)*|@)",
    re.IGNORECASE,
)
_PORT = re.compile(r":\d{1,5}[/?#\s'\",;)\]]")
_VALUE = re.compile(
    r"((?:password|passwd|pwd|token|secret|signature|(?<![a-z])sig|credential|(?:access|account|api|shared)[_-]?key)=)"
    r"[^&;\s'\"]+(?:[^&;=\n'\"]*(?=[&;]))?",
    re.IGNORECASE,
)
_WHOLE_VALUE = re.compile(r"(odbc_connect=)[^&\n'\"]+", re.IGNORECASE)
_SECRET_NAME = re.compile(
    r"SECRET|TOKEN(?!IZ)|PASSWORD|ACCESS_KEY|ACCOUNT_KEY|API_KEY|CONNECTION_STRING|WEBHOOK", re.IGNORECASE
)
_SHORTEST_SECRET = 4


def masked(text: str) -> str:
    """Return a text without secrets: errors of a server's client name its whole address, or what they were told.

    Masked are passwords of URLs, tokens that stand as their user, values of their queries and of connection strings
    that are named as secrets, and the values of the environment's variables that are named so.
    """
    # The longest first: one secret may be the beginning of another.
    secrets = {v for name, v in os.environ.items() if _SECRET_NAME.search(name) and len(v) >= _SHORTEST_SECRET}
    for value in sorted(secrets, key=len, reverse=True):
        text = text.replace(value, "***")
    text = _WHOLE_VALUE.sub(r"\1***", text)
    return _VALUE.sub(r"\1***", _ADDRESS.sub(_without_password, text))


def _without_password(found: re.Match[str]) -> str:
    is_web = found["scheme"].lower() in ("http", "https")
    if found["rest"] == "@":  # postgresql://ads@db is a name alone
        return f"{found['scheme']}://***@" if is_web and found["user"] else found[0]
    if is_web and _PORT.match(found["rest"]):  # http://host:80/a@b
        return found[0]
    return f"{found['scheme']}://{found['user']}:***@"


_LONGEST_NAME = 200


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return ``"; did you mean 'x'?"`` for the nearest known name, else the list of known names."""
    known = sorted(known)
    near = difflib.get_close_matches(name[:_LONGEST_NAME], known, n=1)  # which takes time by the square of its length
    return f"; did you mean {near[0]!r}?" if near else f"; known: {', '.join(known) or 'none'}"
