"""Samples that look alike by their texts and the size and CRC-32 of their images: their images are looked at.

Almost no sample of an adopted tar has such a twin, so that the images of almost none need a digest that no two share;
those that have one get the SHA-256 of their images.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path

import numpy as np

from pipeline.adopted_sample import adopted_sample, tar_reader
from pipeline.contracts import ImageDigest, ShardInfo, ShardManifest, TaskSpec
from pipeline.errors import InputError
from pipeline.ingestion.source_file import SourceFile
from pipeline.ingestion.tar_places import TarPlaces
from pipeline.shard_index import ShardIndex, index_path


def strong_digest(image: bytes, kind: ImageDigest) -> bytes:
    """Return 16 bytes of a digest that no two images share."""
    if kind == "blake2b":
        return hashlib.blake2b(image, digest_size=16).digest()
    return hashlib.sha256(image).digest()[:16]


def image_digest_of(manifest: ShardManifest, is_webdataset: bool) -> ImageDigest | None:
    """Return what of an image goes into the digests of the shards that are appended to; None where none has images.

    Raises:
        InputError: records are appended to adopted tars.
    """
    tasks = {task.name for task in manifest.tasks if task.image_field}
    kinds: set[ImageDigest] = {
        shard.adopted.image_digest if shard.adopted else "blake2b" for shard in manifest.shards if shard.task in tasks
    }
    if not is_webdataset and kinds - {"blake2b"}:
        raise InputError(
            "records with images can be appended to shards of records only, those that are there are adopted tars, "
            "among which their duplicates would not be found; append tars, or prepare the records into another folder"
        )
    return min(kinds, default=None)


class ImageTwins:
    """Tells samples apart of which the cheap digests agree.

    Args:
        work: folder with the units' files.
        sources: the tar of each unit.
        tasks: by their number in the rows.
        folder: of the shards that are appended to.
        manifest: of those; None where there are none.
    """

    def __init__(
        self,
        work: Path,
        sources: Sequence[SourceFile],
        tasks: Sequence[TaskSpec],
        folder: Path,
        manifest: ShardManifest | None,
    ) -> None:
        self._sources, self._tasks, self._folder, self._manifest = sources, tasks, folder, manifest
        self._places = cache(lambda unit: TarPlaces.read(work / f"unit-{unit:06d}.places"))

    def told_apart(self, task: int, rows: np.ndarray, seen: np.ndarray) -> np.ndarray:
        """Return rows of a task with digests that are equal only where the images are.

        Args:
            task: number of the task.
            rows: with ``high`` and ``low``, the words of the cheap digest, and with ``unit`` and ``row``.
            seen: words of the digests of the task's shards that are appended to.
        """
        if not self._tasks[task].image_field:
            return rows
        # Half of the digest is enough to find those that may be alike.
        order = np.argsort(rows["high"], kind="stable")
        equal = np.diff(rows["high"][order]) == 0
        is_alike = np.isin(rows["high"], seen[:, 0])
        is_alike[order[1:][equal]] = is_alike[order[:-1][equal]] = True
        alike = np.flatnonzero(is_alike)
        if not len(alike):
            return rows
        rows = rows.copy()
        digests = {place: self._image(rows[place]) for place in alike.tolist()}
        wanted = {(int(rows["high"][place]), int(rows["low"][place])) for place in digests}
        earlier = self._earlier(self._tasks[task], wanted) if len(seen) else set()
        for place, digest in digests.items():
            if (int(rows["high"][place]), int(rows["low"][place]), digest) not in earlier:
                high, low = np.frombuffer(digest, dtype="<u8")
                rows["high"][place] ^= high
                rows["low"][place] ^= low
        return rows

    def _image(self, row: np.void) -> bytes:
        unit = int(row["unit"])
        offset, size = self._places(unit).image(int(row["row"]))
        with tar_reader(self._sources[unit].location) as read:
            return strong_digest(read(offset, size), "sha256")

    def _earlier(self, task: TaskSpec, wanted: set[tuple[int, int]]) -> set[tuple[int, int, bytes]]:
        """Return words and image digest of the samples of earlier shards that have one of the wanted words."""
        found = set()
        for shard in self._manifest.shards if self._manifest else ():
            if shard.task != task.name or shard.index_sha256 is None or shard.adopted is None:
                continue
            index = ShardIndex.from_bytes((self._folder / index_path(shard.path)).read_bytes(), shard.path)
            words = np.ascontiguousarray(index.digests).view("<u8").reshape(-1, 2).tolist()
            alike = [(row, (high, low)) for row, (high, low) in enumerate(words) if (high, low) in wanted]
            images = _images(shard, task, index, [row for row, _ in alike])
            found |= {(*at, strong_digest(image, "sha256")) for (_, at), image in zip(alike, images, strict=True)}
        return found


def _images(shard: ShardInfo, task: TaskSpec, index: ShardIndex, rows: Sequence[int]) -> Iterator[bytes]:
    with tar_reader(shard.adopted.url) if rows and shard.adopted else contextlib.nullcontext() as read:
        for row in rows:
            image = adopted_sample(shard, task, index, row, read).image  # type: ignore[arg-type]  # rows has none then
            yield image or b""
