"""The stream inside webdataset's own pipelines and loader, with the real library."""

from __future__ import annotations

import copy
import gc
import io
import json
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import webdataset as wds
from PIL import Image

from pipeline.contracts import Sample, ShardManifest, TaskSpec
from pipeline.errors import InputError
from pipeline.ingestion.shards import write_shard
from pipeline.stream import LossDriven, MixedStream
from pipeline.stream.wds_stage import to_sample
from pipeline.world import World

SIZES = {"big": [13, 9], "small": [10]}
BATCH, EPOCH = 4, 8


def png(number: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (4, 3), (number, 0, 0)).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shards")
    shards = []
    for task, counts in SIZES.items():
        for number, count in enumerate(counts):
            samples = [
                Sample(
                    key=f"{number}-{row}", task=task, fields={"text": f"{task} {number} {row}"}, label=row % 2,
                    image=png(row) if task == "small" else None,
                )
                for row in range(count)
            ]  # fmt: skip
            shards.append(write_shard(folder, task, "train", number, samples))
    specs = tuple(TaskSpec(name=task, template="{text}:", label_words=(" no", " yes")) for task in SIZES)
    ShardManifest(tasks=specs, shards=tuple(shards), source_sha256="0" * 64).write(folder / "manifest.json")
    return folder


def name_of(sample: dict[str, Any]) -> str:
    return f"{sample['__step__']:02d} {json.loads(sample['json'])['task']}/{sample['__key__']}"


def loaded(stage: Any, rows: int, workers: int) -> list[list[str]]:
    pipeline = wds.DataPipeline(stage, wds.map(name_of), wds.batched(rows, collation_fn=None))
    if workers == 0:
        return list(pipeline)
    return list(wds.WebLoader(pipeline, num_workers=workers, batch_size=None, multiprocessing_context="fork"))


def order(data: Path, steps: range) -> list[list[str]]:
    return [[f"{step:02d} {key}" for key in MixedStream(data, 3, BATCH).global_batch(step)] for step in steps]


