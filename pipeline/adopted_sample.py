"""A sample out of a tar that others wrote: what ``prepare`` would have stored of it, made when it is read."""

from __future__ import annotations

import zlib
from collections.abc import Callable

from pipeline.contracts import Sample, ShardInfo, TaskSpec
from pipeline.errors import InputError
from pipeline.members import image_of, is_image, record_of
from pipeline.record import renamed
from pipeline.shard_index import ShardIndex, read_members
from pipeline.validate import Rejected, check_record, day_of


def adopted_sample(
    shard: ShardInfo,
    spec: TaskSpec,
    index: ShardIndex,
    row: int,
    read: Callable[[int, int], bytes],
    with_image: bool = True,
) -> Sample:
    """Return one sample of an adopted shard.

    Args:
        shard: with the tar's place.
        spec: of the shard's task.
        index: of the shard.
        row: of the sample in it.
        read: gives so many bytes (second) of the tar from a place (first).
        with_image: whether images are read, too; without them the checksum is not compared.

    Raises:
        InputError: the tar is damaged or was changed, or the sample is none of the task.
    """
    tar, key = shard.adopted, index.keys[row]
    if tar is None or not index.extensions:
        raise InputError(f"{shard.path} and its index must both be of an adopted tar; prepare the data anew")
    at = zip(index.extensions, index.offsets[row].tolist(), index.sizes[row].tolist(), strict=True)
    places = {extension: (offset, size) for extension, offset, size in at if offset}
    texts = {extension: place for extension, place in places.items() if with_image or not is_image(extension)}
    contents = read_members(read, texts)
    checksum = 0
    for content in contents.values():
        checksum = zlib.crc32(content, checksum)
    if len(texts) == len(places) and checksum != index.checksums[row]:
        raise InputError(
            f"{tar.url} must hold what it held when it was adopted, sample {key!r} has another checksum: the tar was "
            "changed or is damaged; restore it, or run prepare again"
        )
    try:
        record = renamed(record_of(contents), spec.columns)
        checked = check_record(record, spec, spec.text_fields)
        image = image_of(record, spec) if spec.image_field and with_image else None
    except Rejected as reason:
        raise InputError(
            f"{tar.url} must hold valid samples of {spec.name!r}, {key!r} is none: {reason}; run prepare again"
        ) from reason
    return Sample(
        key=key,
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
