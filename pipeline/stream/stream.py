"""The mixed-task stream: the same samples in the same order on any number of ranks and loader workers."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.contracts import Sample, ShardInfo
from pipeline.errors import InputError
from pipeline.prefetch import prefetch
from pipeline.stream.cache import CacheConfig
from pipeline.stream.grouping import LengthGrouping, grouped, window_of
from pipeline.stream.manifest import open_manifest
from pipeline.stream.mixture import AnyMixture, LossDriven, Weights, parse_mixture, resolve
from pipeline.stream.order import TaskOrder
from pipeline.stream.places import Places
from pipeline.stream.reader import ShardReader
from pipeline.stream.segments import Segments
from pipeline.stream.shard_files import check_shards, shard_files
from pipeline.stream.wds_stage import StreamStage
from pipeline.world import World

PREFETCH_BATCHES = 4
_HASHED_STEPS = 32
Place = tuple[ShardInfo, int]


class MixedStream:
    """Global batches of many tasks as a pure function of manifest, seed, mixture and step.

    Ranks and loader workers only cut a global batch: each rank takes its contiguous slice of every step, and worker w
    of W loads the rank's slices of the steps s with s % W = w. Resuming is starting at another step.

    Args:
        manifest_path: the ``manifest.json`` of prepared shards, its folder, or the URL of either.
        seed: of every shuffle.
        global_batch_size: samples a step over all ranks.
        mixture: a name (``"proportional"``, ``"temperature"``), a mapping with ``kind``, or a typed mixture.
        split: the split whose shards are streamed.
        length_grouping: put samples of like lengths into one batch; None for the plain order.
        cache: where shards from afar are kept.

    Raises:
        InputError: the manifest or a shard is missing, a task has no sample in the split, or a batch is larger than
            what there is.
    """

    def __init__(
        self,
        manifest_path: str | Path,
        seed: int,
        global_batch_size: int,
        mixture: str | Mapping[str, object] | AnyMixture = "proportional",
        split: str = "train",
        length_grouping: LengthGrouping | None = None,
        cache: CacheConfig | None = None,
    ) -> None:
        cache = cache or CacheConfig()
        self._settings = (manifest_path, seed, global_batch_size, mixture, split, length_grouping, cache)
        manifest = open_manifest(manifest_path, split, cache.patience_s)
        self.manifest_sha256, self.shards, self._specs = manifest.sha256, manifest.shards, manifest.tasks
        self.seed, self.global_batch_size, self.split = seed, global_batch_size, split
        self.mixture, self.length_grouping = parse_mixture(mixture), length_grouping
        counts = {task: int(shards.samples.sum()) for task, shards in self.shards.items()}
        self.num_samples = sum(counts.values())
        if not 1 <= global_batch_size <= self.num_samples:
            raise InputError(
                f"global_batch_size must be from 1 to the {self.num_samples} samples of split {split!r}, "
                f"got {global_batch_size}; choose a smaller batch or prepare more data"
            )
        self.quotas = resolve(self.mixture, counts)
        self._segments = Segments(self.mixture, self.quotas, seed, global_batch_size)
        self._orders = [TaskOrder(t, self.shards[t].samples, seed) for t in self.tasks]
        files = shard_files(manifest.root, cache, self.working_set_bytes)
        check_shards(files, tuple(self.shards.values()), manifest.root)
        self._reader = ShardReader(files, max(64, 2 * self._group_shards), manifest.tasks)
        self._window = lru_cache(maxsize=2)(self._grouped_window)

    def __reduce__(self) -> tuple[Any, ...]:
        """Travel to another process as settings and state: files are opened anew there."""
        return _rebuilt, (self._settings, self.state_dict())

    @property
    def tasks(self) -> tuple[str, ...]:
        """Names of the tasks in the split."""
        return self.quotas.tasks

    @property
    def epoch_samples(self) -> int:
        """Samples in one epoch of the mixture."""
        return self.num_samples if isinstance(self.mixture, Weights | LossDriven) else self.quotas.period

    @property
    def steps_per_epoch(self) -> int:
        """Steps until an epoch has been given whole; the last one may reach into the next epoch."""
        return math.ceil(self.epoch_samples / self.global_batch_size)

    @property
    def working_set_bytes(self) -> int:
        """Bytes of the shards that are read at a time: one group of each task."""
        return sum(
            min(order.group_shards, len(self.shards[task])) * int(self.shards[task].bytes.max())
            for task, order in zip(self.tasks, self._orders, strict=True)
        )

    @property
    def shuffle_samples(self) -> int:
        """Samples of a task that are shuffled among themselves at a time, for the task with most of them."""
        return max(
            int(np.sort(self.shards[task].samples)[-order.group_shards :].sum())
            for task, order in zip(self.tasks, self._orders, strict=True)
        )

    def global_batch(self, step: int) -> list[str]:
        """Return the keys ``TASK/KEY`` of one step in order, whatever the number of ranks."""
        return [self._reader.key(shard, row) for shard, row in self.places(step)]

    def rank_batch(self, step: int, world: World) -> list[str]:
        """Return the keys of this rank's slice; empty where the step is another loader worker's."""
        return [self._reader.key(shard, row) for shard, row in self.rank_places(step, world)]

    def samples(self, step: int, world: World) -> list[Sample]:
        """Return this rank's slice decoded; empty where the step is another loader worker's."""
        return [self._reader.sample(shard, row) for shard, row in self.rank_places(step, world)]

    def batches(
        self, world: World, start_step: int, num_steps: int, prefetch_batches: int = PREFETCH_BATCHES
    ) -> Iterator[list[Sample]]:
        """Yield this rank's (and worker's) slices of the steps from ``start_step``, read ahead in a thread.

        Under a loss-driven mixture nothing is read ahead beyond the next update.
        """
        world.slice_of(self.global_batch_size)  # refuse before the thread starts
        return self._batches(world, start_step, num_steps, prefetch_batches)

    def _batches(self, world: World, start: int, num_steps: int, depth: int) -> Iterator[list[Sample]]:
        step, end = start, start + num_steps
        while step < end:
            stop = min(end, self._segments.known_until(step))
            mine = (s for s in range(step, stop) if s % world.num_workers == world.worker)
            yield from prefetch((self.samples(s, world) for s in mine), depth)
            step = stop

    def members(self, step: int, world: World) -> list[dict[str, Any]]:
        """Return this rank's slice as webdataset's dicts of undecoded members, with the step under ``__step__``."""
        places = self.rank_places(step, world)
        return [{"__step__": step, **self._reader.members(shard, row)} for shard, row in places]

    def stage(self, world: World, start_step: int = 0, num_steps: int | None = None) -> StreamStage:
        """Return this rank's samples as the first stage of a ``wds.DataPipeline``; see :class:`StreamStage`."""
        return StreamStage(self, world, start_step, num_steps)

    def update_mixture(self, step: int, losses: Mapping[str, float]) -> None:
        """Tell a loss-driven mixture the tasks' losses; the shares change from ``step`` on.

        Every rank must tell the same numbers (reduce them first).

        Raises:
            InputError: the mixture is another, the step is no update step or was told before, or a loss is not > 0.
        """
        self._segments.update(step, losses)
        self._window.cache_clear()

    def state_dict(self) -> dict[str, Any]:
        """Return what resuming needs beside the step: the updates of a loss-driven mixture, and what they belong to."""
        return {"schema": 1, "stream": self._identity(), "updates": list(self._segments.updates)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over the updates of an earlier run.

        Raises:
            InputError: the state belongs to other data or settings, or to a newer format.
        """
        if state.get("schema") != 1 or state.get("stream") != self._identity():
            raise InputError(
                "the saved stream must be of the same manifest, seed, batch, mixture and grouping, "
                f"got {state.get('stream')} for {self._identity()}; start anew, or restore the settings"
            )
        self._segments.restore(state["updates"])
        self._window.cache_clear()

    def schedule_sha256(self) -> str:
        """Return a digest of the settings and of the first steps' samples: equal digests, equal streams."""
        steps = min(self.steps_per_epoch, _HASHED_STEPS, self._segments.known_until(0))
        plain = [[(shard.path, row) for shard, row in self._named(self._plain_places(step))] for step in range(steps)]
        return hashlib.sha256(json.dumps([self._identity(), plain]).encode()).hexdigest()

    def places(self, step: int) -> list[Place]:
        """Return the shard and row of each sample of one step in order."""
        return self._named(self._places(step, slice(None)))

    def rank_places(self, step: int, world: World) -> list[Place]:
        """Return the shard and row of each sample of this rank's slice; empty where the step is another loader
        worker's. Without length grouping nothing is computed of the other ranks' samples."""
        part = world.slice_of(self.global_batch_size)
        return self._named(self._places(step, part)) if step % world.num_workers == world.worker else []

    def lengths(self, step: int) -> list[int]:
        """Return the length of each sample's prompt in one step, in tokens or characters, as counted when prepared."""
        lengths: list[int] = self._lengths(self._places(step, slice(None))).tolist()
        return lengths

    def _places(self, step: int, part: slice) -> Places:
        if step < 0:
            raise InputError(f"step must be >= 0, got {step}; steps are counted from 0")
        if self.length_grouping is None:
            return self._plain_places(step, part)
        updates = self.mixture.every_steps if isinstance(self.mixture, LossDriven) else None
        window = window_of(step, self.length_grouping.window_steps, self.global_batch_size, self.epoch_samples, updates)
        if len(window) == 1:
            return self._plain_places(step, part)
        return self._window(window.start, window.stop)[step - window.start].taken(part)

    def _grouped_window(self, start: int, stop: int) -> list[Places]:
        steps = [self._plain_places(step) for step in range(start, stop)]
        places = Places.joined(steps)
        by_beginning = self.length_grouping is not None and self.length_grouping.by_beginning
        units = self._units(self._named(places)) if by_beginning else None
        chosen = grouped(self._lengths(places), self.global_batch_size, [self.seed, 5, start], units)
        return [places.taken(batch) for batch in chosen]

    def _lengths(self, places: Places) -> np.ndarray:
        lengths = np.empty(len(places), dtype=np.int64)
        for task, shard, which in places.by_shard():
            lengths[which] = self._reader.lengths(self.shards[self.tasks[task]][shard], places.rows[which])
        return lengths

    def _units(self, places: list[Place]) -> list[int]:
        """Return the same number for samples of a task of several texts whose first text is the same."""
        texts = {spec.name: spec.text_fields for spec in self._specs}
        known: dict[tuple[str, str | int], int] = {}
        units = []
        for number, (shard, row) in enumerate(places):
            first, *others = texts[shard.task]
            text = self._reader.sample(shard, row).fields[first] if others else number
            units.append(known.setdefault((shard.task, text), len(known)))
        return units

    def _plain_places(self, step: int, part: slice = slice(None)) -> Places:
        tasks, draws = self._segments.draws(step, part)
        shards, rows = np.empty_like(draws), np.empty_like(draws)
        for number, order in enumerate(self._orders):
            mine = np.flatnonzero(tasks == number)
            if len(mine):
                shards[mine], rows[mine] = order.locate(draws[mine])
        return Places(tasks, shards, rows)

    def _named(self, places: Places) -> list[Place]:
        return [(self.shards[self.tasks[task]][shard], row) for task, shard, row in places]

    @property
    def _group_shards(self) -> int:
        return sum(min(o.group_shards, len(self.shards[t])) for t, o in zip(self.tasks, self._orders, strict=True))

    def _identity(self) -> dict[str, Any]:
        grouping = self.length_grouping.model_dump() if self.length_grouping else None
        return {
            "manifest_sha256": self.manifest_sha256,
            "split": self.split,
            "seed": self.seed,
            "global_batch_size": self.global_batch_size,
            "mixture": self.mixture.model_dump(mode="json"),
            "length_grouping": grouping,
        }


def _rebuilt(settings: tuple[Any, ...], state: Mapping[str, Any]) -> MixedStream:
    stream = MixedStream(*settings)
    stream.load_state_dict(state)
    return stream
