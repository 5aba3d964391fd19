"""The mixed-task stream: the same samples in the same order on any number of ranks and loader workers."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping
from pathlib import Path

from pipeline.contracts import Sample, ShardInfo, ShardManifest
from pipeline.errors import InputError
from pipeline.stream.mixture import Proportional, Temperature, Weights, parse_mixture, resolve
from pipeline.stream.order import TaskOrder
from pipeline.stream.prefetch import prefetch
from pipeline.stream.reader import ShardReader
from pipeline.stream.schedule import Schedule
from pipeline.world import World

PREFETCH_BATCHES = 4


class MixedStream:
    """Global batches of many tasks as a pure function of manifest, seed, mixture and step.

    Ranks and loader workers only cut a global batch: each rank takes its contiguous slice of every step, and worker w
    of W loads the rank's slices of the steps s with s % W = w. Resuming is starting at another step.

    Args:
        manifest_path: the ``manifest.json`` of prepared shards, or its folder.
        seed: of every shuffle.
        global_batch_size: samples a step over all ranks.
        mixture: a name (``"proportional"``, ``"temperature"``), a mapping with ``kind``, or a typed mixture.
        split: the split whose shards are streamed.

    Raises:
        InputError: the manifest is missing, a task of it has no sample in the split, or a batch is larger than what
            there is.
    """

    def __init__(
        self,
        manifest_path: str | Path,
        seed: int,
        global_batch_size: int,
        mixture: str | Mapping[str, object] | Proportional | Temperature | Weights = "proportional",
        split: str = "train",
    ) -> None:
        path = manifest_file(manifest_path)
        self.manifest = ShardManifest.read(path)
        self.seed, self.global_batch_size, self.split = seed, global_batch_size, split
        self.mixture = parse_mixture(mixture)
        self._shards = _shards_by_task(self.manifest, split)
        counts = {task: sum(s.samples for s in shards) for task, shards in self._shards.items()}
        self.num_samples = sum(counts.values())
        if not 1 <= global_batch_size <= self.num_samples:
            raise InputError(
                f"global_batch_size must be from 1 to the {self.num_samples} samples of split {split!r}, "
                f"got {global_batch_size}; choose a smaller batch or prepare more data"
            )
        self.quotas = resolve(self.mixture, counts)
        self._schedule = Schedule(self.quotas, seed)
        self._orders = [TaskOrder(t, [s.samples for s in self._shards[t]], seed) for t in self.quotas.tasks]
        self._reader = ShardReader(str(path.parent))

    @property
    def epoch_samples(self) -> int:
        """Samples in one epoch of the mixture."""
        return self.num_samples if isinstance(self.mixture, Weights) else self.quotas.period

    @property
    def steps_per_epoch(self) -> int:
        """Steps until an epoch has been given whole; the last one may reach into the next epoch."""
        return math.ceil(self.epoch_samples / self.global_batch_size)

    @property
    def tasks(self) -> tuple[str, ...]:
        """Names of the tasks in the split."""
        return self.quotas.tasks

    def global_batch(self, step: int) -> list[str]:
        """Return the keys ``TASK/KEY`` of one step in order, whatever the number of ranks."""
        return [self._reader.key(shard, row) for shard, row in self._places(step)]

    def rank_batch(self, step: int, world: World) -> list[str]:
        """Return the keys of this rank's slice; empty where the step is another loader worker's."""
        return [self._reader.key(shard, row) for shard, row in self._rank_places(step, world)]

    def samples(self, step: int, world: World) -> list[Sample]:
        """Return this rank's slice decoded; empty where the step is another loader worker's."""
        return [self._reader.sample(shard, row) for shard, row in self._rank_places(step, world)]

    def batches(
        self, world: World, start_step: int, num_steps: int, prefetch_batches: int = PREFETCH_BATCHES
    ) -> Iterator[list[Sample]]:
        """Yield this rank's (and worker's) slices of the steps from ``start_step``, read ahead in a thread."""
        world.slice_of(self.global_batch_size)  # refuse before the thread starts
        steps = (s for s in range(start_step, start_step + num_steps) if s % world.num_workers == world.worker)
        return prefetch((self.samples(step, world) for step in steps), prefetch_batches)

    def _rank_places(self, step: int, world: World) -> list[tuple[ShardInfo, int]]:
        part = world.slice_of(self.global_batch_size)
        return self._places(step)[part] if step % world.num_workers == world.worker else []

    def _places(self, step: int) -> list[tuple[ShardInfo, int]]:
        if step < 0:
            raise InputError(f"step must be >= 0, got {step}; steps are counted from 0")
        places = []
        for task, draw in self._schedule.draws(step * self.global_batch_size, self.global_batch_size):
            shard, row = self._orders[task].locate(draw)
            places.append((self._shards[self.quotas.tasks[task]][shard], row))
        return places


def manifest_file(path: str | Path) -> Path:
    """Return the manifest file of a path to it or to its folder."""
    path = Path(path)
    return path / "manifest.json" if path.is_dir() else path


def manifest_sha256(path: str | Path) -> str:
    """Return the digest of a manifest file: it names every shard by digest, so it stands for all the data."""
    return hashlib.sha256(manifest_file(path).read_bytes()).hexdigest()


def _shards_by_task(manifest: ShardManifest, split: str) -> dict[str, tuple[ShardInfo, ...]]:
    shards = {task.name: manifest.shards_of(task.name, split) for task in manifest.tasks}
    if empty := [task for task, found in shards.items() if not found]:
        raise InputError(
            f"every task must have samples in split {split!r}, {empty} have none; splits with samples: "
            f"{sorted({s.split for s in manifest.shards})}; prepare data for them or leave the tasks out"
        )
    return shards


def read_split(
    manifest_path: str | Path, split: str, task: str | None = None, world: World | None = None
) -> Iterator[Sample]:
    """Yield each sample of a split exactly once over all ranks, in the order of the shards.

    Raises:
        InputError: the manifest has no such task, or the task has no sample in the split.
    """
    path = manifest_file(manifest_path)
    manifest = ShardManifest.read(path)
    world = world or World(0, 1)
    names = [manifest.task(task).name] if task else [spec.name for spec in manifest.tasks]
    shards = [shard for name in names for shard in manifest.shards_of(name, split)]
    if not shards:
        raise InputError(
            f"split {split!r} must have samples of {names}, found none; splits with samples: "
            f"{sorted({s.split for s in manifest.shards})}"
        )
    total = sum(shard.samples for shard in shards)
    first, last = total * world.rank // world.num_ranks, total * (world.rank + 1) // world.num_ranks
    reader = ShardReader(str(path.parent))
    start = 0
    for shard in shards:
        for row in range(max(first - start, 0), min(last - start, shard.samples)):
            yield reader.sample(shard, row)
        start += shard.samples
