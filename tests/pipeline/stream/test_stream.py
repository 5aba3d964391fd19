from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.contracts import Sample, ShardManifest, TaskSpec
from pipeline.errors import InputError
from pipeline.ingestion.shards import write_shard
from pipeline.stream import LengthGrouping, MixedStream, Weights, read_split
from pipeline.stream.interleaving import Interleaving
from pipeline.stream.mixture import Quotas
from pipeline.stream.order import TaskOrder
from pipeline.world import World

SIZES = {"big": [30, 30, 17], "small": [9], "tiny": [1, 1]}


def write_data(folder: Path, sizes: dict[str, list[int]]) -> ShardManifest:
    folder.mkdir(parents=True, exist_ok=True)
    shards = []
    for task, counts in sizes.items():
        for number, count in enumerate(counts):
            samples = [
                Sample(key=f"{number}-{row}", task=task, fields={"text": f"{task} {number} {row}"}, label=row % 2)
                for row in range(count)
            ]
            shards.append(write_shard(folder, task, "train", number, samples))
    specs = tuple(TaskSpec(name=task, template="{text}:", label_words=(" no", " yes")) for task in sizes)
    manifest = ShardManifest(tasks=specs, shards=tuple(shards), source_sha256="0" * 64)
    manifest.write(folder / "manifest.json")
    return manifest


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shards")
    write_data(folder, SIZES)
    return folder / "manifest.json"


def _pairs(arrays: tuple[np.ndarray, np.ndarray]) -> list[tuple[int, int]]:
    one, other = (array.tolist() for array in arrays)
    return list(zip(one, other, strict=True))


@given(
    sizes=st.lists(st.integers(1, 40), min_size=1, max_size=12),
    seed=st.integers(0, 2**31),
    epoch=st.integers(0, 5),
    group_shards=st.integers(1, 5),
)
def test_each_row_comes_exactly_once_an_epoch(sizes: list[int], seed: int, epoch: int, group_shards: int) -> None:
    order = TaskOrder("task", sizes, seed, group_shards)
    total = sum(sizes)
    draws = np.arange(epoch * total, (epoch + 1) * total)
    rows = _pairs(order.locate(draws))
    assert rows == [pair for draw in draws for pair in _pairs(order.locate(draw[None]))]
    assert sorted(rows) == [(shard, row) for shard, size in enumerate(sizes) for row in range(size)]


@given(
    counts=st.lists(st.integers(0, 60), min_size=1, max_size=6).filter(any),
    seed=st.integers(0, 2**31),
    block=st.integers(1, 50),
    periods=st.integers(1, 3),
)
def test_interleaving_gives_each_draw_once_and_in_the_quotas(
    counts: list[int], seed: int, block: int, periods: int
) -> None:
    quotas = Quotas(tuple(map(str, range(len(counts)))), tuple(counts), tuple(c / sum(counts) for c in counts))
    interleaving = Interleaving(quotas, seed, block)
    draws = _pairs(interleaving.draws(0, periods * quotas.period))
    assert sorted(draws) == [(t, d) for t, count in enumerate(counts) for d in range(periods * count)]
    middle = len(draws) // 2
    assert _pairs(Interleaving(quotas, seed, block).draws(middle, len(draws) - middle)) == draws[middle:]


@given(batch=st.integers(1, 8), ranks=st.integers(1, 16), workers=st.integers(1, 4), start=st.integers(0, 20))
@settings(max_examples=25, deadline=None)
def test_ranks_and_workers_only_cut_the_same_order(
    data: Path, batch: int, ranks: int, workers: int, start: int
) -> None:
    if batch * ranks > 88:
        batch = 1
    alone = MixedStream(data, 7, batch * ranks)
    for step in range(start, start + 3):
        parts = [
            alone.rank_batch(step, World(rank, ranks, worker, workers))
            for rank in range(ranks)
            for worker in range(workers)
        ]
        assert [key for part in parts for key in part] == MixedStream(data, 7, batch * ranks).global_batch(step)


