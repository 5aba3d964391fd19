"""Prepared shards to S3."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pipeline.contracts import ShardManifest
from pipeline.errors import InputError
from pipeline.ingestion.prepare import MANIFEST, is_whole
from pipeline.ingestion.profile import PROFILE
from pipeline.shard_index import index_path
from pipeline.storage import filesystem, is_remote, join


def publish(folder: Path, url: str) -> str:
    """Upload shards, indexes and, last, the manifest; return the manifest's URL.

    Shards that an earlier manifest there names with the same digest are not sent again.

    Raises:
        InputError: the shards are not whole, or the target is not an ``s3://`` URL.
    """
    folder = Path(folder)
    if not is_remote(url):
        raise InputError(f"shards are published to an s3:// URL, got {url!r}; copy them with cp to a folder")
    manifest = ShardManifest.read(folder / MANIFEST)
    if not is_whole(folder, manifest):
        raise InputError(f"all shards of {folder / MANIFEST} must stand beside it before they are published; prepare")
    fs, root = filesystem(url)
    there = {
        str(e["name"]).rsplit("/", 1)[-1]: int(e["size"]) for e in (fs.ls(root, detail=True) if fs.exists(root) else [])
    }
    old = _published(fs, root)
    for shard in manifest.shards:
        same = old.get(shard.path) == shard.sha256
        for name in (shard.path, *((index_path(shard.path),) if shard.index_sha256 else ())):
            if not (same and there.get(name) == (folder / name).stat().st_size):
                fs.put_file(str(folder / name), f"{root}/{name}")
    for name in (*manifest.quarantine, *((PROFILE,) if (folder / PROFILE).is_file() else ())):
        fs.put_file(str(folder / name), f"{root}/{name}")
    fs.put_file(str(folder / MANIFEST), f"{root}/{MANIFEST}")
    return join(url.rstrip("/"), MANIFEST)


def _published(fs: Any, root: str) -> dict[str, str]:
    """Return shard → digest of the manifest that is published already."""
    try:
        data = fs.cat_file(f"{root}/{MANIFEST}")
        return {shard.path: shard.sha256 for shard in ShardManifest.model_validate_json(data).shards}
    except (FileNotFoundError, ValueError):
        return {}
