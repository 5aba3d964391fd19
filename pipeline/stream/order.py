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

    def locate(self, draws: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return shard number and row within the shard of some of the task's samples, each (N,).

        Args:
            draws: (N,) numbers of the samples, counted over all epochs.
        """
        epochs, places = np.divmod(draws, self.samples)
        shards, rows = np.empty_like(draws), np.empty_like(draws)
        for epoch in np.unique(epochs).tolist():
            _, starts = self._epoch(epoch)
            in_epoch = np.flatnonzero(epochs == epoch)
            groups = np.searchsorted(starts, places[in_epoch], side="right") - 1
            for group in np.unique(groups).tolist():
                mine = in_epoch[groups == group]
                group_shards, group_rows = self._group(epoch, group)
                offsets = places[mine] - starts[group]
                shards[mine], rows[mine] = group_shards[offsets], group_rows[offsets]
        return shards, rows

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
