"""What one epoch of a stream will be, before anything is trained."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path

from pipeline.contracts import Contract
from pipeline.stream.cache import CacheConfig
from pipeline.stream.grouping import LengthGrouping, padded_lengths
from pipeline.stream.mixture import AnyMixture, LossDriven
from pipeline.stream.stream import MixedStream
from pipeline.world import World

_MEASURED_STEPS = 256


class TaskPlan(Contract):
    """One task's part of an epoch."""

    samples: int
    """Samples that are there."""
    shards: int
    bytes: int
    requested_share: float
    """Share of the stream that the mixture asks for."""
    given_share: float
    """Share that rounding to whole samples gives."""
    epochs: float
    """How often each of its samples is given in one epoch of the stream."""
    mean_length: float
    """Mean length of its prompts over the steps measured, in tokens where ``data.length_tokenizer`` was set, else in
    characters."""
    padding_share: float
    """Share of what its prompts are padded to that is padding, over the steps measured."""


class StreamPlan(Contract):
    """The numbers of one epoch."""

    split: str
    samples: int
    """Samples given in an epoch."""
    steps: int
    global_batch_size: int
    num_ranks: int
    rows_per_rank: int
    shards: int
    bytes: int
    working_set_bytes: int
    """Shards that are read at a time; a cache of twice as much reads each shard once an epoch."""
    shuffle_samples: int
    """Samples of a task that are shuffled among themselves at a time, for the task with most of them."""
    padding_share: float
    """Share of the tokens (or characters) that is padding, where a rank sorts its rows by length and pads each
    micro-batch to its longest; packed rows save it."""
    padding_measured_steps: int
    schedule_sha256: str
    tasks: dict[str, TaskPlan]


def plan_stream(
    manifest_path: str | Path,
    seed: int,
    global_batch_size: int,
    mixture: str | Mapping[str, object] | AnyMixture = "proportional",
    split: str = "train",
    length_grouping: LengthGrouping | None = None,
    num_ranks: int = 1,
    micro_batch_size: int | None = None,
    cache: CacheConfig | None = None,
) -> StreamPlan:
    """Return the plan of one epoch; lengths are measured on the first steps only, from the shards' indexes.

    Raises:
        InputError: whatever ``MixedStream`` refuses.
        ValueError: the ranks do not divide the batch.
    """
    stream = MixedStream(manifest_path, seed, global_batch_size, mixture, split, length_grouping, cache)
    part = World(0, num_ranks).slice_of(global_batch_size)
    rows = part.stop - part.start
    steps = min(stream.steps_per_epoch, _MEASURED_STEPS)
    if isinstance(stream.mixture, LossDriven):
        steps = min(steps, stream.mixture.every_steps)  # later shares are not known
    lengths, padded = _measure(stream, steps, rows, min(micro_batch_size or rows, rows))
    tasks = _task_plans(stream, lengths, padded)
    return StreamPlan(
        split=split,
        samples=stream.epoch_samples,
        steps=stream.steps_per_epoch,
        global_batch_size=global_batch_size,
        num_ranks=num_ranks,
        rows_per_rank=rows,
        shards=sum(task.shards for task in tasks.values()),
        bytes=sum(task.bytes for task in tasks.values()),
        working_set_bytes=stream.working_set_bytes,
        shuffle_samples=stream.shuffle_samples,
        padding_share=_padding(sum(map(sum, lengths.values())), sum(padded.values())),
        padding_measured_steps=steps,
        schedule_sha256=stream.schedule_sha256(),
        tasks=tasks,
    )


def _measure(
    stream: MixedStream, steps: int, rows: int, micro_batch_size: int
) -> tuple[dict[str, list[int]], Counter[str]]:
    """Return the lengths of each task's samples in the first steps, and how long they are in all when padded."""
    lengths: dict[str, list[int]] = {task: [] for task in stream.tasks}
    padded = Counter[str]()
    for step in range(steps):
        tasks = [shard.task for shard, _ in stream.places(step)]
        found = list(zip(stream.lengths(step), tasks, strict=True))
        for start in range(0, len(found), rows):
            part = sorted(found[start : start + rows])
            longest = padded_lengths([length for length, _ in part], micro_batch_size)
            for (length, task), most in zip(part, longest, strict=True):
                lengths[task].append(length)
                padded[task] += most
    return lengths, padded


def _padding(length: int, padded: int) -> float:
    return 1 - length / padded if padded else 0.0


def _task_plans(stream: MixedStream, lengths: Mapping[str, list[int]], padded: Counter[str]) -> dict[str, TaskPlan]:
    plans = {}
    for task, quota, requested in zip(stream.tasks, stream.quotas.counts, stream.quotas.requested, strict=True):
        shards = stream.shards[task]
        samples = int(shards.samples.sum())
        given = quota / stream.quotas.period
        plans[task] = TaskPlan(
            samples=samples,
            shards=len(shards),
            bytes=int(shards.bytes.sum()),
            requested_share=requested,
            given_share=given,
            epochs=given * stream.epoch_samples / samples,
            mean_length=sum(lengths[task]) / max(len(lengths[task]), 1),
            padding_share=_padding(sum(lengths[task]), padded[task]),
        )
    return plans
