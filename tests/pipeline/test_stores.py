"""Data in any store is the data of the folder that was sent there: records, tars of others, shards, scores, bases."""

from __future__ import annotations

import gzip
import json
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from pydantic import ValidationError

from pipeline.contracts import ShardManifest, TaskSpec
from pipeline.errors import InputError
from pipeline.ingestion import DataConfig, prepare, publish
from pipeline.ingestion.records import read_unit, split_units
from pipeline.ingestion.sources import find_sources
from pipeline.modeling.base_files import fetched_base
from pipeline.modeling.config import BaseModelConfig
from pipeline.schemes import SCHEMES
from pipeline.serving.batch_input import find_files
from pipeline.serving.batch_output import Output
from pipeline.storage import filesystem, url_of
from pipeline.stream import CacheConfig, MixedStream
from pipeline.world import World
from tests.pipeline.ingestion.foreign_tars import SPAM, tar_config, texts, write_shards
from tests.pipeline.modeling.tiny import tiny_folder
from tests.pipeline.stores import STORES, Store
from tests.pipeline.stream.test_stream import write_data

TASK = TaskSpec(name="t", template="{text}:", label_words=(" no", " yes"))
FORMS = ("jsonl", "jsonl.gz", "json", "csv", "parquet")


@pytest.fixture(params=STORES, scope="module")
def store(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Store]:
    with (
        pytest.MonkeyPatch.context() as patch,
        STORES[request.param](tmp_path_factory.mktemp("store") / "files", patch) as store,
    ):
        yield store


def is_writable(store: Store) -> bool:
    return SCHEMES[store.url.partition("://")[0]].is_writable


def write_records(path: Path, split: str = "train", count: int = 40) -> Path:
    rows = [{"id": f"{split}-{i}", "text": f"{split} text {i} 👍", "label": i % 2} for i in range(count)]
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".csv":
        pd.DataFrame(rows).to_csv(path, index=False)
    elif path.suffix == ".parquet":
        pd.DataFrame(rows).to_parquet(path)
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows))
    else:
        text = "".join(json.dumps(row) + "\n" for row in rows).encode()
        path.write_bytes(gzip.compress(text) if path.suffix == ".gz" else text)
    return path


def order_of(place: str | Path, cache: Path, reads: Any = "auto") -> list[Any]:
    stream = MixedStream(place, 3, 4, cache=CacheConfig(folder=str(cache), range_reads=reads, patience_s=20))
    return [stream.samples(step, World(0, 1)) for step in range(stream.steps_per_epoch)]


def shards_of(manifest: ShardManifest) -> list[tuple[str, str]]:
    return [(shard.path, shard.sha256) for shard in manifest.shards]


@pytest.mark.parametrize("form", FORMS)
def test_records_in_a_store_prepare_to_the_shards_of_the_folder(store: Store, tmp_path: Path, form: str) -> None:
    place = f"records-{form.replace('.', '-')}"
    for split in ("train", "valid", "test"):
        write_records(store.folder / place / "t" / f"{split}.{form}", split)
    store.send()
    config = DataConfig(source="records", root=f"{store.url}/{place}")
    here = config.model_copy(update={"root": str(store.folder / place)})
    there = prepare(config, [TASK], tmp_path / "there", seed=0)
    assert shards_of(there) == shards_of(prepare(here, [TASK], tmp_path / "here", seed=0))
    assert {shard.split for shard in there.shards} == {"train", "validation", "test"}
    assert prepare(config, [TASK], tmp_path / "there", seed=0) == there


def test_a_file_that_changes_is_prepared_anew_and_never_read_half(store: Store, tmp_path: Path) -> None:
    path = write_records(store.folder / "changing" / "t" / "train.jsonl")
    store.send()
    config = DataConfig(source="records", root=f"{store.url}/changing")
    before = prepare(config, [TASK], tmp_path / "out", seed=0)
    (source,) = find_sources(config, [TASK])
    (unit,) = split_units([source])
    lines = read_unit(unit, config)
    assert next(lines).record["id"] == "train-0"
    path.write_text(path.read_text().replace("text 1", "text one"))
    store.send()
    with pytest.raises(InputError, match="must stay as it is while it is read"):
        list(lines)
    assert shards_of(prepare(config, [TASK], tmp_path / "out", seed=0)) != shards_of(before)


