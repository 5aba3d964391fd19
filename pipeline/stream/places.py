"""Where samples stand, as arrays: a rank among a thousand sorts the samples of all."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Places:
    """The places of N samples."""

    tasks: np.ndarray
    """(N,) index of each one's task."""
    shards: np.ndarray
    """(N,) number among the task's shards."""
    rows: np.ndarray
    """(N,) within the shard."""

    @classmethod
    def joined(cls, parts: Sequence[Places]) -> Places:
        """Return the samples of all parts, one part after another."""
        return cls(*(np.concatenate([getattr(p, name) for p in parts]) for name in ("tasks", "shards", "rows")))

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[tuple[int, int, int]]:
        return zip(self.tasks.tolist(), self.shards.tolist(), self.rows.tolist(), strict=True)

    def taken(self, which: slice | np.ndarray) -> Places:
        """Return some of the samples."""
        return Places(self.tasks[which], self.shards[which], self.rows[which])

    def by_shard(self) -> Iterator[tuple[int, int, np.ndarray]]:
        """Yield task index, shard number and which of the samples stand there, shard after shard."""
        if not len(self):
            return
        order = np.lexsort((self.shards, self.tasks))
        tasks, shards = self.tasks[order], self.shards[order]
        starts = np.flatnonzero((np.diff(tasks) != 0) | (np.diff(shards) != 0)) + 1
        for which in np.split(order, starts):
            yield int(self.tasks[which[0]]), int(self.shards[which[0]]), which
