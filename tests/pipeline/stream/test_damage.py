"""What happens to shards that are damaged, missing or made to harm."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import pickle
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from pipeline.contracts import Sample, ShardInfo, ShardManifest, TaskSpec
from pipeline.errors import InputError
from pipeline.ingestion.shards import write_shard
from pipeline.shard_index import MAX_MEMBER_BYTES, ShardIndex, index_path
from pipeline.storage import check_location, join
from pipeline.stream import MixedStream, read_split
from pipeline.stream.plan import plan_stream

SPEC = TaskSpec(name="spam", template="{text}:", label_words=(" no", " yes"))


def write(folder: Path, shards: int = 3) -> ShardManifest:
    folder.mkdir(parents=True, exist_ok=True)
    infos = []
    for number in range(shards):
        samples = [
            Sample(key=f"{number}-{r}", task="spam", fields={"text": f"text {number} {r}"}, label=0) for r in range(9)
        ]
        infos.append(write_shard(folder, "spam", "train", number, samples))
    manifest = ShardManifest(tasks=(SPEC,), shards=tuple(infos), source_sha256="0")
    manifest.write(folder / "manifest.json")
    return manifest


def read_all(folder: Path) -> int:
    return sum(1 for _ in read_split(folder, "train"))


def test_a_vanished_or_truncated_shard_is_said_before_training_with_numbers(tmp_path: Path) -> None:
    manifest = write(tmp_path)
    (tmp_path / manifest.shards[1].path).unlink()
    with (tmp_path / manifest.shards[2].path).open("r+b") as file:
        file.truncate(3000)
    expected = r"all 3 shards .* 1 are missing \['spam-train-000001.tar'\] and 1 have another size \['spam-train-000002"
    for start in (lambda: MixedStream(tmp_path, 0, 4), lambda: plan_stream(tmp_path, 0, 4), lambda: read_all(tmp_path)):
        with pytest.raises(InputError, match=expected):
            start()


def test_a_flipped_byte_is_found_wherever_it_counts(tmp_path: Path) -> None:
    manifest = write(tmp_path, shards=1)
    path = tmp_path / manifest.shards[0].path
    index = ShardIndex.from_bytes((tmp_path / index_path(path.name)).read_bytes(), "x")
    data = path.read_bytes()
    for row in range(9):
        place = int(index.offsets[row]) + int(index.sizes[row]) // 2
        path.write_bytes(data[:place] + bytes([data[place] ^ 4]) + data[place + 1 :])
        with pytest.raises(InputError, match=f"row {row} must have the checksum in its index"):
            read_all(tmp_path)
    path.write_bytes(data)
    (tmp_path / index_path(path.name)).write_bytes(b"x")
    with pytest.raises(InputError, match=r"index of .* must have the digest in the manifest"):
        read_all(tmp_path)


def test_a_vanished_index_is_said(tmp_path: Path) -> None:
    manifest = write(tmp_path)
    (tmp_path / index_path(manifest.shards[0].path)).unlink()
    with pytest.raises(InputError, match="a shard's index must be there"):
        read_all(tmp_path)


def member(name: str, data: bytes = b"{}", **more: object) -> tuple[tarfile.TarInfo, bytes]:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    for field, value in more.items():
        setattr(info, field, value)
    return info, data


class Harm:
    def __reduce__(self) -> tuple[Callable, tuple[str]]:
        return (eval, ("open('harmed', 'w')",))


BOMB = json.dumps({"key": "a", "task": "spam", "fields": {"text": "x"}, "label": 0}).encode()


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ([member("a.pyd", pickle.dumps(Harm()))], "KEY.json, KEY.png and KEY.jpg only"),
        ([member("a.pkl", pickle.dumps(Harm()))], "KEY.json, KEY.png and KEY.jpg only"),
        ([member("a.pth", pickle.dumps(Harm()))], "KEY.json, KEY.png and KEY.jpg only"),
        ([member("a.json.gz")], "KEY.json, KEY.png and KEY.jpg only"),
        ([member("../a.json")], "KEY.json, KEY.png and KEY.jpg only"),
        ([member("/etc/a.json")], "KEY.json, KEY.png and KEY.jpg only"),
        ([member("a.json", b"", type=tarfile.SYMTYPE, linkname="/etc/passwd")], "plain files only"),
        ([member("a.json", b"", type=tarfile.LNKTYPE, linkname="/etc/passwd")], "plain files only"),
        ([member("a.json", b"", type=tarfile.DIRTYPE)], "plain files only"),
        ([member("a.json", b"", type=tarfile.FIFOTYPE)], "plain files only"),
        ([member("a.json", b"", type=tarfile.CHRTYPE)], "plain files only"),
        ([member("a.json", BOMB), member("a.json", BOMB)], "each member once"),
        ([member("a.png", b"\x89PNG")], "must hold a.json beside its image"),
        ([member("a.json", b"\0" * (MAX_MEMBER_BYTES + 1))], "a member may have 33554432 bytes"),
        ([member("a.json", b"\x80\x04N.")], "must be a valid sample"),
        ([member("a.json", b'{"__class__": "os.system"}')], "must be a valid sample"),
        ([member("a.json", BOMB.replace(b"spam", b"ham"))], "must hold samples of 'spam', row 0 is one of 'ham'"),
    ],
)
def test_harmful_members_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, members: list[tuple[tarfile.TarInfo, bytes]], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for info, data in members:
            tar.addfile(info, io.BytesIO(data))
    foreign(tmp_path, buffer.getvalue(), samples=1)
    with pytest.raises(InputError, match=message):
        read_all(tmp_path)
    assert not (tmp_path / "harmed").exists()


def foreign(folder: Path, tar: bytes, samples: int) -> None:
    """Put a tar of unknown origin beside a manifest that names it, without an index."""
    (folder / "spam-train-000000.tar").write_bytes(tar)
    info = ShardInfo(
        path="spam-train-000000.tar",
        task="spam",
        split="train",
        samples=samples,
        bytes=len(tar),
        sha256=hashlib.sha256(tar).hexdigest(),
        label_counts={},
    )
    ShardManifest(tasks=(SPEC,), shards=(info,), source_sha256="0").write(folder / "manifest.json")


def test_a_gzip_bomb_in_place_of_a_tar_is_not_unpacked(tmp_path: Path) -> None:
    import gzip

    foreign(tmp_path, gzip.compress(b"\0" * (64 << 20)), samples=1)
    with pytest.raises(InputError, match="damaged"):
        read_all(tmp_path)


def test_an_index_that_unpacks_to_too_much_or_pickles_is_refused(tmp_path: Path) -> None:
    import zipfile

    bomb = io.BytesIO()
    with zipfile.ZipFile(bomb, "w", zipfile.ZIP_DEFLATED) as archive, archive.open("keys.npy", "w") as file:
        for _ in range(33):
            file.write(b"\0" * (16 << 20))
    with pytest.raises(InputError, match="an index may have 536870912 bytes"):
        ShardIndex.from_bytes(bomb.getvalue(), "x")
    pickled = io.BytesIO()
    np.savez(pickled, keys=np.array([Harm()], dtype=object), offsets=np.zeros(1))
    with pytest.raises(InputError, match="must be a whole index"):
        ShardIndex.from_bytes(pickled.getvalue(), "x")


def test_a_plain_webdataset_tar_without_an_index_is_read(tmp_path: Path) -> None:
    write(tmp_path / "made", shards=1)
    foreign(tmp_path, (tmp_path / "made/spam-train-000000.tar").read_bytes(), samples=9)
    assert list(read_split(tmp_path, "train")) == list(read_split(tmp_path / "made", "train"))


@pytest.mark.parametrize(
    "location",
    ["pipe:cat /etc/passwd", "http://host/a", "zip://a::s3://b", "|cat a", "ftp://a", "github://a", "data:x"],
)
def test_locations_that_run_or_reach_elsewhere_are_refused(location: str) -> None:
    with pytest.raises(InputError, match="must be a local path or a URL of s3://"):
        check_location(location)


@pytest.mark.parametrize("path", ["../a.tar", "/etc/passwd", "pipe:cat a", "a/../../b", "s3://other/a.tar"])
def test_shard_paths_that_leave_the_folder_are_refused(tmp_path: Path, path: str) -> None:
    with pytest.raises(InputError, match="must stay inside it"):
        join(tmp_path, path)
    manifest = write(tmp_path, shards=1)
    shard = manifest.shards[0].model_copy(update={"path": path})
    manifest.model_copy(update={"shards": (shard,)}).write(tmp_path / "manifest.json")
    with pytest.raises(InputError):
        MixedStream(tmp_path, 0, 1)


@pytest.mark.parametrize(
    ("array", "value"),
    [
        ("sizes", -1),
        ("sizes", 1 << 62),
        ("sizes", MAX_MEMBER_BYTES + 1),
        ("sizes", 1 << 20),
        ("offsets", -512),
        ("offsets", (1 << 63) - 1),
        ("image_sizes", -1),
        ("image_sizes", 1 << 40),
        ("image_offsets", -(1 << 63)),
        ("lengths", -1),
    ],
)
def test_an_index_of_absurd_or_negative_sizes_is_refused_before_anything_is_read(
    tmp_path: Path, array: str, value: int
) -> None:
    manifest = write(tmp_path, shards=1)
    path = tmp_path / index_path(manifest.shards[0].path)
    index = ShardIndex.from_bytes(path.read_bytes(), "x")
    numbers = getattr(index, array).astype(np.int64)
    numbers[4] = value
    data = dataclasses.replace(index, **{array: numbers}).to_bytes()
    path.write_bytes(data)
    info = manifest.shards[0].model_copy(update={"index_sha256": hashlib.sha256(data).hexdigest()})
    manifest.model_copy(update={"shards": (info,)}).write(tmp_path / "manifest.json")
    with pytest.raises(InputError, match=r"a sample must lie within its shard .* of row 4|must have lengths >= 0"):
        read_all(tmp_path)


@pytest.mark.parametrize("array", ["offsets", "sizes", "checksums", "lengths", "digests", "keys"])
def test_an_index_whose_arrays_are_of_another_kind_is_refused(array: str) -> None:
    arrays = {name: np.ones(2, dtype=np.int64) for name in ("offsets", "sizes", "image_offsets", "image_sizes")}
    arrays |= {"checksums": np.ones(2, dtype=np.uint32), "lengths": np.ones(2, dtype=np.int32)}
    arrays |= {"keys": np.frombuffer(b"a\nb", dtype=np.uint8), "digests": np.zeros((2, 16), dtype=np.uint8)}
    for other in (np.ones(2), np.ones((2, 2), dtype=np.int64), np.array(["a", "b"]), np.array([200, 201], np.uint8)):
        if array not in ("digests", "keys") and other.dtype == np.uint8:
            continue
        buffer = io.BytesIO()
        np.savez(buffer, **{**arrays, array: other})
        with pytest.raises(InputError, match="prepare the data anew"):
            ShardIndex.from_bytes(buffer.getvalue(), "x")
