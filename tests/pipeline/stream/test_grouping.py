from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.contracts import Sample, ShardManifest, TaskSpec
from pipeline.ingestion.shards import write_shard
from pipeline.stream import LengthGrouping, LossDriven, MixedStream, plan_stream
from pipeline.stream.grouping import padding_share, window_of
from pipeline.world import World


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("lengths")
    shards = []
    for task, scale in (("long", 11), ("short", 2)):
        samples = [
            Sample(key=f"{n}", task=task, fields={"text": "x" * (1 + n * 7919 % 97 * scale)}, label=0)
            for n in range(130)
        ]
        shards.append(write_shard(folder, task, "train", 0, samples))
    specs = tuple(TaskSpec(name=t, template="{text}:", label_words=(" no", " yes")) for t in ("long", "short"))
    ShardManifest(tasks=specs, shards=tuple(shards), source_sha256="0").write(folder / "manifest.json")
    return folder


@given(
    batch=st.integers(1, 30),
    epoch=st.integers(1, 400),
    size=st.integers(2, 20),
    updates=st.one_of(st.none(), st.integers(1, 15)),
    steps=st.integers(1, 80),
)
def test_windows_part_the_steps_and_never_cross_an_epoch_or_an_update(
    batch: int, epoch: int, size: int, updates: int | None, steps: int
) -> None:
    for step in range(steps):
        window = window_of(step, size, batch, epoch, updates)
        assert step in window and len(window) <= size
        assert all(window_of(other, size, batch, epoch, updates) == window for other in window)
        if len(window) > 1:
            assert window.start * batch // epoch == (window.stop * batch - 1) // epoch
            assert not updates or window.start // updates == (window.stop - 1) // updates


@given(batch=st.integers(1, 40), window=st.integers(2, 30), seed=st.integers(0, 5))
@settings(max_examples=20, deadline=None)
def test_each_sample_still_comes_once_an_epoch(data: Path, batch: int, window: int, seed: int) -> None:
    stream = MixedStream(data, seed, batch, length_grouping=LengthGrouping(window_steps=window))
    keys = [key for step in range(2 * stream.steps_per_epoch) for key in stream.global_batch(step)]
    for epoch in (0, 1):
        assert len(set(keys[epoch * 260 : (epoch + 1) * 260])) == 260
    again = MixedStream(data, seed, batch, length_grouping=LengthGrouping(window_steps=window))
    for step in (stream.steps_per_epoch, 1, 0):
        assert again.global_batch(step) == keys[step * batch : (step + 1) * batch]


def test_grouping_cuts_the_padding_and_not_the_order_of_lengths(data: Path) -> None:
    plain = plan_stream(data, 0, 20, num_ranks=2)
    grouped = plan_stream(data, 0, 20, num_ranks=2, length_grouping=LengthGrouping(window_steps=13))
    assert grouped.padding_share < 0.1 < 0.3 < plain.padding_share
    assert grouped.schedule_sha256 != plain.schedule_sha256
    stream = MixedStream(data, 0, 20, length_grouping=LengthGrouping(window_steps=13))
    means = [sum(stream.lengths(step)) for step in range(13)]
    assert means != sorted(means)


def test_samples_with_the_same_beginning_share_a_batch(tmp_path: Path) -> None:
    spec = TaskSpec(name="pair", template="{left} and {right}:", label_words=(" no", " yes"))
    fields = [{"left": f"offer {n % 10}", "right": "x" * (n % 17)} for n in range(120)]
    samples = [Sample(key=str(n), task="pair", fields=f, label=0) for n, f in enumerate(fields)]
    shard = write_shard(tmp_path, "pair", "train", 0, samples)
    ShardManifest(tasks=(spec,), shards=(shard,), source_sha256="0").write(tmp_path / "manifest.json")

    def beginnings(by_beginning: bool) -> float:
        grouping = LengthGrouping(window_steps=10, by_beginning=by_beginning)
        stream = MixedStream(tmp_path, 0, 12, length_grouping=grouping)
        batches = [[s.fields["left"] for s in stream.samples(step, World(0, 1))] for step in range(10)]
        assert sorted(text for batch in batches for text in batch) == sorted(f["left"] for f in fields)
        return sum(len(set(batch)) for batch in batches) / 10

    assert beginnings(True) == 1
    assert beginnings(False) > 5


def test_grouping_keeps_within_the_updates_of_a_loss_driven_mixture(data: Path) -> None:
    mixture = LossDriven(every_steps=3, block_samples=20)
    stream = MixedStream(data, 0, 10, mixture, length_grouping=LengthGrouping(window_steps=8))
    before = [stream.global_batch(step) for step in range(3)]
    stream.update_mixture(3, {"long": 1.0, "short": 2.0})
    assert [stream.global_batch(step) for step in range(3)] == before
    assert len(stream.samples(4, World(1, 2))) == 5


def test_padding_share_counts_what_a_padded_batch_wastes() -> None:
    assert padding_share([[2, 4, 4, 4]], 2) == pytest.approx(2 / 16)
    assert padding_share([[2, 4, 4], [4, 4, 4]], 2) == pytest.approx(2 / 24)  # no micro-batch crosses a slice
    assert padding_share([[5, 5, 5]], 3) == 0.0


def test_plan_tells_shares_and_epochs(data: Path) -> None:
    plan = plan_stream(data, 0, 20, {"kind": "weights", "weights": {"long": 3, "short": 1}, "block_samples": 20})
    assert (plan.samples, plan.steps, plan.shards, plan.rows_per_rank) == (260, 13, 2, 20)
    assert plan.tasks["long"].given_share == plan.tasks["long"].requested_share == 0.75
    assert plan.tasks["long"].epochs == pytest.approx(1.5)


def test_plan_tells_the_padding_of_each_task_and_of_all(data: Path) -> None:
    plan = plan_stream(data, 0, 20, num_ranks=2, micro_batch_size=5)
    stream = MixedStream(data, 0, 20)
    real, padded = dict.fromkeys(plan.tasks, 0), dict.fromkeys(plan.tasks, 0)
    for step in range(stream.steps_per_epoch):
        for rank in range(2):
            rows = sorted((len(s.fields["text"]), s.task) for s in stream.samples(step, World(rank, 2)))
            for place, (length, task) in enumerate(rows):
                real[task] += length
                padded[task] += rows[place // 5 * 5 + 4][0]
    for task, found in plan.tasks.items():
        assert found.padding_share == pytest.approx(1 - real[task] / padded[task])
    assert plan.padding_share == pytest.approx(1 - sum(real.values()) / sum(padded.values()))


def test_plan_of_a_loss_driven_mixture_looks_no_further_than_its_first_update(data: Path) -> None:
    plan = plan_stream(data, 0, 20, LossDriven(every_steps=3, block_samples=20))
    assert plan.padding_measured_steps == 3
    assert plan.tasks["long"].given_share == plan.tasks["short"].given_share == 0.5
