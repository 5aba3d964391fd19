"""How near the order of an epoch comes to a full shuffle, where the source is sorted as badly as can be."""

from __future__ import annotations

import numpy as np
import pytest

from pipeline.stream.order import TaskOrder

SHARDS, ROWS = 200, 1000


def positions(order: TaskOrder) -> np.ndarray:
    """Return the place in the source of each sample in the order of the first epoch."""
    shards, rows = order.locate(np.arange(SHARDS * ROWS))
    return shards * ROWS + rows


@pytest.mark.timeout(120)
def test_an_epoch_of_a_sorted_source_looks_like_a_full_shuffle_to_a_batch() -> None:
    order = TaskOrder("task", [ROWS] * SHARDS, seed=0)
    assert order.group_shards == 32  # a sixth of the shards at hand at a time
    source, total = positions(order), SHARDS * ROWS
    full = np.random.default_rng(0).permutation(total)
    # Displacement: a full shuffle moves a sample by a third of the epoch on average.
    moved = np.abs(source - np.arange(total)).mean() / total
    assert moved == pytest.approx(1 / 3, abs=0.03)
    assert abs(np.corrcoef(source, np.arange(total))[0, 1]) < 0.15
    # Labels sorted in the source: the spread of a batch's label share, against the full shuffle's.
    spread = {
        name: (places < total // 2).reshape(-1, 32).mean(axis=1).std()
        for name, places in (("ours", source), ("full", full))
    }
    assert spread["ours"] / spread["full"] < 1.6
    # Neighbours in the source do not stay neighbours.
    assert (np.abs(np.diff(source)) == 1).mean() < 10 / ROWS
