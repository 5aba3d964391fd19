"""The threat model names tests that are there."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / ".github/SECURITY.md").read_text()


def named() -> list[tuple[str, str]]:
    """Return file and test of each proof; one that begins with ``::`` is of the file before it."""
    found, file = [], ""
    for path, test in re.findall(r"`([\w/]*(?:\.py)?)::(\w+)`", PAGE):
        file = path or file
        found.append((file, test))
    return found


def test_each_proof_that_is_named_is_a_test_that_is_there() -> None:
    gone = [
        f"{file}::{test}" for file, test in named() if not re.search(rf"^def {test}\(", (ROOT / file).read_text(), re.M)
    ]
    assert not gone


def test_each_boundary_has_a_proof_and_what_enforces_it_is_there() -> None:
    rows = [line.split(" | ") for line in PAGE.partition("## Boundaries")[2].splitlines() if line.startswith("| ")][1:]
    assert len(rows) > 10
    for boundary, enforced, proof in rows:
        assert "::test_" in proof, boundary
        for path in re.findall(r"`([\w/]+/[\w/.]+)`", enforced):
            assert (ROOT / path).exists(), path