@pytest.mark.parametrize("reads", ["never", "always"])
def test_tars_of_others_are_adopted_where_they_lie_and_a_change_is_noticed(
    store: Store, tmp_path: Path, reads: str
) -> None:
    here = store.folder / f"tars-{reads}"
    write_shards(here / "part-%04d.tar", texts(30), 10)
    store.send()
    files = {"spam": {"train": "part-{0000..0002}.tar"}}
    url = f"{store.url}/{here.name}"
    prepare(tar_config(here, files), [SPAM], tmp_path / "here", seed=0)
    prepare(tar_config(url, files), [SPAM], tmp_path / "there", seed=0)
    expected = order_of(tmp_path / "here", tmp_path / "cache")
    assert order_of(tmp_path / "there", tmp_path / "cache", reads) == expected
    time.sleep(1.1)  # a web server's times have no fractions
    shutil.copy(here / "part-0000.tar", here / "part-0001.tar")
    store.send()
    with pytest.raises(InputError, match="are gone or have changed"):
        order_of(tmp_path / "there", tmp_path / "cache", reads)


@pytest.mark.parametrize("reads", ["never", "always"])
def test_shards_in_a_store_are_read_in_the_order_of_the_folder(store: Store, tmp_path: Path, reads: str) -> None:
    local = tmp_path / "shards"
    write_data(local, {"one": [20, 13], "other": [9]})
    url = f"{store.url}/shards-{reads}"
    if is_writable(store):
        (local / "profile.json").write_text("{}")
        assert publish(local, url) == f"{url}/manifest.json"
        fs, root = filesystem(url)
        before = fs.info(f"{root}/one-train-000000.tar")
        publish(local, url)  # what is there is not sent again
        assert fs.info(f"{root}/one-train-000000.tar") == before
    else:
        shutil.copytree(local, store.folder / f"shards-{reads}")
    assert order_of(url, tmp_path / "cache", reads) == order_of(local, tmp_path / "cache")
    if not is_writable(store):
        with pytest.raises(InputError, match=r"shards must go to .*s3://.* can only be read"):
            publish(local, url)
        (store.folder / f"shards-{reads}" / "one-train-000000.tar").unlink()
        with pytest.raises(InputError, match=r"1 are missing \['one-train-000000.tar'\]"):
            order_of(url, tmp_path / "cache", reads)


def test_scores_are_written_whole_where_that_is_possible(store: Store) -> None:
    url = f"{store.url}/scores"
    if not is_writable(store):
        with pytest.raises(InputError, match="scores must go to a folder"):
            Output(url, [])
        return
    output = Output(url, [])

    def breaks(file: Any) -> None:
        file.write(b"half")
        raise RuntimeError

    with pytest.raises(RuntimeError):
        output.write("a/b.bin", breaks)
    assert output.read("a/b.bin") is None
    output.write("a/b.bin", lambda file: file.write(b"whole"))
    output.write("a/b.bin", lambda file: file.write(b"again"))
    assert output.read("a/b.bin") == b"again"


def test_files_to_score_are_found_under_their_own_urls(store: Store) -> None:
    write_records(store.folder / "to-score" / "day" / "a.jsonl")
    store.send()
    url = f"{store.url}/to-score"
    (file,) = find_files(f"{url}/day/a.jsonl")
    assert (file.location, file.name) == (f"{url}/day/a.jsonl", "a.jsonl")
    assert file.version
    if store.url.startswith("https"):
        with pytest.raises(InputError, match="no list of the files in a folder"):
            find_files(url)
        return
    assert [found.location for found in find_files(url)] == [file.location]
    assert [found.location for found in find_files(f"{url}/*/*.jsonl")] == [file.location]


@pytest.mark.parametrize(
    "url", ["gs://b/x/y", "az://c/x/y", "abfs://c@acct.dfs.core.windows.net/x/y", "hf://datasets/o/n/y"]
)
def test_a_path_that_was_found_is_written_as_its_folder_was(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_NAME", "acct")
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", "http://127.0.0.1:9")
    monkeypatch.setattr("pipeline.storage._check_online", lambda text: None)
    _, path = filesystem(url)
    assert url_of(url, f"{path}/z") == f"{url}/z"
    assert filesystem(url_of(url, f"{path}/z"))[1] == f"{path}/z"


@pytest.mark.parametrize("is_cut", [False, True], ids=["one file", "an index of files"])
def test_a_base_model_is_fetched_from_a_store_with_all_its_files(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_cut: bool
) -> None:
    if store.url.startswith("hf"):
        with pytest.raises(ValidationError, match=r"write base: org/name and revision"):
            BaseModelConfig(base=store.url)
        return
    monkeypatch.setenv("MTL_LORA_CACHE", str(tmp_path / "cache"))
    model = tiny_folder(store.folder / f"model-{is_cut}", "llama")
    if is_cut:
        part = (model / "model.safetensors").rename(model / "model-00001-of-00001.safetensors")
        (model / "model.safetensors.index.json").write_text(
            json.dumps({"weight_map": {"a": part.name, "b": part.name}})
        )
    store.send()
    folder = fetched_base(BaseModelConfig(base=f"{store.url}/{model.name}"))
    assert {path.name for path in folder.iterdir()} == {path.name for path in model.iterdir()}
    for path in model.iterdir():
        assert (folder / path.name).read_bytes() == path.read_bytes()
