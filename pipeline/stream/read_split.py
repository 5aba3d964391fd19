"""A whole split in a fixed order, for evaluation."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from pipeline.contracts import Sample
from pipeline.errors import InputError
from pipeline.stream.cache import CacheConfig
from pipeline.stream.manifest import load_manifest
from pipeline.stream.reader import ShardReader
from pipeline.stream.shard_files import check_shards, shard_files
from pipeline.stream.shard_table import ShardTable
from pipeline.world import World


def read_split(
    manifest_path: str | Path,
    split: str,
    task: str | None = None,
    world: World | None = None,
    cache: CacheConfig | None = None,
) -> Iterator[Sample]:
    """Yield each sample of a split exactly once over all ranks, in the order of the shards.

    Raises:
        InputError: the manifest has no such task, the task has no sample in the split, or a shard is missing.
    """
    cache, world = cache or CacheConfig(), world or World(0, 1)
    manifest, _, root = load_manifest(manifest_path, cache.patience_s)
    names = [manifest.task(task).name] if task else [spec.name for spec in manifest.tasks]
    shards = [shard for name in names for shard in manifest.shards_of(name, split)]
    if not shards:
        raise InputError(
            f"split {split!r} must have samples of {names}, found none; splits with samples: "
            f"{sorted({s.split for s in manifest.shards})}"
        )
    total = sum(shard.samples for shard in shards)
    first, last = total * world.rank // world.num_ranks, total * (world.rank + 1) // world.num_ranks
    files = shard_files(root, cache, max(shard.bytes for shard in shards))
    check_shards(files, (ShardTable.of(shards),), root)
    reader = ShardReader(files, open_shards=2, tasks=manifest.tasks)
    start = 0
    for shard in shards:
        for row in range(max(first - start, 0), min(last - start, shard.samples)):
            yield reader.sample(shard, row)
        start += shard.samples
