"""Prepared shards to an object store."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pipeline.contracts import ShardManifest
from pipeline.errors import InputError
from pipeline.ingestion.prepare import MANIFEST, is_whole
from pipeline.ingestion.profile import PROFILE
from pipeline.ingestion.schemas import SCHEMAS
from pipeline.retry import PATIENCE_S, persistently
from pipeline.schemes import WRITABLE
from pipeline.shard_index import index_path
from pipeline.storage import check_target, filesystem, is_remote, join


def publish(folder: Path, url: str, patience_s: float = PATIENCE_S) -> str:
    """Upload shards, indexes and, last, the manifest; return the manifest's URL.

    Shards and indexes that an earlier manifest there names with the same digest are not sent again, and of adopted
    shards only the indexes are; what fails for a while is tried again for ``patience_s``.

    Raises:
        InputError: the shards are not whole, the target is no URL that can be written to, or it refuses them.
    """
    folder = Path(folder)
    if not is_remote(url):
        raise InputError(f"shards are published to a URL of {WRITABLE}, got {url!r}; copy them with cp to a folder")
    url = check_target(url, "shards")
    manifest = ShardManifest.read(folder / MANIFEST)
    if not is_whole(folder, manifest):
        raise InputError(f"all shards of {folder / MANIFEST} must stand beside it before they are published; prepare")
    local = [s.adopted.url for s in manifest.shards if s.adopted and not is_remote(s.adopted.url)]
    if local:
        raise InputError(
            f"adopted shards are published as indexes alone, so their tars must lie where readers reach them, "
            f"{local[:3]} do not; upload them and name them there in data.root"
        )
    fs, root = filesystem(url.rstrip("/"))
    sizes, published = persistently(lambda: _there(fs, root), url, patience_s)

    def put(path: Path, name: str) -> None:
        persistently(lambda: fs.put_file(str(path), f"{root}/{name}"), f"{url}: {name}", patience_s)

    old = _digests(published) if published else {}
    for name, digest in _digests(manifest).items():
        if not (old.get(name) == digest and sizes.get(name) == (folder / name).stat().st_size):
            put(folder / name, name)
    if published != manifest:
        beside = [folder / PROFILE, *sorted((folder / SCHEMAS).glob("*.json")), folder / MANIFEST]
        for path in (*(folder / name for name in manifest.quarantine), *beside):
            put(path, str(path.relative_to(folder)))
    return join(url.rstrip("/"), MANIFEST)


def _digests(manifest: ShardManifest) -> dict[str, str]:
    """Return the name of each shard and index → sha256."""
    found = {}
    for shard in manifest.shards:
        if shard.adopted is None:
            found[shard.path] = shard.sha256
        if shard.index_sha256 is not None:
            found[index_path(shard.path)] = shard.index_sha256
    return found


def _there(fs: Any, root: str) -> tuple[dict[str, int], ShardManifest | None]:
    """Return name → bytes of what is published already, and its manifest."""
    try:
        fs.invalidate_cache()
        listed = fs.ls(root, detail=True)
    except FileNotFoundError:
        return {}, None
    try:
        manifest = ShardManifest.model_validate_json(fs.cat_file(f"{root}/{MANIFEST}"))
    except (FileNotFoundError, ValueError):
        manifest = None
    return {str(entry["name"]).rsplit("/", 1)[-1]: int(entry["size"]) for entry in listed}, manifest
