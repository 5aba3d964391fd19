"""A backup that is not whole is not restored."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest

from infra.mlflow.backup import read_backup
from pipeline.errors import InputError


@pytest.fixture
def kept(tmp_path: Path) -> Path:
    (tmp_path / "objects").mkdir()
    (tmp_path / "database.dump").write_bytes(b"dump")
    seen = {data: {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()} for data in (b"dump", b"weights")}
    (tmp_path / "objects" / seen[b"weights"]["sha256"]).write_bytes(b"weights")
    objects = {"1/models/m-1/a": seen[b"weights"], "1/models/m-2/a": seen[b"weights"]}
    manifest = {"schema": 1, "made": "2026-03-02T06:00:00+00:00", "database": seen[b"dump"], "objects": objects}
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    return tmp_path


def test_a_whole_backup_is_read(kept: Path) -> None:
    assert read_backup(kept)["objects"].keys() == {"1/models/m-1/a", "1/models/m-2/a"}


@pytest.mark.parametrize("name", ["database.dump", "objects/*"])
@pytest.mark.parametrize("fault", ["changed", "cut", "gone"])
def test_a_damaged_file_is_named(kept: Path, name: str, fault: str) -> None:
    (path,) = kept.glob(name)
    data = path.read_bytes()
    path.unlink()
    if fault != "gone":
        path.write_bytes(data[:-1] + b"?" if fault == "changed" else data[:-1])
    with pytest.raises(InputError, match=rf"{path.name} must be as it was written"):
        read_backup(kept)


def test_what_is_no_backup_or_of_another_version_is_refused(kept: Path) -> None:
    path = kept / "manifest.json"
    path.write_text(path.read_text().replace('"schema": 1', '"schema": 2'))
    with pytest.raises(InputError, match="must have schema 1, got 2"):
        read_backup(kept)
    path.unlink()
    with pytest.raises(InputError, match=r"it has no manifest\.json"):
        read_backup(kept)
