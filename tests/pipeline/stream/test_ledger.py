from __future__ import annotations

import json
from pathlib import Path

import pytest
from torch.utils.data import DataLoader

from pipeline.errors import InputError
from pipeline.stream import MixedStream, SampleLedger, StreamDataset, merge_ledgers
from pipeline.world import World
from tests.pipeline.stream.test_stream import SIZES, write_data


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shards")
    write_data(folder, SIZES)
    return folder


def run(data: Path, folder: Path, ranks: int, start: int, stop: int) -> None:
    for rank in range(ranks):
        stream = MixedStream(data, 0, 8)
        with SampleLedger(folder, World(rank, ranks), start) as ledger:
            batches = stream.batches(World(rank, ranks), start, stop - start)
            for step, samples in enumerate(batches, start):
                ledger.record(step, samples)


@pytest.mark.parametrize(("before", "ranks"), [(1, 1), (2, 2), (4, 4), (4, 2), (8, 1), (1, 4)])
def test_ledger_of_a_resumed_run_is_the_order_of_the_stream(
    data: Path, tmp_path: Path, before: int, ranks: int
) -> None:
    run(data, tmp_path, before, 0, 9)
    for part in tmp_path.glob(".samples-rank-*"):
        with part.open("a") as file:
            file.write('{"step": 9, "ra')  # killed while it wrote
    run(data, tmp_path, ranks, 6, 14)  # the last checkpoint was at step 6
    entries = [json.loads(line) for line in merge_ledgers(tmp_path).read_text().splitlines()]
    stream = MixedStream(data, 0, 8)
    expected = [key for step in range(14) for key in stream.global_batch(step)]
    assert [f"{e['task']}/{e['key']}" for e in entries] == expected
    assert [e["step"] for e in entries] == [step for step in range(14) for _ in range(8)]
    assert [e["rank"] for e in entries[:8]] == [row * before // 8 for row in range(8)]
    assert [e["rank"] for e in entries[-8:]] == [row * ranks // 8 for row in range(8)]


def test_no_ledger_is_said(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="found none in"):
        merge_ledgers(tmp_path)


@pytest.mark.parametrize(
    "workers", [0, pytest.param(2, marks=pytest.mark.slow), pytest.param(4, marks=pytest.mark.slow)]
)
def test_loader_processes_give_the_batches_in_the_order_of_the_steps(data: Path, workers: int) -> None:
    dataset = StreamDataset(MixedStream(data, 0, 8), World(1, 2), start_step=3, num_steps=7)
    loader = DataLoader(
        dataset, batch_size=None, num_workers=workers, multiprocessing_context="spawn" if workers else None
    )
    keys = [[f"{s.task}/{s.key}" for s in batch] for batch in loader]
    assert keys == [MixedStream(data, 0, 8).rank_batch(step, World(1, 2)) for step in range(3, 10)]
