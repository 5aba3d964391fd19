"""Shards in S3, on a real server: the same stream as from a folder, and what it survives."""

from __future__ import annotations

import gzip
import json
import multiprocessing
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from torch.utils.data import DataLoader

from pipeline.contracts import ShardManifest, TaskSpec
from pipeline.errors import InputError
from pipeline.ingestion import DataConfig, compare_drift, prepare, publish
from pipeline.ingestion.records import read_unit, split_units
from pipeline.ingestion.source_file import SourceFile
from pipeline.storage import filesystem
from pipeline.stream import CacheConfig, MixedStream, SampleLedger, StreamDataset, merge_ledgers, read_split
from pipeline.synthetic import SyntheticAdsConfig, synthetic_ads_tasks, write_partition
from pipeline.world import World
from tests.pipeline.ingestion.foreign_tars import SPAM, tar_config, write_shards
from tests.pipeline.ingestion.foreign_tars import texts as text_samples
from tests.pipeline.s3_server import S3Server

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]
SYNTHETIC = SyntheticAdsConfig(days=3, rows_per_day=60)
URL = "s3://shards/ads"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    server = S3Server(tmp_path_factory.mktemp("s3"))
    server.start()
    yield server
    server.kill()


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shards")
    prepare(DataConfig(synthetic=SYNTHETIC, samples_per_shard=20), synthetic_ads_tasks(), folder, seed=0)
    return folder


