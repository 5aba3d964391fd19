"""Adding a day's partition to shards that are there."""

from __future__ import annotations

import hashlib
from collections import Counter
from pathlib import Path

import numpy as np

from pipeline.contracts import RejectCount, ShardManifest
from pipeline.errors import InputError
from pipeline.ingestion.resolve import Earlier
from pipeline.ingestion.scan import hash_key
from pipeline.shard_index import ShardIndex, index_path


def earlier_data(folder: Path, manifest: ShardManifest) -> Earlier:
    """Return what the shards hold already, out of their indexes: 24 bytes a sample.

    Raises:
        InputError: an index is damaged.
    """
    digests: dict[str, list[np.ndarray]] = {}
    keys: dict[tuple[str, str], list[np.ndarray]] = {}
    for shard in manifest.shards:
        if shard.index_sha256 is None:
            continue
        name = index_path(shard.path)
        data = (folder / name).read_bytes()
        if hashlib.sha256(data).hexdigest() != shard.index_sha256:
            raise InputError(
                f"{folder / name} must have the digest in the manifest to be appended to, it has another one; "
                "restore it, or prepare all partitions into another folder"
            )
        index = ShardIndex.from_bytes(data, name)
        words = np.ascontiguousarray(index.digests).view("<u8").reshape(-1, 2)
        digests.setdefault(shard.task, []).append(words)
        hashes = np.array([hash_key(key) for key in index.keys], dtype=np.uint64)
        keys.setdefault((shard.task, shard.split), []).append(hashes)
    return Earlier(
        {task: np.concatenate(found) for task, found in digests.items()},
        {place: np.concatenate(found) for place, found in keys.items()},
    )


def merged(old: ShardManifest, new: ShardManifest) -> ShardManifest:
    """Return the manifest of the old shards and the new ones."""
    counts = Counter[tuple[str, str, str]]()
    for reject in (*old.rejected, *new.rejected):
        counts[reject.task, reject.split, reject.reason] += reject.records
    windows = [window for window in (old.window, new.window) if window]
    return new.model_copy(
        update={
            "shards": tuple(sorted((*old.shards, *new.shards), key=lambda shard: shard.path)),
            "rejected": tuple(
                RejectCount(task=t, split=s, reason=r, records=n) for (t, s, r), n in sorted(counts.items())
            ),
            "quarantine": (*old.quarantine, *new.quarantine),
            "window": (min(w[0] for w in windows), max(w[1] for w in windows)) if windows else None,
            "source_sha256": old.source_sha256,
            "appended": (*old.appended, new.source_sha256),
            # The labels of several partitions together have another best score than either alone.
            "best_attainable": {} if new.best_attainable else old.best_attainable,
        }
    )
