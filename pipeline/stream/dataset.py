"""The stream as a torch data set, for those who load with worker processes."""

from __future__ import annotations

import copy
from collections.abc import Iterator

from torch.utils.data import IterableDataset, get_worker_info

from pipeline.contracts import Sample
from pipeline.stream.stream import MixedStream
from pipeline.world import World


class StreamDataset(IterableDataset[list[Sample]]):
    """One rank's slices of consecutive steps; give it to a ``DataLoader`` with ``batch_size=None``.

    The loader takes from its workers in turn, and worker w reads the steps w, w + W, … from the first on: the batches
    come in the order of the steps with any number of workers.
    """

    def __init__(self, stream: MixedStream, world: World, start_step: int, num_steps: int) -> None:
        self._stream, self._world, self._start, self._steps = stream, world, start_step, num_steps

    def __iter__(self) -> Iterator[list[Sample]]:
        info = get_worker_info()
        worker, workers = (info.id, info.num_workers) if info else (0, 1)
        stream = copy.copy(self._stream) if info else self._stream  # a forked process must open its files anew
        for step in range(self._start + worker, self._start + self._steps, workers):
            yield stream.samples(step, World(self._world.rank, self._world.num_ranks))
