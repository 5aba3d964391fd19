from __future__ import annotations

import gzip
import importlib
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pipeline.contracts import ShardManifest, TaskSpec
from pipeline.errors import InputError
from pipeline.ingestion import DataConfig, prepare
from pipeline.stream import read_split
from pipeline.synthetic import SyntheticAdsConfig, synthetic_ads_tasks

module = importlib.import_module("pipeline.ingestion.prepare")  # the package has a function of that name
SPAM = TaskSpec(name="spam", template="{text}\nSpam:", label_words=(" no", " yes"))
SCRIPT = """
import sys, time
from pathlib import Path
from pipeline.contracts import TaskSpec
from pipeline.ingestion import DataConfig, prepare
spec = TaskSpec(name="spam", template="{text}\\nSpam:", label_words=(" no", " yes"))
def slowly(function, items):
    for item in items:
        yield function(item)
        time.sleep(0.05)
config = DataConfig(source="records", root=sys.argv[1], samples_per_shard=10)
prepare(config, [spec], Path(sys.argv[2]), seed=0, mapper=slowly)
"""


def content(folder: Path) -> dict[str, bytes]:
    return {
        str(p.relative_to(folder)): p.read_bytes()
        for p in sorted(folder.rglob("*"))
        if p.is_file() and p.name[0] != "."
    }


def write_files(root: Path, files: int, rows: int) -> None:
    (root / "spam").mkdir(parents=True)
    for number in range(files):
        lines = [json.dumps({"text": f"text {number} {row}", "label": row % 2}) for row in range(rows)]
        (root / f"spam/part-{number}.jsonl").write_text("\n".join(lines) + '\n{"text": 5\n')


def config_of(root: Path) -> DataConfig:
    files = {"spam": {"train": "spam/part-*.jsonl"}}
    return DataConfig(source="records", root=str(root), files=files, samples_per_shard=10)


@pytest.mark.slow
@pytest.mark.parametrize("moment", ["scan", "write"])
def test_a_run_killed_half_way_resumes_to_the_same_bytes(tmp_path: Path, moment: str) -> None:
    write_files(tmp_path / "in", files=6, rows=400)
    prepare(config_of(tmp_path / "in"), [SPAM], tmp_path / "whole", seed=0)
    script = SCRIPT.replace("samples_per_shard=10", f"samples_per_shard=10, files={config_of(tmp_path).files!r}")
    out = tmp_path / "killed"
    process = subprocess.Popen([sys.executable, "-c", script, str(tmp_path / "in"), str(out)], env=os.environ)
    wanted = "unit-000002.json" if moment == "scan" else "spam-train-000020.tar.json"
    deadline = time.monotonic() + 60
    while not list(out.glob(f".work/*/{wanted}")) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert process.returncode == -signal.SIGKILL
    assert not (out / "manifest.json").exists() and list(out.glob(".work/*/*"))
    prepare(config_of(tmp_path / "in"), [SPAM], out, seed=0)
    assert content(out) == content(tmp_path / "whole")
    assert not list(out.glob(".work")) and not list(out.glob("*.part"))


@pytest.mark.slow
def test_two_processes_write_the_same_bytes_as_one(tmp_path: Path) -> None:
    write_files(tmp_path / "in", files=4, rows=100)
    prepare(config_of(tmp_path / "in"), [SPAM], tmp_path / "one", seed=0)
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        prepare(config_of(tmp_path / "in"), [SPAM], tmp_path / "two", seed=0, mapper=pool.imap)
    assert content(tmp_path / "one") == content(tmp_path / "two")


def test_append_adds_a_day_and_leaves_the_old_shards_alone(tmp_path: Path) -> None:
    synthetic = SyntheticAdsConfig(days=4, rows_per_day=30)
    tasks = synthetic_ads_tasks()
    first = DataConfig(synthetic=synthetic, windows={"train": ("2026-01-05", "2026-01-06")})
    second = DataConfig(synthetic=synthetic, windows={"train": ("2026-01-07", "2026-01-07")})
    old = prepare(first, tasks, tmp_path, seed=0)
    before = content(tmp_path)
    new = prepare(second, tasks, tmp_path, seed=0, append=True)
    after = content(tmp_path)
    whole = {"manifest.json", "profile.json"}  # these two are of all partitions
    assert all(after[name] == data for name, data in before.items() if name not in whole)
    assert (new.window, len(new.appended)) == (("2026-01-05", "2026-01-07"), 1)
    samples = list(read_split(tmp_path, "train", "query_vertical"))
    assert len({s.key for s in samples}) == len(samples) >= 80
    assert [s.time for s in samples] == sorted(str(s.time) for s in samples)
    assert prepare(second, tasks, tmp_path, seed=0, append=True) == new
    assert content(tmp_path) == after
    assert all(shard in new.shards for shard in old.shards)


