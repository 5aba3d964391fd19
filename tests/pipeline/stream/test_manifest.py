from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pipeline.contracts import ShardInfo, ShardManifest, TaskSpec
from pipeline.errors import InputError
from pipeline.stream import MixedStream, load_manifest, manifest, shard_files, shard_table
from pipeline.world import World
from tests.pipeline.stream.test_stream import write_data

TASKS = ("a", "b")


def shard(number: int, task: str = "a", split: str = "train", samples: int = 3) -> ShardInfo:
    return ShardInfo(
        path=f"{task}-{split}-{number:06d}.tar", task=task, split=split, samples=samples, bytes=10240 + number,
        sha256=f"{number:064x}", index_sha256=None if number % 3 else "f" * 64,
        label_counts={"0": 1, f"{number}.5": 2}, window=("2026-01-01", "2026-01-02") if number % 2 else None,
    )  # fmt: skip


def written(folder: Path, shards: list[ShardInfo]) -> Path:
    specs = tuple(TaskSpec(name=t, template='{text}"]\n  ],\n', label_words=(" no", " yes")) for t in TASKS)
    ShardManifest(tasks=specs, shards=tuple(shards), source_sha256="0" * 64).write(folder / "manifest.json")
    return folder / "manifest.json"


@pytest.fixture
def by_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(manifest, "LARGE_BYTES", 0)
    monkeypatch.setattr(shard_table, "_CHUNK_BYTES", 700)


@given(
    numbers=st.lists(st.integers(0, 99), min_size=1, max_size=20, unique=True), split=st.sampled_from(("train", "x"))
)
@settings(max_examples=20, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_manifest_read_by_columns_is_the_one_read_whole(
    tmp_path: Path, by_columns: None, numbers: list[int], split: str
) -> None:
    shards = [shard(n, task, s, n + 1) for n in numbers for task in TASKS for s in ("train", "x")]
    path = written(tmp_path, shards)
    assert load_manifest(path)[0].shards == tuple(shards)
    found = manifest.open_manifest(path, split)
    for task in TASKS:
        whole = sorted((s for s in shards if (s.task, s.split) == (task, split)), key=lambda s: s.path)
        table = found.shards[task]
        assert list(table) == list(table[:]) == whole
        assert table.paths == [s.path for s in whole]
        assert (table.samples.tolist(), table.bytes.tolist()) == ([s.samples for s in whole], [s.bytes for s in whole])
    assert (found.sha256, found.root) == load_manifest(path)[1:]


def test_each_shard_stands_in_a_line(tmp_path: Path) -> None:
    path = written(tmp_path, [shard(n) for n in range(3)])
    lines = path.read_text().splitlines()
    assert [json.loads(line.rstrip(","))["path"] for line in lines if line.startswith('    {"path"')] == [
        shard(n).path for n in range(3)
    ]
    empty = ShardManifest(tasks=(), shards=(), source_sha256="0")
    empty.write(path)
    assert ShardManifest.read(path) == empty


def test_the_order_is_the_same_by_columns_and_from_a_manifest_of_earlier_releases(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = write_data(tmp_path, {"big": [9, 4], "small": [5]})
    whole = [MixedStream(tmp_path, 1, 6).global_batch(step) for step in range(3)]
    monkeypatch.setattr(manifest, "LARGE_BYTES", 0)
    assert [MixedStream(tmp_path, 1, 6).global_batch(step) for step in range(3)] == whole
    text = json.dumps(found.model_dump(mode="json", by_alias=True), indent=2)
    (tmp_path / "manifest.json").write_text(text + "\n")
    assert [MixedStream(tmp_path, 1, 6).global_batch(step) for step in range(3)] == whole


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        ('"samples":3', '"samples":0', "at least one sample"),
        ('"samples":3', '"samples":"3"', "one shard a line"),
        ('"samples":3,', "", "with its path, task, split, samples and bytes"),
        ('"task":"a"', '"task":"c"', r"tasks are \['a', 'c'\]"),
        ('    {"path":"a-train-000001', '  x {"path":"a-train-000001', "one shard a line"),
    ],
)
def test_damaged_lines_are_refused(tmp_path: Path, by_columns: None, before: str, after: str, message: str) -> None:
    path = written(tmp_path, [shard(0), shard(1)])
    first, found, rest = path.read_text().rpartition(before)
    assert found
    path.write_text(first + after + rest)
    with pytest.raises(InputError, match=message):
        manifest.open_manifest(path, "train")


def test_what_a_shard_says_beside_its_columns_is_checked_when_it_is_used(tmp_path: Path, by_columns: None) -> None:
    path = written(tmp_path, [shard(0), shard(1), shard(0, "b")])
    path.write_text(path.read_text().replace(f'"sha256":"{1:064x}"', '"sha256":"none"'))
    table = manifest.open_manifest(path, "train").shards["a"]
    assert table[0] == shard(0)
    with pytest.raises(InputError, match="must hold valid shards"):
        table[1]


def test_of_very_many_shards_the_names_are_looked_up_and_the_size_when_one_is_opened(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = write_data(tmp_path, {"big": [9, 4]})
    monkeypatch.setattr(shard_files, "SIZED_SHARDS", 1)
    cut = tmp_path / found.shards[0].path
    cut.write_bytes(cut.read_bytes()[:-512])
    stream = MixedStream(tmp_path, 1, 13)
    with pytest.raises(InputError, match="bytes of the manifest"):
        list(stream.batches(World(0, 1), 0, 1))
    cut.unlink()
    with pytest.raises(InputError, match="1 are missing"):
        MixedStream(tmp_path, 1, 13)
