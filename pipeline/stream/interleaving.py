"""Which task stands at each position of the stream, and which of its draws: a pure function of the position.

Sample i of the Q samples that a task gives in a period is due at the moment (2i + 1) / 2Q of it. All samples of a
period in the order of their moments (ties by task) are its exact interleaving; it is cut into blocks, and each block
is shuffled. So any stretch of the stream holds the tasks in their shares, to within a sample or so at the blocks'
borders, and any position is reached without walking there.
"""

from __future__ import annotations

import heapq
from functools import lru_cache

import numpy as np

from pipeline.stream.mixture import Quotas

BLOCK_SAMPLES = 1024


class Interleaving:
    """The interleaving of a mixture's tasks under one seed."""

    def __init__(
        self,
        quotas: Quotas,
        seed: int,
        block_samples: int = BLOCK_SAMPLES,
        drawn_before: tuple[int, ...] | None = None,
    ) -> None:
        self.quotas, self._seed = quotas, seed
        self._drawn_before = np.array(drawn_before or (0,) * len(quotas.counts), dtype=np.int64)
        self._block = min(block_samples, quotas.period)
        self._counts_at = lru_cache(maxsize=64)(self._counts)
        self._block_of = lru_cache(maxsize=16)(self._shuffled_block)

    def draws(self, start: int, count: int) -> tuple[np.ndarray, np.ndarray]:
        """Return task index and number of the draw from that task at ``count`` positions from ``start``, each (N,)."""
        tasks, draws = [], []
        position, end = start, start + count
        while position < end:
            period, within = divmod(position, self.quotas.period)
            block, offset = divmod(within, self._block)
            block_tasks, block_draws = self._block_of(period, block)
            tasks.append(block_tasks[offset : offset + end - position])
            draws.append(block_draws[offset : offset + end - position])
            position += len(tasks[-1])
        return np.concatenate(tasks), np.concatenate(draws)

    def drawn(self, position: int) -> tuple[int, ...]:
        """Return how often each task was drawn before a position, with what was drawn before this interleaving."""
        period, within = divmod(position, self.quotas.period)
        block, offset = divmod(within, self._block)
        counts = self._drawn_before + period * np.array(self.quotas.counts, dtype=np.int64)
        counts = counts + np.array(self._counts_at(block * self._block))
        if offset:
            tasks, _ = self._block_of(period, block)
            counts = counts + np.bincount(tasks[:offset], minlength=len(counts))
        return tuple(int(count) for count in counts)

    def _shuffled_block(self, period: int, block: int) -> tuple[np.ndarray, np.ndarray]:
        start = block * self._block
        before = np.array(self._counts_at(start))
        after = np.array(self._counts_at(min(start + self._block, self.quotas.period)))
        base = self._drawn_before + before + period * np.array(self.quotas.counts, dtype=np.int64)
        tasks = np.repeat(np.arange(len(before)), after - before)
        order = np.random.default_rng([self._seed, 3, period, block]).permutation(len(tasks))
        tasks = tasks[order]
        draws = np.empty(len(tasks), dtype=np.int64)
        for task in range(len(before)):
            mine = tasks == task
            draws[mine] = base[task] + np.arange(mine.sum())
        return tasks, draws

    def _counts(self, position: int) -> tuple[int, ...]:
        """Return how many samples of each task stand among the first ``position`` of a period."""
        quotas, period = self.quotas.counts, self.quotas.period
        # At the moment (position - tasks) / period, fewer than `position` samples are past: take those, then walk.
        lead = max(position - len(quotas), 0)
        counts = [min(max(-((period - 2 * quota * lead) // (2 * period)), 0), quota) for quota in quotas]
        due = [((2 * counts[t] + 1) / (2 * quota), t) for t, quota in enumerate(quotas) if counts[t] < quota]
        heapq.heapify(due)
        for _ in range(position - sum(counts)):
            _, task = heapq.heappop(due)
            counts[task] += 1
            if counts[task] < quotas[task]:
                heapq.heappush(due, ((2 * counts[task] + 1) / (2 * quotas[task]), task))
        return tuple(counts)