@pytest.fixture
def remote(server: S3Server, local: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    for name, value in server.environment().items():
        monkeypatch.setenv(name, value)
    assert publish(local, URL) == f"{URL}/manifest.json"
    return URL


def keep_ledger(place: str | Path, folder: Path, cache: CacheConfig | None) -> str:
    for rank in range(2):
        stream = MixedStream(place, 5, 8, cache=cache)
        with SampleLedger(folder, World(rank, 2)) as ledger:
            for step, samples in enumerate(stream.batches(World(rank, 2), 0, stream.steps_per_epoch)):
                ledger.record(step, samples)
    return merge_ledgers(folder).read_text()


@pytest.mark.parametrize("reads", ["auto", "always"])
def test_the_ledger_on_s3_is_the_one_on_local_shards(remote: str, local: Path, tmp_path: Path, reads: Any) -> None:
    cache = CacheConfig(folder=str(tmp_path / "cache"), range_reads=reads)
    assert keep_ledger(remote, tmp_path / "s3", cache) == keep_ledger(local, tmp_path / "local", None)
    cached = list((tmp_path / "cache").glob("*.tar"))
    trains = [s for s in ShardManifest.read(local / "manifest.json").shards if s.split == "train"]
    assert len(cached) == (len(trains) if reads == "auto" else 0)


@pytest.mark.parametrize("start", ["fork", "spawn"])
def test_loader_workers_read_from_s3(remote: str, local: Path, tmp_path: Path, start: str) -> None:
    stream = MixedStream(remote, 5, 8, cache=CacheConfig(folder=str(tmp_path / "cache")))
    stream.global_batch(0)  # files are open in the parent
    loader = DataLoader(
        StreamDataset(stream, World(0, 1), 0, 6), batch_size=None, num_workers=2, multiprocessing_context=start
    )
    read = [[f"{s.task}/{s.key}" for s in samples] for samples in loader]
    assert read == [MixedStream(local, 5, 8).global_batch(step) for step in range(6)]


def test_a_cache_too_small_for_the_shards_reads_ranges_and_stays_small(
    remote: str, local: Path, tmp_path: Path
) -> None:
    cache = CacheConfig(folder=str(tmp_path / "cache"), max_bytes=60_000)
    stream = MixedStream(remote, 1, 8, cache=cache)
    assert stream.working_set_bytes > 60_000
    plain = MixedStream(local, 1, 8)
    for step in range(10):
        assert stream.samples(step, World(0, 1)) == plain.samples(step, World(0, 1))
    assert sum(p.stat().st_size for p in (tmp_path / "cache").iterdir() if p.is_file()) <= 60_000


def test_records_in_s3_prepare_to_the_shards_of_local_ones(remote: str, local: Path, tmp_path: Path) -> None:
    fs, _ = filesystem("s3://shards")
    days = [day for split in SYNTHETIC.windows().values() for day in split]
    for day in sorted(set(days)):
        for path in write_partition(SYNTHETIC, day, tmp_path / "in"):
            fs.put_file(str(path), f"shards/raw/{path.relative_to(tmp_path / 'in')}")
    config = DataConfig(source="records", root="s3://shards/raw", windows=SYNTHETIC.windows(), samples_per_shard=20)
    manifest = prepare(config, synthetic_ads_tasks(), tmp_path / "out", seed=0)
    made = ShardManifest.read(local / "manifest.json")
    assert [shard.sha256 for shard in manifest.shards] == [shard.sha256 for shard in made.shards]
    with pytest.raises(InputError, match="found none of"):
        missing = DataConfig(source="records", root="s3://shards/nothing")
        prepare(missing, synthetic_ads_tasks(), tmp_path / "other", seed=0)


def test_publishing_again_sends_only_what_is_new(remote: str, local: Path) -> None:
    fs, _ = filesystem(remote)
    manifest = ShardManifest.read(local / "manifest.json")
    names = [manifest.shards[0].path, "manifest.json", "schemas/record-query_vertical.schema.json"]
    before = [fs.info(f"{remote}/{name}")["LastModified"] for name in names]
    time.sleep(1.1)
    publish(local, remote)
    assert [fs.info(f"{remote}/{name}")["LastModified"] for name in names] == before
    fs.rm_file(f"{remote}/{names[0]}")
    publish(local, remote)
    assert fs.cat_file(f"{remote}/{names[0]}") == (local / names[0]).read_bytes()
    assert compare_drift(remote, local).verdict == "ok"


def test_a_missing_and_a_damaged_object_are_said(remote: str, tmp_path: Path) -> None:
    fs, _ = filesystem(remote)
    manifest = ShardManifest.model_validate_json(fs.cat_file(f"{remote}/manifest.json"))
    shard = next(shard for shard in manifest.shards if shard.split == "train")
    data = fs.cat_file(f"{remote}/{shard.path}")
    try:
        fs.rm_file(f"{remote}/{shard.path}")
        with pytest.raises(InputError, match="1 are missing"):
            MixedStream(remote, 0, 8)
        fs.pipe_file(f"{remote}/{shard.path}", data[:3000])
        with pytest.raises(InputError, match=r"0 are missing .* 1 have another size"):
            MixedStream(remote, 0, 8)
        fs.pipe_file(f"{remote}/{shard.path}", data[:3000] + bytes([data[3000] ^ 1]) + data[3001:])
        cache = CacheConfig(folder=str(tmp_path / "cache"))
        with pytest.raises(InputError, match="fetched twice with another"):
            list(read_split(remote, "train", shard.task, cache=cache))
    finally:
        fs.pipe_file(f"{remote}/{shard.path}", data)


def test_refused_credentials_are_said_at_once(
    remote: str, local: Path, server: S3Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name, value in server.environment("tester", "wrong-secret").items():
        monkeypatch.setenv(name, value)
    start = time.monotonic()
    with pytest.raises(InputError, match="readable with the credentials at hand, it was refused"):
        MixedStream(remote, 0, 8, cache=CacheConfig(folder=str(tmp_path)))
    with pytest.raises(InputError, match="with the credentials at hand, it was refused") as caught:
        publish(local, URL)
    records = DataConfig(source="records", root="s3://shards/raw")
    with pytest.raises(InputError, match="with the credentials at hand, it was refused"):
        prepare(records, synthetic_ads_tasks(), tmp_path / "out", seed=0)
    with pytest.raises(InputError, match="with the credentials at hand, it was refused"):
        compare_drift(URL, local)
    assert "wrong-secret" not in str(caught.value)
    assert time.monotonic() - start < 30


def read_epoch(place: str, folder: str, rank: int, seen: Any, go_on: Any) -> list[str]:
    cache = CacheConfig(folder=f"{folder}/cache-{rank}", patience_s=200, range_reads="always")
    stream = MixedStream(place, 9, 8, cache=cache)
    keys = []
    for step in range(stream.steps_per_epoch):
        keys += [f"{s.task}/{s.key}" for s in stream.samples(step, World(rank, 2))]
        if step == 5:
            seen.put(rank)
            go_on.wait(60)
    return keys


def test_a_server_killed_and_restarted_within_an_epoch_costs_time_only(
    remote: str, local: Path, server: S3Server, tmp_path: Path
) -> None:
    context = multiprocessing.get_context("spawn")
    with context.Manager() as manager, context.Pool(2) as pool:
        seen, go_on = manager.Queue(), manager.Event()
        results = [pool.apply_async(read_epoch, (remote, str(tmp_path), rank, seen, go_on)) for rank in range(2)]
        for _ in range(2):
            seen.get(timeout=300)
        server.kill()
        go_on.set()
        time.sleep(2)
        server.start()
        parts = [result.get(timeout=600) for result in results]
    stream = MixedStream(local, 9, 8)
    for rank in range(2):
        expected = [k for s in range(stream.steps_per_epoch) for k in stream.rank_batch(s, World(rank, 2))]
        assert parts[rank] == expected


def test_a_folder_with_the_signs_of_a_glob_is_none_on_s3(server: S3Server, remote: str, tmp_path: Path) -> None:
    spec = TaskSpec(name="t", template="{text}:", label_words=(" no", " yes"))
    fs, _ = filesystem(URL)
    for folder, texts in (("run[1]", 3), ("run1", 5)):
        lines = "".join(f'{{"text": "text {n}", "label": 1}}\n' for n in range(texts))
        fs.pipe_file(f"shards/{folder}/t/train.jsonl", lines.encode())
    for number, files in enumerate(({}, {"t": {"train": "t/tr*.jsonl"}}, {"t": {"train": "t/train.jsonl"}})):
        config = DataConfig(source="records", root="s3://shards/run[1]", files=files)
        assert prepare(config, [spec], tmp_path / str(number), seed=0).samples_of("t", "train") == 3


@pytest.mark.parametrize("form", ["jsonl", "jsonl.gz", "csv", "csv.gz", "parquet"])
def test_records_of_every_form_are_read_from_s3(remote: str, tmp_path: Path, form: str) -> None:
    rows = [{"text": f"text, {n}", "label": n % 2} for n in range(1000)]
    if form == "parquet":
        data = pa.BufferOutputStream()
        pq.write_table(pa.Table.from_pylist(rows), data)
        content = data.getvalue().to_pybytes()
    elif form.startswith("csv"):
        content = "".join(["text,label\n", *(f'"{row["text"]}",{row["label"]}\n' for row in rows)]).encode()
    else:
        content = "".join(json.dumps(row) + "\n" for row in rows).encode()
    fs, _ = filesystem(URL)
    fs.pipe_file(f"shards/{form}/t/train.{form}", gzip.compress(content) if form.endswith("gz") else content)
    spec = TaskSpec(name="t", template="{text}:", label_words=(" no", " yes"))
    prepare(DataConfig(source="records", root=f"s3://shards/{form}"), [spec], tmp_path, seed=0)
    assert [sample.fields["text"] for sample in read_split(tmp_path, "train")] == [row["text"] for row in rows]
    source = SourceFile("t", "train", f"s3://shards/{form}/t/train.{form}", form, size=len(content))
    units = split_units([source], unit_bytes=1000)
    assert sum(1 for unit in units for _ in read_unit(unit, DataConfig())) == 1000


@pytest.mark.parametrize("reads", ["never", "always"])
def test_tars_of_others_in_s3_are_adopted_there_and_a_change_is_noticed(
    server: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reads: Any
) -> None:
    for name, value in server.environment().items():
        monkeypatch.setenv(name, value)
    url, here = f"s3://shards/foreign-{reads}", tmp_path / "in"
    write_shards(here / "part-%04d.tar", text_samples(30), 10)
    fs, root = filesystem(url)
    for path in sorted(here.iterdir()):
        fs.put_file(str(path), f"{root}/{path.name}")
    files = {"spam": {"train": "part-{0000..0002}.tar"}}
    cache = CacheConfig(folder=str(tmp_path / "cache"), range_reads=reads)
    prepare(tar_config(here, files), [SPAM], tmp_path / "here", seed=0)
    prepare(tar_config(url, files), [SPAM], tmp_path / "there", seed=0)
    published = publish(tmp_path / "there", f"{url}/index")
    assert not [name for name in fs.ls(f"{root}/index") if name.endswith(".tar")]
    ledgers = [
        keep_ledger(place, tmp_path / f"ledger-{number}", cache)
        for number, place in enumerate((tmp_path / "here", tmp_path / "there", published))
    ]
    assert ledgers[0] == ledgers[1] == ledgers[2]
    fs.put_file(str(here / "part-0000.tar"), f"{root}/part-0001.tar")
    with pytest.raises(InputError, match="1 of 3 are gone or have changed"):
        MixedStream(tmp_path / "there", 0, 4, cache=cache)
    with pytest.raises(InputError, match="must lie where readers reach them"):
        publish(tmp_path / "here", f"{url}/other")
