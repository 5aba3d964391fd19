"""The shuffled order of one task's samples in each epoch, reached at any place without walking there.

The shards of an epoch are permuted and taken in groups; the samples of a group are permuted among themselves. So a
reader needs the shards of one group at a time, and a sample can come anywhere in the epoch.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from functools import lru_cache

import numpy as np

GROUP_SAMPLES = 65_536
"""A group has about so many samples, but from 2 to 32 shards: wide enough to mix, narrow enough to hold at hand."""


class TaskOrder:
    """The order of one task's samples under one seed."""

    def __init__(
        self, task: str, shard_samples: Sequence[int] | np.ndarray, seed: int, group_shards: int | None = None
    ) -> None:
        self._sizes = np.array(shard_samples, dtype=np.int64)
        self.samples = int(self._sizes.sum())
        self._entropy = [seed, 4, zlib.crc32(task.encode())]
        self.group_shards = group_shards or min(max(GROUP_SAMPLES // int(self._sizes.max()), 2), 32)
        self._epoch = lru_cache(maxsize=4)(self._shard_order)
        self._group = lru_cache(maxsize=4)(self._shuffled_group)

    def locate(self, draw: int) -> tuple[int, int]:
        """Return (shard number, row within the shard) of the task's ``draw``-th sample, counted over all epochs."""
        epoch, place = divmod(draw, self.samples)
        _, starts = self._epoch(epoch)
        group = int(np.searchsorted(starts, place, side="right")) - 1
        shards, rows = self._group(epoch, group)
        offset = place - int(starts[group])
        return int(shards[offset]), int(rows[offset])

    def _shard_order(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        order = np.random.default_rng([*self._entropy, epoch]).permutation(len(self._sizes))
        totals = np.concatenate([[0], np.cumsum(self._sizes[order])])
        return order, totals[:-1][:: self.group_shards]

    def _shuffled_group(self, epoch: int, group: int) -> tuple[np.ndarray, np.ndarray]:
        order, _ = self._epoch(epoch)
        members = order[group * self.group_shards : (group + 1) * self.group_shards]
        shards = np.repeat(members, self._sizes[members])
        rows = np.concatenate([np.arange(self._sizes[m]) for m in members])
        shuffle = np.random.default_rng([*self._entropy, epoch, group]).permutation(len(shards))
        return shards[shuffle], rows[shuffle]
