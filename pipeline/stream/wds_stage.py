"""The stream as the first stage of webdataset's own pipelines: ``wds.DataPipeline(stream.stage(world), …)``.

webdataset reads tars from front to back, so it has no function for the sample at a place of the order: reading stays
the stream's own. What the stage gives is webdataset's form, a dict of a sample's undecoded members, so its decoders,
filters, collation and loader work behind it. It asks for any callable, which this module is without importing it.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from typing import Any, Protocol

from pipeline.contracts import Sample
from pipeline.errors import InputError
from pipeline.prefetch import prefetch
from pipeline.world import World

PREFETCH_STEPS = 4


class Members(Protocol):
    """What a stage asks of a stream."""

    global_batch_size: int

    @property
    def steps_per_epoch(self) -> int:
        """Steps until an epoch has been given whole."""

    def members(self, step: int, world: World) -> list[dict[str, Any]]:
        """Return a rank's slice of a step as webdataset's dicts."""


class StreamStage:
    """One rank's samples of consecutive steps, each as the dict that webdataset makes of it.

    A sample is ``{"__key__": KEY, "__url__": TAR, "__step__": STEP, "json": bytes, "png" or "jpg": bytes}``: what
    ``wds.WebDataset`` yields of the same tar, and the step. Every iteration gives the same steps.

    In a loader's worker w of W the steps first + w, first + w + W, … are read. A loader takes from its workers in turn,
    so where each item is one step (``wds.batched(rows of the rank)``) they come in the order of the steps; with other
    batches each sample still comes exactly once.

    Args:
        stream: what is read.
        world: the rank. Loader workers are found out where they run; ``World.worker`` is for other loaders.
        start_step: first step, where a run resumes.
        num_steps: so many steps; None for those up to the end of the epoch.
    """

    def __init__(self, stream: Members, world: World, start_step: int = 0, num_steps: int | None = None) -> None:
        world.slice_of(stream.global_batch_size)  # refuse before a worker does
        if start_step < 0 or (num_steps is not None and num_steps < 0):
            raise InputError(f"start_step and num_steps must be >= 0, got {start_step} and {num_steps}; count from 0")
        self._stream, self._world, self._start = stream, world, start_step
        left = stream.steps_per_epoch - start_step % stream.steps_per_epoch
        self._end = start_step + (left if num_steps is None else num_steps)

    def __call__(self) -> Iterator[dict[str, Any]]:
        """Yield the samples of this process."""
        from torch.utils.data import get_worker_info  # torch takes seconds, and planning needs none

        stream, world, info = self._stream, self._world, get_worker_info()
        if info is not None:
            if world.num_workers > 1:
                raise InputError(
                    f"a stage in a loader's worker must be given a rank alone, got {world}; leave out num_workers: "
                    "the loader's own are counted"
                )
            world = World(world.rank, world.num_ranks, info.id, info.num_workers)
            stream = copy.copy(stream)  # a forked process must open its files anew
        rank = World(world.rank, world.num_ranks)
        steps = range(self._start + world.worker, self._end, world.num_workers)
        for samples in prefetch((stream.members(step, rank) for step in steps), PREFETCH_STEPS):
            yield from samples


def to_sample(members: Mapping[str, Any]) -> Sample:
    """Return the typed sample of a stage's dict: ``wds.map(to_sample)``.

    Raises:
        InputError: it is no valid sample.
    """
    try:
        sample = Sample.model_validate_json(members["json"])
    except ValueError as error:
        place = f"{members['__key__']} of {members['__url__']}"
        raise InputError(f"{place} must be a valid sample: {error}; prepare it anew") from error
    image = members.get("png") or members.get("jpg")
    return sample.model_copy(update={"image": image}) if image else sample
