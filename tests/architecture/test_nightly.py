"""What is left out at every commit is named, with what stands in for it."""

from __future__ import annotations

import re
from pathlib import Path

TESTS = Path(__file__).resolve().parents[1]
SOURCES = {path: path.read_text() for path in TESTS.rglob("test_*.py")}
FUNCTIONS = {name for source in SOURCES.values() for name in re.findall(r"^def (test_\w+)", source, re.MULTILINE)}
ROWS = re.findall(r"^\| `(test_\w+)` \| (.*) \|$", (TESTS / "README.md").read_text(), re.MULTILINE)
MARKED = re.compile(r"^@pytest\.mark\.nightly\n(?:@.*\n)*def (test_\w+)", re.MULTILINE)


def test_every_nightly_test_has_a_smaller_one_at_every_commit() -> None:
    nightly = {name for source in SOURCES.values() for name in MARKED.findall(source)}
    assert nightly
    assert nightly == {name for name, _ in ROWS}
    for _, smaller in ROWS:
        named = set(re.findall(r"`(test_\w+)`", smaller))
        files = set(re.findall(r"`(test_\w+\.py)`", smaller))
        assert named | files
        assert named <= FUNCTIONS - nightly
        assert files <= {path.name for path in SOURCES}


def test_every_nightly_test_is_a_slow_one() -> None:
    for path, source in SOURCES.items():
        if MARKED.search(source):
            assert re.search(r"^pytestmark = .*mark\.slow", source, re.MULTILINE), path


def test_the_check_of_every_commit_leaves_out_the_nightly_ones_alone() -> None:
    makefile = (TESTS.parent / "Makefile").read_text()
    assert '-m "slow and not nightly"' in makefile
    assert "-m nightly" in makefile
