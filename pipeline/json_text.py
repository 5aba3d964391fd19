"""JSON from files and requests, which may hold anything."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any


def parse_json(
    text: str | bytes | bytearray, object_pairs_hook: Callable[[list[tuple[str, Any]]], Any] | None = None
) -> Any:
    """Return what a text says, as ``json.loads`` does.

    Raises:
        ValueError: it is no JSON, or nested more deeply than can be read; nothing else is raised.
    """
    try:
        return json.loads(text, object_pairs_hook=object_pairs_hook)
    except RecursionError as error:
        raise ValueError("JSON must be nested less deeply") from error