@given(
    sizes=st.lists(st.lists(st.integers(1, 9), min_size=1, max_size=4), min_size=1, max_size=3),
    rows=st.integers(1, 3),
    ranks=st.integers(1, 16),
    workers=st.integers(0, 4),
    window=st.one_of(st.none(), st.integers(2, 5)),
    resume=st.integers(0, 40),
    seed=st.integers(0, 9),
)
@settings(max_examples=40)
def test_any_shards_ranks_workers_batch_and_resume_point_give_one_order(
    tmp_path_factory: pytest.TempPathFactory,
    sizes: list[list[int]],
    rows: int,
    ranks: int,
    workers: int,
    window: int | None,
    resume: int,
    seed: int,
) -> None:
    """Nothing lost, nothing twice, equal steps for all, the same order as one process that never stopped."""
    folder = tmp_path_factory.mktemp("any")
    write_data(folder, {f"t{n}": counts for n, counts in enumerate(sizes)})
    total = sum(map(sum, sizes))
    batch = ranks * rows
    grouping = LengthGrouping(window_steps=window) if window else None
    if batch > total:
        with pytest.raises(InputError, match="global_batch_size must be from 1"):
            MixedStream(folder, seed, batch, length_grouping=grouping)
        return
    whole = MixedStream(folder, seed, batch, length_grouping=grouping)
    steps = 2 * whole.steps_per_epoch
    order = [key for step in range(steps) for key in whole.global_batch(step)]
    for epoch in (0, 1):
        assert len(set(order[epoch * total : (epoch + 1) * total])) == total
    resume %= steps
    readers = [(rank, worker) for rank in range(ranks) for worker in range(max(workers, 1))]
    given: dict[int, dict[int, list[str]]] = {step: {} for step in range(resume, steps)}
    resumed = MixedStream(folder, seed, batch, length_grouping=grouping)  # as every process opens it
    for rank, worker in readers:
        mine = [s for s in range(resume, steps) if s % max(workers, 1) == worker]
        world = World(rank, ranks, worker, max(workers, 1))
        found = resumed.batches(world, resume, steps - resume)
        for step, samples in zip(mine, found, strict=True):
            assert rank not in given[step]
            given[step][rank] = [f"{sample.task}/{sample.key}" for sample in samples]
    for step, parts in given.items():
        assert [len(parts[rank]) for rank in range(ranks)] == [rows] * ranks
        together = [key for rank in range(ranks) for key in parts[rank]]
        assert together == order[step * batch : (step + 1) * batch]


def test_order_depends_on_the_seed_and_changes_every_epoch(data: Path) -> None:
    stream = MixedStream(data, 0, 8)
    assert stream.num_samples == 88
    assert stream.steps_per_epoch == 11
    epochs = [[k for s in range(e * 11, e * 11 + 11) for k in stream.global_batch(s)] for e in (0, 1)]
    assert epochs[0] != epochs[1]
    assert sorted(epochs[0]) == sorted(epochs[1]) == sorted(f"{s.task}/{s.key}" for s in read_split(data, "train"))
    assert MixedStream(data, 1, 8).global_batch(0) != stream.global_batch(0)


def test_iterator_resumes_at_any_step(data: Path) -> None:
    def keys(start: int, count: int) -> list[list[str]]:
        batches = MixedStream(data, 3, 4).batches(World(1, 2), start, count)
        return [[f"{s.task}/{s.key}" for s in batch] for batch in batches]

    whole = keys(0, 30)
    assert keys(13, 17) == whole[13:]
    assert whole[5] == MixedStream(data, 3, 4).global_batch(5)[2:]


def test_weights_are_exact_in_every_block(data: Path) -> None:
    mixture = Weights(weights={"big": 1, "small": 2, "tiny": 1}, block_samples=40)
    stream = MixedStream(data, 0, 40, mixture)
    for step in range(5):
        counts = Counter(key.split("/")[0] for key in stream.global_batch(step))
        assert counts == {"big": 10, "small": 20, "tiny": 10}


def test_errors_name_the_numbers(data: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="from 1 to the 88 samples of split 'train', got 89"):
        MixedStream(data, 0, 89)
    with pytest.raises(InputError, match=r"\['big', 'small', 'tiny'\] have none; splits with samples: \['train'\]"):
        MixedStream(data, 0, 8, split="test")
    with pytest.raises(ValueError, match="multiple of the number of ranks, got 8 samples for 3 ranks"):
        MixedStream(data, 0, 8).rank_batch(0, World(0, 3))
    with pytest.raises(InputError, match="mixture must be"):
        MixedStream(data, 0, 8, "even")
    with pytest.raises(InputError, match="got 'bgi'; did you mean 'big'"):
        MixedStream(data, 0, 8, Weights(weights={"bgi": 1}))
    with pytest.raises(InputError, match="at least 1 sample of each 10"):
        MixedStream(data, 0, 8, Weights(weights={"big": 1, "small": 1, "tiny": 0.001}, block_samples=10))


@pytest.mark.parametrize("ranks", [1, 2, 5, 16])
def test_read_split_gives_each_sample_once_over_the_ranks(data: Path, ranks: int) -> None:
    parts = [[s.key for s in read_split(data, "train", "big", World(rank, ranks))] for rank in range(ranks)]
    assert [key for part in parts for key in part] == [f"{n}-{r}" for n, c in enumerate(SIZES["big"]) for r in range(c)]
