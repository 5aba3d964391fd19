"""A sample out of a tar that others wrote: what ``prepare`` would have stored of it, made when it is read."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from pipeline.contracts import AdoptedTar, Sample, ShardInfo, TaskSpec
from pipeline.errors import InputError
from pipeline.members import checksum_of, image_checksums, image_of, is_image, record_of
from pipeline.record import renamed
from pipeline.retry import persistently
from pipeline.shard_index import ShardIndex, read_members
from pipeline.storage import filesystem, is_remote
from pipeline.validate import Checked, Rejected, check_record, day_of


@contextmanager
def tar_reader(url: str) -> Iterator[Callable[[int, int], bytes]]:
    """Give what reads so many bytes (second) of a tar from a place (first).

    Raises:
        InputError: there is no such tar.
    """
    fs, path = filesystem(url)
    if is_remote(url):
        yield lambda at, size: persistently(lambda: bytes(fs.cat_file(path, start=at, end=at + size)), url)
        return
    if not Path(path).is_file():
        raise InputError(f"an adopted tar must stay where it is, {url} is gone; restore it")
    with Path(path).open("rb", buffering=0) as file:
        yield lambda at, size: os.pread(file.fileno(), size, at)


def adopted_sample(
    shard: ShardInfo, spec: TaskSpec, index: ShardIndex, row: int, read: Callable[[int, int], bytes]
) -> Sample:
    """Return one sample of an adopted shard.

    Args:
        shard: with the tar's place.
        spec: of the shard's task.
        index: of the shard.
        row: of the sample in it.
        read: gives so many bytes (second) of the tar from a place (first).

    Raises:
        InputError: the tar is damaged or was changed, or the sample is none of the task.
    """
    tar = _tar_of(shard, index)
    contents = read_members(read, _places(index, row))
    checksums = image_checksums(contents) if tar.image_digest == "crc32" else {}
    if checksum_of(contents, checksums) != index.checksums[row]:
        raise InputError(
            f"{tar.url} must hold what it held when it was adopted, sample {index.keys[row]!r} has another checksum: "
            "the tar was changed or is damaged; restore it, or run prepare again"
        )
    with _of_task(tar, spec, index, row):
        record = renamed(record_of(contents), spec.columns)
        checked = check_record(record, spec, spec.text_fields)
        image = image_of(record, spec) if spec.image_field else None
    return Sample(
        key=index.keys[row],
        task=spec.name,
        fields=checked.fields,
        label=checked.label,
        choices=checked.choices,
        answers=checked.answers,
        group=checked.group,
        weight=checked.weight,
        time=day_of(record, tar.time_field),
        image=image,
    )


def adopted_texts(
    shard: ShardInfo, spec: TaskSpec, index: ShardIndex, rows: Sequence[int], read: Callable[[int, int], bytes]
) -> Iterator[Checked]:
    """Yield what samples of an adopted shard say, without reading their images, so that no checksum is compared.

    Raises:
        InputError: a sample is none of the task.
    """
    tar, fields = _tar_of(shard, index), spec.text_fields
    for row in rows:
        places = _places(index, row)
        contents = read_members(read, {name: place for name, place in places.items() if not is_image(name)})
        with _of_task(tar, spec, index, row):
            yield check_record(renamed(record_of(contents), spec.columns), spec, fields)


def _tar_of(shard: ShardInfo, index: ShardIndex) -> AdoptedTar:
    if shard.adopted is None or not index.extensions:
        raise InputError(f"{shard.path} and its index must both be of an adopted tar; prepare the data anew")
    return shard.adopted


def _places(index: ShardIndex, row: int) -> dict[str, tuple[int, int]]:
    at = zip(index.extensions, index.offsets[row].tolist(), index.sizes[row].tolist(), strict=True)
    return {extension: (offset, size) for extension, offset, size in at if offset}


@contextmanager
def _of_task(tar: AdoptedTar, spec: TaskSpec, index: ShardIndex, row: int) -> Iterator[None]:
    try:
        yield
    except Rejected as reason:
        raise InputError(
            f"{tar.url} must hold valid samples of {spec.name!r}, {index.keys[row]!r} is none: {reason}; run prepare "
            "again"
        ) from reason
