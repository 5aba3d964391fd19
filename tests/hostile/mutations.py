"""What is done to an input: to its bytes, and to the values of which it is made."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Sequence
from typing import Any

WORDS = (
    *(b"\x00", b"\xff\xfe", b"\xed\xa0\xbd", b"\r", b"\n", b'"', b"'", b"\\", b",", b"{", b"}", b"[", b"]", b":"),
    *(b"../", b"/etc/passwd", b"..\\", b"file:///etc/passwd", b"pipe:id", b"~", b"$(id)", b"*", b"%s", b"%n"),
    *(b"${oc.env:HOME}", b"!!python/object/apply:os.system [id]", b"&a [*a]", b"{0.__class__}", b"{a!r:>999999999}"),
    *(b"NaN", b"Infinity", b"-1", b"1e999", b"9" * 400, b"-9223372036854775808", b"18446744073709551616", b"null"),
    *(b"<script>alert(1)</script>", "\u202e\u0000\U0001f600".encode(), b"true", b"[" * 3000, b'{"a":' * 2000),
)
"""What parsers stumble over: signs, paths, commands, interpolations, numbers beyond limits, nesting."""
VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, -1, 1, 2**31, 2**63, 2**64, -(2**63) - 1, 10**400, 0.5, -0.0, 1e308, 1e-320),
    *(float("nan"), float("inf"), "", " ", "nan", "1e999", "9" * 400, "\x00", "\ud800", "\U0001f600", "a" * 5000),
    *("../../etc/passwd", "/etc/passwd", "file:///etc/passwd", "pipe:id", "~/x", "s3://x/../y", "http://127.0.0.1:9/"),
    *("${oc.env:HOME}", "{0.__class__}", "{text!r:>999999999}", "{", "}", "{{}}", "<script>", "models:/x@y", "\n"),
    *([], {}, [[]], [None], {"": None}, {"__class__": "os.system"}, ["a", "a"], [0, 1.5, "x"], {"kind": "x"}),
)
_SHORT = 64


def mutated_bytes(rng: random.Random, data: bytes) -> bytes:
    """Return bytes with one to four changes, half of the time near the start, where formats have their headers."""
    for _ in range(rng.choice((1, 1, 2, 4))):
        end = len(data) if rng.random() < 0.5 else min(len(data), 256)
        at = rng.randrange(end + 1)
        kind = rng.randrange(7)
        if kind == 0 and at < len(data):
            data = data[:at] + bytes([data[at] ^ 1 << rng.randrange(8)]) + data[at + 1 :]
        elif kind == 1:
            data = data[:at] + rng.randbytes(rng.randrange(1, 9)) + data[at + rng.randrange(9) :]
        elif kind == 2:
            data = data[:at] + data[at + rng.randrange(1, _SHORT) :]
        elif kind == 3:
            data = data[:at]
        elif kind == 4:
            piece = data[at : at + rng.randrange(1, _SHORT)]
            data = data[:at] + piece * rng.choice((2, 2, 50)) + data[at:]
        elif kind == 5:
            data = data[:at] + rng.choice((b"\x00", b"\xff", b"\x7f", b"\x80")) * rng.choice((1, 2, 4, 8)) + data[at:]
        else:
            word = rng.choice(WORDS)
            data = data[:at] + word + data[at + (len(word) if rng.random() < 0.5 else 0) :]
    return data


def mutated_value(rng: random.Random, value: Any, others: Sequence[Any] = VALUES) -> Any:
    """Return a value of mappings, lists and plain values with one to three places changed; the original stays."""
    whole = [copy.deepcopy(value)]
    for _ in range(rng.choice((1, 1, 2, 3))):
        places = list(_places(whole))
        if not places:
            break
        parent, key = rng.choice(places)
        kind = rng.randrange(8)
        if kind == 0 and parent is not whole:
            del parent[key]
        elif kind == 1 and isinstance(parent, dict):
            parent[_name(rng, str(key))] = copy.deepcopy(parent[key]) if rng.random() < 0.5 else parent.pop(key)
        elif kind == 2 and isinstance(parent, list) and parent is not whole:
            parent.insert(key, copy.deepcopy(rng.choice(parent)))
        elif kind == 3:
            other_parent, other = rng.choice(places)
            parent[key] = copy.deepcopy(other_parent[other])
        elif kind == 4 and isinstance(parent[key], str):
            parent[key] = mutated_bytes(rng, parent[key].encode("utf-8", "surrogatepass")).decode("utf-8", "replace")
        elif kind == 5:
            parent[key] = _deep(rng, parent[key])
        else:
            parent[key] = copy.deepcopy(rng.choice(others))  # what is put in may be changed by the next turn
    return whole[0]


def as_json(rng: random.Random, value: Any) -> bytes:
    """Return a value as JSON, now and then with a key twice, in another encoding, or with changed bytes."""
    data = _plain(value).encode("utf-8", "replace")
    kind = rng.randrange(10)
    if kind == 0:
        return data.replace(b"{", b'{"label": 0, "schema": 2, ', 1)
    if kind == 1:
        return data.decode().encode(rng.choice(("utf-16", "utf-32", "utf-8-sig")))
    return mutated_bytes(rng, data) if kind == 2 else data


def _plain(value: Any) -> str:
    return json.dumps(value, default=str)


def _places(value: Any) -> Any:
    for key, each in value.items() if isinstance(value, dict) else enumerate(value):
        yield value, key
        if isinstance(each, dict | list):
            yield from _places(each)


def _name(rng: random.Random, name: str) -> str:
    return rng.choice((name.upper(), f" {name}", f"{name}\x00", "../x", "", "__proto__", name[:-1], f"{name}.a"))


def _deep(rng: random.Random, value: Any) -> Any:
    for _ in range(rng.choice((3, 40))):
        value = [value] if rng.random() < 0.5 else {"a": value}
    return value