def test_appended_texts_that_stand_in_an_earlier_partition_are_put_aside(tmp_path: Path) -> None:
    for day, words in (("2026-01-05", "abc"), ("2026-01-06", "cde")):
        path = tmp_path / "in" / day / "spam.jsonl.gz"
        path.parent.mkdir(parents=True)
        path.write_bytes(gzip.compress("\n".join(json.dumps({"id": 7, "text": w, "label": 0}) for w in words).encode()))

    def day(date: str) -> DataConfig:
        return DataConfig(source="records", root=str(tmp_path / "in"), windows={"train": (date, date)})

    with pytest.raises(InputError, match="ShardManifest must be a file"):
        prepare(day("2026-01-05"), [SPAM], tmp_path / "out", seed=0, append=True)
    prepare(day("2026-01-05"), [SPAM], tmp_path / "out", seed=0)
    manifest = prepare(day("2026-01-06"), [SPAM], tmp_path / "out", seed=0, append=True)
    samples = list(read_split(tmp_path / "out", "train"))
    assert [s.fields["text"] for s in samples] == list("abcde")
    assert len({s.key for s in samples}) == 5
    assert [(r.reason, r.records) for r in manifest.rejected] == [("texts stand in an earlier partition", 1)]
    other = SPAM.model_copy(update={"template": "{text}?"})
    with pytest.raises(InputError, match="must have the tasks of the shards that are there"):
        prepare(day("2026-01-06"), [other], tmp_path / "out", seed=0, append=True)


def test_a_new_preparation_replaces_the_shards_of_the_old_one(tmp_path: Path) -> None:
    write_files(tmp_path / "in", files=2, rows=50)
    prepare(config_of(tmp_path / "in"), [SPAM], tmp_path / "out", seed=0)
    fewer = config_of(tmp_path / "in").model_copy(update={"samples_per_shard": 60})
    manifest = prepare(fewer, [SPAM], tmp_path / "out", seed=0)
    assert sorted(p.name for p in (tmp_path / "out").glob("*.tar")) == sorted(s.path for s in manifest.shards)
    assert ShardManifest.read(tmp_path / "out/manifest.json") == manifest


def day_of(tmp_path: Path, date: str, words: str = "") -> DataConfig:
    path = tmp_path / "in" / date / "spam.jsonl"
    if words:
        path.parent.mkdir(parents=True)
        path.write_text("".join(json.dumps({"text": word, "label": 0}) + "\n" for word in words))
    return DataConfig(source="records", root=str(tmp_path / "in"), windows={"train": (date, date)})


def prepare_and_append(tmp_path: Path) -> tuple[DataConfig, DataConfig]:
    first, second = day_of(tmp_path, "2026-01-05", "abc"), day_of(tmp_path, "2026-01-06", "def")
    prepare(first, [SPAM], tmp_path / "out", seed=0)
    prepare(second, [SPAM], tmp_path / "out", seed=0, append=True)
    return first, second


def test_shards_with_appended_partitions_are_not_prepared_anew(tmp_path: Path) -> None:
    first, _ = prepare_and_append(tmp_path)
    before = content(tmp_path / "out")
    with pytest.raises(InputError, match=r"must not be prepared anew, .* has 1 of them.*into another folder"):
        prepare(first, [SPAM], tmp_path / "out", seed=1)
    assert content(tmp_path / "out") == before
    lost = tmp_path / "out/spam-train-000000.tar"
    lost.unlink()
    with pytest.raises(InputError, match=r"whole in .*, spam-train-000000\.tar is missing .*restore it"):
        prepare(first, [SPAM], tmp_path / "out", seed=0)
    assert content(tmp_path / "out") == {name: data for name, data in before.items() if name != lost.name}


@pytest.mark.parametrize("name", ["spam-train-000000.index.npz", "spam-train-000001.tar"])
@pytest.mark.parametrize("again", [True, False])
def test_nothing_is_appended_where_a_file_is_missing(tmp_path: Path, name: str, again: bool) -> None:
    _, second = prepare_and_append(tmp_path)
    (tmp_path / "out" / name).unlink()
    before = content(tmp_path / "out")
    config = second if again else day_of(tmp_path, "2026-01-07", "ghi")
    with pytest.raises(InputError, match=rf"{name} is missing .*restore it"):
        prepare(config, [SPAM], tmp_path / "out", seed=0, append=True)
    assert content(tmp_path / "out") == before


def test_nothing_is_appended_to_a_damaged_index(tmp_path: Path) -> None:
    prepare_and_append(tmp_path)
    index = tmp_path / "out/spam-train-000000.index.npz"
    index.write_bytes(index.read_bytes()[:-1] + b"x")
    with pytest.raises(InputError, match=r"spam-train-000000\.index\.npz must have the digest.*restore it"):
        prepare(day_of(tmp_path, "2026-01-07", "ghi"), [SPAM], tmp_path / "out", seed=0, append=True)


def test_the_manifest_appended_to_is_the_one_that_stands_under_the_lock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepare(day_of(tmp_path, "2026-01-05", "abc"), [SPAM], tmp_path / "out", seed=0)
    other, mine = day_of(tmp_path, "2026-01-06", "def"), day_of(tmp_path, "2026-01-07", "ghi")
    real = module.FileLock

    def lock_after_another(path: Path, timeout: float) -> object:
        monkeypatch.setattr(module, "FileLock", real)
        prepare(other, [SPAM], tmp_path / "out", seed=0, append=True)
        return real(path, timeout=timeout)

    monkeypatch.setattr(module, "FileLock", lock_after_another)
    manifest = prepare(mine, [SPAM], tmp_path / "out", seed=0, append=True)
    assert len(manifest.appended) == 2
    assert [s.fields["text"] for s in read_split(tmp_path / "out", "train")] == list("abcdefghi")
