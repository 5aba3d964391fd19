"""Who may read what is written: whom the user's umask lets."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from pipeline.contracts import write_atomic


@pytest.mark.parametrize(("umask", "mode"), [(0o077, 0o600), (0o027, 0o640), (0o022, 0o644)])
def test_a_written_file_is_readable_by_whom_the_umask_lets(tmp_path: Path, umask: int, mode: int) -> None:
    before = os.umask(umask)
    try:
        for _ in range(2):  # made, and written over
            write_atomic(tmp_path / "run" / "config.yaml", "name: x")
    finally:
        os.umask(before)
    assert (tmp_path / "run" / "config.yaml").stat().st_mode & 0o777 == mode
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["config.yaml"]