def test_a_sample_is_the_dict_that_webdataset_makes_of_the_same_tar(data: Path) -> None:
    tars = sorted(map(str, data.glob("*.tar")))
    bare = {(s["__url__"], s["__key__"]): s for s in wds.WebDataset(tars, shardshuffle=False)}
    given = {(s["__url__"], s["__key__"]): s for s in MixedStream(data, 3, BATCH).stage(World(0, 1))()}
    for sample in bare.values():
        sample.pop("__local_path__", None)
    for sample in given.values():
        sample.pop("__step__")
    assert given == bare
    assert len(given) == 32


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("workers", [0, 2, 3])
def test_any_ranks_and_workers_give_the_order_of_the_global_batches(data: Path, ranks: int, workers: int) -> None:
    """Resuming at a step included: each sample exactly once, and every step where a run without workers has it."""
    for start in (0, 3):
        stages = [
            MixedStream(data, 3, BATCH).stage(World(rank, ranks), start, 2 * EPOCH - start) for rank in range(ranks)
        ]
        parts = [loaded(stage, BATCH // ranks, workers) for stage in stages]
        together = [[name for part in step for name in part] for step in zip(*parts, strict=True)]
        assert together == order(data, range(start, 2 * EPOCH))


@pytest.mark.parametrize("rows", [1, 3, 7])
def test_batches_of_any_size_hold_each_sample_exactly_once(data: Path, rows: int) -> None:
    found = [name for batch in loaded(MixedStream(data, 3, BATCH).stage(World(0, 1)), rows, 2) for name in batch]
    assert sorted(found) == sorted(name for step in order(data, range(EPOCH)) for name in step)


def test_a_stage_ends_with_the_epoch_and_begins_anew_when_asked_again(data: Path) -> None:
    stage = MixedStream(data, 3, BATCH).stage(World(0, 1), EPOCH + 5)
    assert [s["__step__"] for s in stage()] == [step for step in range(EPOCH + 5, 2 * EPOCH) for _ in range(BATCH)]
    pipeline = wds.DataPipeline(stage, wds.map(name_of))
    assert list(pipeline) == list(pipeline)


def test_a_saved_step_and_state_go_on_where_the_run_stopped(data: Path) -> None:
    mixture = LossDriven(every_steps=4)
    losses = {"big": 2.0, "small": 1.0}

    def read(stream: MixedStream, start: int, count: int) -> list[str]:
        pipeline = wds.DataPipeline(stream.stage(World(0, 1), start, count), wds.map(name_of))
        return list(wds.WebLoader(pipeline, num_workers=2, batch_size=None, multiprocessing_context="fork"))

    stream = MixedStream(data, 3, BATCH, mixture)
    with pytest.raises(InputError, match="must be told before step 4 is read"):
        list(stream.stage(World(0, 1), 0, 5)())
    stream.update_mixture(4, losses)
    saved = json.dumps({"step": 6, "stream": stream.state_dict()})
    whole = sorted(read(stream, 4, 4))
    state = json.loads(saved)
    resumed = MixedStream(data, 3, BATCH, mixture)
    resumed.load_state_dict(state["stream"])
    assert sorted(read(resumed, state["step"], 2)) == [name for name in whole if int(name[:2]) >= 6]


def test_a_stage_travels_to_a_spawned_worker(data: Path) -> None:
    stage = MixedStream(data, 3, BATCH).stage(World(1, 2), 3)
    assert list(pickle.loads(pickle.dumps(stage))()) == list(stage())


def test_webdatasets_decoders_and_collation_work_behind_it(data: Path) -> None:
    def with_image(sample: dict[str, Any]) -> bool:
        return "png" in sample

    stage = MixedStream(data, 3, BATCH).stage(World(0, 1))
    pipeline = wds.DataPipeline(stage, wds.select(with_image), wds.decode("rgb8"), wds.batched(10))
    (batch,) = pipeline
    assert batch["png"].shape == (10, 3, 4, 3)
    assert sorted(batch["png"][:, 0, 0, 0].tolist()) == list(range(10))
    assert {record["task"] for record in batch["json"]} == {"small"}


def test_the_loaders_own_batches_are_taken_too(data: Path) -> None:
    pipeline = wds.DataPipeline(MixedStream(data, 3, BATCH).stage(World(0, 1)), wds.map(name_of))
    found = [int(name[:2]) for names in wds.WebLoader(pipeline, num_workers=2) for name in names]
    assert sorted(found) == [step for step in range(EPOCH) for _ in range(BATCH)]


def test_to_sample_gives_the_streams_own_samples(data: Path) -> None:
    stream = MixedStream(data, 3, BATCH)
    pipeline = wds.DataPipeline(stream.stage(World(1, 2)), wds.map(to_sample), wds.batched(2, collation_fn=None))
    assert list(pipeline) == list(stream.batches(World(1, 2), 0, EPOCH))
    with pytest.raises(InputError, match=r"k of a\.tar must be a valid sample"):
        to_sample({"__key__": "k", "__url__": "a.tar", "json": b"{}"})


def error_in_a_worker(stage: Any) -> str:
    loader = wds.WebLoader(wds.DataPipeline(stage), num_workers=1, batch_size=None)
    try:
        return str(list(loader))
    except InputError as error:
        return str(error)
    finally:
        del loader
        gc.collect()  # the loader's iterator is in a circle: collected in another test, it waits there for its worker


def test_what_cannot_be_given_is_refused_before_anything_is_read(data: Path) -> None:
    stream = MixedStream(data, 3, BATCH)
    with pytest.raises(ValueError, match="multiple of the number of ranks"):
        stream.stage(World(0, 3))
    with pytest.raises(InputError, match="must be >= 0, got -1"):
        stream.stage(World(0, 1), -1)
    assert "must be given a rank alone" in error_in_a_worker(stream.stage(World(0, 1, 0, 2)))


def test_other_loaders_say_their_worker_themselves(data: Path) -> None:
    def parts() -> Iterator[int]:
        for worker in range(3):
            yield from (s["__step__"] for s in copy.copy(MixedStream(data, 3, BATCH)).stage(World(0, 1, worker, 3))())

    assert sorted(parts()) == [step for step in range(EPOCH) for _ in range(BATCH)]
