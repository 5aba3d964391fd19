from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.errors import InputError
from pipeline.stream import LossDriven, MixedStream, Proportional, Temperature
from pipeline.stream.mixture import largest_remainder, loss_driven_quotas, resolve
from pipeline.world import World
from tests.pipeline.stream.test_stream import write_data

SIZES = {"big": [40, 40], "small": [16], "tiny": [4]}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shards")
    write_data(folder, SIZES)
    return folder


@given(
    weights=st.lists(st.floats(0.01, 100), min_size=1, max_size=12),
    total=st.integers(0, 10_000),
)
def test_largest_remainder_adds_up_and_misses_by_less_than_one(weights: list[float], total: int) -> None:
    shares = np.array(weights) / sum(weights)
    counts = largest_remainder(shares, total)
    assert sum(counts) == total
    assert np.all(np.abs(np.array(counts) - shares * total) < 1)


def test_temperature_one_is_proportional_and_infinity_equal() -> None:
    counts = {"a": 900, "b": 100}
    assert resolve(Temperature(temperature=1), counts).counts == resolve(Proportional(), counts).counts == (900, 100)
    assert resolve(Temperature(temperature=2), counts).counts == (750, 250)
    assert resolve(Temperature(temperature=1e9), counts).counts == (500, 500)
    assert resolve(Temperature(temperature=1, caps={"a": 100}), counts).counts == (500, 500)


def test_caps_and_epochs_change_how_often_a_task_comes(data: Path) -> None:
    stream = MixedStream(data, 0, 10, Proportional(caps={"big": 20}, epochs={"tiny": 2.5, "small": 0.5}))
    assert stream.epoch_samples == 20 + 8 + 10
    keys = [key for step in range(38) for key in stream.global_batch(step)]  # ten epochs
    counts = Counter(keys)
    assert {task: {n for k, n in counts.items() if k.startswith(task)} for task in SIZES} == {
        "big": {2, 3},  # 200 draws of 80 samples: a cap goes on where the last epoch stopped
        "small": {5},
        "tiny": {25},
    }


def test_every_stretch_holds_the_tasks_in_their_shares(data: Path) -> None:
    stream = MixedStream(data, 0, 20, "proportional")
    for step in range(15):
        counts = Counter(key.split("/")[0] for key in stream.global_batch(step))
        assert abs(counts["big"] - 16) <= 4


@given(
    first=st.lists(st.floats(0.05, 1), min_size=2, max_size=6),
    ratios=st.lists(st.floats(0.01, 10), min_size=6, max_size=6),
    alpha=st.floats(0, 3),
)
def test_loss_driven_shares_keep_the_floor_and_follow_the_losses(
    first: list[float], ratios: list[float], alpha: float
) -> None:
    mixture = LossDriven(every_steps=1, alpha=alpha, min_share=0.1, block_samples=100_000)
    tasks = tuple(map(str, range(len(first))))
    shares = np.array(first) / sum(first)
    told = np.array(ratios[: len(first)])
    quotas = loss_driven_quotas(mixture, tasks, shares, told)
    assert sum(quotas.requested) == pytest.approx(1)
    assert min(quotas.requested) >= 0.1 - 1e-9
    raw = shares * told**alpha
    order = np.argsort(raw, kind="stable")
    assert all(np.diff(np.array(quotas.requested)[order]) >= -1e-9)
    again = loss_driven_quotas(mixture, tasks, np.array(quotas.requested), np.ones(len(first)))
    assert again.requested == pytest.approx(quotas.requested)


@given(ratios=st.lists(st.floats(1e-6, 1e6), min_size=2, max_size=16))
def test_loss_driven_shares_leave_every_task_a_sample_in_a_block(ratios: list[float]) -> None:
    mixture = LossDriven(every_steps=1, min_share=0, block_samples=16)
    tasks = tuple(map(str, range(len(ratios))))
    quotas = loss_driven_quotas(mixture, tasks, np.full(len(tasks), 1 / len(tasks)), np.array(ratios))
    assert min(quotas.counts) >= 1 and sum(quotas.counts) == 16
    with pytest.raises(InputError, match=r"1 / 17 tasks = 0.0588, got 0.0 and 0.0625; lower the one or raise"):
        resolve(mixture, dict.fromkeys(map(str, range(17)), 5))


def told(stream: MixedStream, step: int) -> None:
    stream.update_mixture(step, {"big": 0.5 + step, "small": 1.0, "tiny": 0.1 * step})


def test_loss_driven_stream_resumes_from_its_saved_state(data: Path) -> None:
    mixture = LossDriven(every_steps=4, block_samples=40, min_share=0.05)
    whole = MixedStream(data, 0, 10, mixture)
    batches = []
    for step in range(14):
        if step and step % 4 == 0:
            told(whole, step)
        batches.append(whole.global_batch(step))
        if step == 9:
            state = whole.state_dict()
    resumed = MixedStream(data, 0, 10, mixture)
    resumed.load_state_dict(state)
    assert [resumed.global_batch(step) for step in range(12)] == batches[:12]
    told(resumed, 12)
    assert resumed.global_batch(13) == batches[13]
    # big learns slowest beside its first loss: in the next whole block it has more than the 32 of 40 it began with
    shares = Counter(k.split("/")[0] for step in range(12, 16) for k in resumed.global_batch(step))
    assert shares["big"] > 32 and shares["tiny"] >= 2


def test_loss_driven_stream_never_gives_a_sample_twice_before_all_of_its_task(data: Path) -> None:
    stream = MixedStream(data, 0, 10, LossDriven(every_steps=2, block_samples=40, min_share=0.05))
    for step in range(2, 40, 2):
        told(stream, step)
    keys = [key for step in range(40) for key in stream.global_batch(step)]
    for task, sizes in SIZES.items():
        mine = [key for key in keys if key.startswith(task)]
        for start in range(0, len(mine) - sum(sizes) + 1, sum(sizes)):
            assert len(set(mine[start : start + sum(sizes)])) == sum(sizes)


def test_losses_not_told_stop_the_stream_and_do_not_hang_it(data: Path) -> None:
    stream = MixedStream(data, 0, 10, LossDriven(every_steps=3, block_samples=40))
    batches = stream.batches(World(0, 1), 0, 9)
    assert len([next(batches) for _ in range(3)]) == 3
    with pytest.raises(InputError, match="losses for step 3 must be told before step 3"):
        next(batches)
    with pytest.raises(InputError, match="must be told for step 3, got 6"):
        told(stream, 6)
    with pytest.raises(InputError, match="finite and > 0 for every task"):
        stream.update_mixture(3, {"big": 1.0, "small": float("nan"), "tiny": 1.0})
    stream.update_mixture(3, dict.fromkeys(SIZES, 1.0))
    assert len(list(stream.batches(World(0, 1), 3, 3))) == 3
    with pytest.raises(InputError, match="must be of the same manifest"):
        MixedStream(data, 1, 10, LossDriven(every_steps=3)).load_state_dict(stream.state_dict())
    with pytest.raises(InputError, match="only a loss_driven mixture takes losses"):
        MixedStream(data, 0, 10).update_mixture(3, {})
