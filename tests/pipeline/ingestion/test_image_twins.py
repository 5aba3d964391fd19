"""Duplicates among adopted images: found as among copied ones, though almost no image is digested."""

from __future__ import annotations

import hashlib
import json
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.contracts import ShardManifest, TaskSpec
from pipeline.errors import InputError
from pipeline.ingestion import prepare
from pipeline.ingestion.shards import replace_file
from pipeline.shard_index import ShardIndex, index_path
from pipeline.stream import read_split
from tests.pipeline.ingestion.foreign_tars import JPEG, members_of, tar_config, write_tar

TASK = TaskSpec(
    name="caption", template="{txt}\nTrue:", label_words=(" no", " yes"), label_field="cls", image_field="jpg"
)
FILES = {"caption": {"train": "train-*.tar", "test": "test-*.tar"}}


def _twin(image: bytes) -> bytes:
    """Return another image of the same size and CRC-32: CRC-32's polynomial is added to its last bytes."""
    bits = [int(bit) for bit in f"{0x104C11DB7:033b}"] + [0] * 7
    delta = bytes(sum(bit << place for place, bit in enumerate(bits[at : at + 8])) for at in range(0, 40, 8))
    return image[:-5] + bytes(a ^ b for a, b in zip(image[-5:], delta, strict=True))


IMAGE = JPEG + bytes(range(64))
OTHER = _twin(IMAGE)


def _write(path: Path, images: list[bytes], label: int = 1, start: int = 0) -> None:
    samples: list[dict[str, Any]] = [
        {"__key__": f"{path.stem}-{start + i}", "txt": "what is this?", "cls": label, "jpg": image}
        for i, image in enumerate(images)
    ]
    write_tar(path, members_of(samples))


def _reasons(manifest: ShardManifest) -> dict[tuple[str, str], int]:
    return {(reject.split, reject.reason): reject.records for reject in manifest.rejected}


def test_images_of_equal_size_and_checksum_are_told_apart_and_equal_ones_found(tmp_path: Path) -> None:
    assert zlib.crc32(IMAGE) == zlib.crc32(OTHER)
    assert IMAGE != OTHER
    _write(tmp_path / "in" / "train-0.tar", [IMAGE, OTHER, JPEG])
    _write(tmp_path / "in" / "train-1.tar", [JPEG, OTHER, JPEG + b"1"])
    _write(tmp_path / "in" / "test-0.tar", [_twin(JPEG + b"1"), JPEG + b"2"])
    manifest = prepare(tar_config(tmp_path / "in", FILES), [TASK], tmp_path / "out", seed=0)
    assert _reasons(manifest) == {("train", "texts and label stand in an earlier record"): 2}
    found = [sample.image for sample in read_split(tmp_path / "out", "train")]
    assert found == [IMAGE, OTHER, JPEG, JPEG + b"1"]


def test_leaks_into_the_test_split_and_contradicting_labels_are_found_among_twins(tmp_path: Path) -> None:
    _write(tmp_path / "in" / "train-0.tar", [IMAGE, OTHER, JPEG])
    _write(tmp_path / "in" / "train-1.tar", [JPEG], label=0)
    _write(tmp_path / "in" / "test-0.tar", [OTHER])
    manifest = prepare(tar_config(tmp_path / "in", FILES), [TASK], tmp_path / "out", seed=0)
    assert _reasons(manifest) == {
        ("train", "label differs from other records of the same texts"): 2,
        ("train", "texts stand in train and in another split"): 1,
    }
    assert [sample.image for sample in read_split(tmp_path / "out", "train")] == [IMAGE]


def _as_written_earlier(folder: Path) -> None:
    """Rewrite prepared shards as they were written before: with SHA-256 for each image, checksums of all bytes."""
    manifest, shards = ShardManifest.read(folder / "manifest.json"), []
    for shard in manifest.shards:
        index = ShardIndex.from_bytes((folder / index_path(shard.path)).read_bytes(), shard.path)
        assert shard.adopted is not None
        tar, checksums, digests = Path(shard.adopted.url).read_bytes(), [], []
        for row in range(len(index)):
            members = [tar[at : at + n] for at, n in zip(index.offsets[row], index.sizes[row], strict=True)]
            checksums.append(zlib.crc32(b"".join(members)))
            image = hashlib.sha256(members[index.extensions.index("jpg")]).digest()[:16]
            shown = b"what is this?\x1f\x1e\x1f\x1e\x1f" + image
            digests.append(np.frombuffer(hashlib.blake2b(shown, digest_size=16).digest(), dtype=np.uint8))
        changed = {**index.__dict__, "checksums": np.array(checksums, dtype=np.uint32), "digests": np.stack(digests)}
        data = ShardIndex(**changed).to_bytes()
        replace_file(folder / index_path(shard.path), data)
        told = json.loads(shard.model_dump_json())
        del told["adopted"]["image_digest"]
        shards.append({**told, "index_sha256": hashlib.sha256(data).hexdigest()})
    told = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps({**told, "shards": shards}))


@pytest.mark.parametrize("earlier", [False, True])
def test_what_is_appended_is_held_against_the_images_that_are_there(tmp_path: Path, earlier: bool) -> None:
    _write(tmp_path / "in" / "train-0.tar", [IMAGE, JPEG])
    files = {"caption": {"train": "train-*.tar"}}
    prepare(tar_config(tmp_path / "in", files), [TASK], tmp_path / "out", seed=0)
    if earlier:
        _as_written_earlier(tmp_path / "out")
    _write(tmp_path / "more" / "train-0.tar", [OTHER, JPEG, JPEG + b"1"], start=5)
    config = tar_config(tmp_path / "more", files)
    manifest = prepare(config, [TASK], tmp_path / "out", seed=0, append=True)
    assert _reasons(manifest) == {("train", "texts stand in an earlier partition"): 1}
    samples = list(read_split(tmp_path / "out", "train"))
    assert [sample.image for sample in samples] == [IMAGE, JPEG, OTHER, JPEG + b"1"]


def test_an_image_that_changed_since_is_noticed_when_it_is_read(tmp_path: Path) -> None:
    path = tmp_path / "in" / "train-0.tar"
    _write(path, [IMAGE, JPEG])
    prepare(tar_config(tmp_path / "in", {"caption": {"train": "train-*.tar"}}), [TASK], tmp_path / "out", seed=0)
    reading = read_split(tmp_path / "out", "train")
    next(reading)
    with path.open("r+b") as file:
        at = file.read().rindex(JPEG) + 30
        file.seek(at)
        file.write(b"\7")
    with pytest.raises(InputError, match="was changed or is damaged"):
        list(reading)


def test_records_with_images_are_not_appended_to_tars(tmp_path: Path) -> None:
    _write(tmp_path / "in" / "train-0.tar", [IMAGE])
    prepare(tar_config(tmp_path / "in", {"caption": {"train": "train-*.tar"}}), [TASK], tmp_path / "out", seed=0)
    (tmp_path / "records" / "caption").mkdir(parents=True)
    (tmp_path / "records" / "caption" / "a.jpg").write_bytes(IMAGE)
    (tmp_path / "records" / "caption" / "train.jsonl").write_text('{"txt": "a", "cls": 1, "jpg": "a.jpg"}\n')
    config = tar_config(tmp_path / "records").model_copy(update={"source": "records", "files": {}})
    with pytest.raises(InputError, match=r"can be appended to shards of records only.*append tars"):
        prepare(config, [TASK], tmp_path / "out", seed=0, append=True)
