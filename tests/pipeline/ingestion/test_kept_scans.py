from __future__ import annotations

import json
from pathlib import Path

import pytest

from pipeline.contracts import ShardManifest
from pipeline.ingestion import prepare
from pipeline.stream import read_split
from tests.pipeline.ingestion.foreign_tars import SPAM, members_of, tar_config, texts, write_tar


def _notes(folder: Path) -> dict[str, int]:
    """Return when what is kept of each tar was written."""
    return {path.name: path.stat().st_mtime_ns for path in (folder / ".scans").glob("*.json")}


def _told(manifest: ShardManifest) -> dict[str, object]:
    return json.loads(manifest.model_dump_json(by_alias=True))


@pytest.mark.parametrize("keys", ["plain", "of no letters"])
def test_only_new_and_changed_tars_are_read_and_all_is_as_if_prepared_at_once(tmp_path: Path, keys: str) -> None:
    root, config = tmp_path / "in", tar_config(tmp_path / "in")

    def write(name: str, start: int) -> None:
        samples = texts(6, start=start)
        if keys != "plain":
            samples = [{**sample, "__key__": "é" * (i + 1)} for i, sample in enumerate(samples)]
        write_tar(root / name, members_of(samples))

    write("b.tar", 0)
    write("c.tar", 20)
    prepare(config, [SPAM], tmp_path / "out", seed=0)
    before = _notes(tmp_path / "out")
    write("c.tar", 40)
    write("a.tar", 3)  # before the others, and with texts that stand in one of them
    manifest = prepare(config, [SPAM], tmp_path / "out", seed=0)
    after = _notes(tmp_path / "out")
    assert len(after) == 3
    # Where keys tell the number of their tar among the others, and that has changed, the tar is read again.
    assert len(before.items() & after.items()) == (1 if keys == "plain" else 0)
    fresh = prepare(config, [SPAM], tmp_path / "fresh", seed=0)
    assert _told(manifest) == _told(fresh)
    assert manifest.samples_of("spam", "train") == 15
    assert list(read_split(tmp_path / "out", "train")) == list(read_split(tmp_path / "fresh", "train"))
    kept = {path.suffix for path in (tmp_path / "out" / ".scans").iterdir()}
    assert kept == {".json", ".rows", ".places", ".rejects", ".known"}


def test_a_torn_file_or_another_setting_makes_a_tar_be_read_anew(tmp_path: Path) -> None:
    write_tar(tmp_path / "in" / "a.tar", members_of(texts(6)))
    config = tar_config(tmp_path / "in")
    before = _told(prepare(config, [SPAM], tmp_path / "out", seed=0))
    (rows,) = (tmp_path / "out" / ".scans").glob("*.rows")
    rows.write_bytes(rows.read_bytes()[:-1])
    write_tar(tmp_path / "in" / "b.tar", members_of(texts(6, start=50)))
    manifest = prepare(config, [SPAM], tmp_path / "out", seed=0)
    assert _told(manifest)["shards"][0] == before["shards"][0]  # type: ignore[index]
    assert manifest.samples_of("spam", "train") == 12
    other = SPAM.model_copy(update={"label_map": {"0": 1, "1": 0}})
    prepare(config, [other], tmp_path / "out", seed=0)
    assert next(read_split(tmp_path / "out", "train")).label == 1
