"""The manifest of prepared shards: found, read and digested."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from pipeline.contracts import ShardInfo, ShardManifest, TaskSpec
from pipeline.errors import InputError
from pipeline.storage import is_remote
from pipeline.stream.shard_files import read_manifest_bytes
from pipeline.stream.shard_table import ShardTable, cut_out, shards_by_task

LARGE_BYTES = 16 << 20
"""Manifests from here on, of some 50,000 shards, are read by columns."""


@dataclass(frozen=True)
class OpenedManifest:
    """What a stream needs of a manifest."""

    tasks: tuple[TaskSpec, ...]
    shards: Mapping[str, ShardTable]
    """Task → its shards in the split, in path order."""
    sha256: str
    root: str
    """Folder or URL of the shards."""


def load_manifest(path: str | Path, patience_s: float = 300.0) -> tuple[ShardManifest, str, str]:
    """Return a manifest, its digest, and the folder or URL of its shards.

    Raises:
        InputError: it is missing or breaks the contract.
    """
    location = manifest_location(path)
    data = read_manifest_bytes(location, patience_s)
    return _validated(data, location), hashlib.sha256(data).hexdigest(), _root(location)


def open_manifest(path: str | Path, split: str, patience_s: float = 300.0) -> OpenedManifest:
    """Return what streaming a split needs of a manifest; a large one is read by columns.

    Raises:
        InputError: it is missing or breaks the contract, or a task has no sample in the split.
    """
    location = manifest_location(path)
    data = read_manifest_bytes(location, patience_s)
    is_plain = b'"adopted":{' not in data  # where each tar lies is looked up of every shard
    cut = cut_out(data) if len(data) >= LARGE_BYTES and is_plain else None
    if cut is None:
        manifest = _validated(data, location)
        shards, splits = _tables(manifest.shards, split, [task.name for task in manifest.tasks])
    else:
        manifest = _validated(cut[0], location)
        shards, splits = shards_by_task(data, cut[1], split, [task.name for task in manifest.tasks], location)
    if empty := [task for task, table in shards.items() if not len(table)]:
        raise InputError(
            f"every task must have samples in split {split!r}, {empty} have none; splits with samples: "
            f"{sorted(splits)}; prepare data for them or leave the tasks out"
        )
    return OpenedManifest(
        manifest.tasks, dict(sorted(shards.items())), hashlib.sha256(data).hexdigest(), _root(location)
    )


def _tables(shards: Sequence[ShardInfo], split: str, tasks: Sequence[str]) -> tuple[dict[str, ShardTable], set[str]]:
    found: dict[str, list[ShardInfo]] = {task: [] for task in tasks}
    for shard in shards:
        if shard.task not in found:
            raise InputError(
                f"every shard must be of a task of the manifest, {shard.path} is of {shard.task!r}, which is none of "
                f"{sorted(found)}; prepare the data anew"
            )
        if shard.split == split:
            found[shard.task].append(shard)
    return {task: ShardTable.of(own) for task, own in found.items()}, {shard.split for shard in shards}


def _validated(data: bytes, location: str) -> ShardManifest:
    try:
        return ShardManifest.model_validate_json(data)
    except ValueError as error:
        raise InputError(f"{location} must hold a valid manifest: {error}; prepare the data anew") from error


def _root(location: str) -> str:
    return location.rpartition("/")[0] if is_remote(location) else str(Path(location).parent)


def manifest_location(path: str | Path) -> str:
    """Return the manifest file or URL of a path to it or to its folder."""
    if is_remote(path):
        return str(path) if str(path).endswith(".json") else f"{str(path).rstrip('/')}/manifest.json"
    path = Path(path)
    return str(path / "manifest.json" if path.is_dir() else path)


def manifest_sha256(path: str | Path) -> str:
    """Return the digest of a manifest file: it names every shard by digest, so it stands for all the data."""
    return hashlib.sha256(read_manifest_bytes(manifest_location(path), 300.0)).hexdigest()
