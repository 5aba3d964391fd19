from __future__ import annotations

import hashlib
import importlib
import json
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest

from pipeline.contracts import ShardManifest, TaskSpec
from pipeline.ingestion import DataConfig, prepare, publish
from pipeline.shard_index import ShardIndex
from pipeline.stream import read_split

SPAM = TaskSpec(name="spam", template="{text}:", label_words=(" no", " yes"))


def test_a_changed_index_of_equal_size_is_sent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def bucket(url: str) -> tuple[Any, str]:
        return fsspec.filesystem("file", auto_mkdir=True), str(tmp_path / url.removeprefix("s3://"))

    monkeypatch.setattr(importlib.import_module("pipeline.ingestion.publish"), "filesystem", bucket)
    (tmp_path / "in/spam").mkdir(parents=True)
    (tmp_path / "in/spam/train.jsonl").write_text(json.dumps({"text": "a", "label": 0}))
    manifest = prepare(DataConfig(source="records", root=str(tmp_path / "in")), [SPAM], tmp_path / "out", seed=0)
    publish(tmp_path / "out", "s3://bucket")
    path = tmp_path / "out/spam-train-000000.index.npz"
    index = ShardIndex.from_bytes(path.read_bytes(), path.name)
    data = ShardIndex(**{**index.__dict__, "lengths": index.lengths + np.int32(1)}).to_bytes()
    assert len(data) == path.stat().st_size
    path.write_bytes(data)
    digest = hashlib.sha256(data).hexdigest()
    shards = [{**shard.model_dump(), "index_sha256": digest} for shard in manifest.shards]
    ShardManifest.model_validate({**manifest.model_dump(), "shards": shards}).write(tmp_path / "out/manifest.json")
    publish(tmp_path / "out", "s3://bucket")
    assert (tmp_path / "bucket" / path.name).read_bytes() == data
    assert [s.fields["text"] for s in read_split(tmp_path / "bucket", "train")] == ["a"]
