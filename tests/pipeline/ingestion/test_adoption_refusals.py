from __future__ import annotations

import gzip
import json
import pickle
import tarfile
from pathlib import Path
from typing import Any

import pytest

from pipeline.errors import InputError
from pipeline.ingestion import prepare
from pipeline.stream import read_split
from tests.pipeline.ingestion.foreign_tars import PNG, SPAM, members_of, tar_config, texts, write_tar


def quarantined(folder: Path) -> list[dict[str, Any]]:
    lines = [
        line
        for path in (folder / "quarantine").glob("*.gz")
        for line in gzip.decompress(path.read_bytes()).splitlines()
    ]
    return [json.loads(line) for line in lines]


def _special(name: str, kind: bytes, target: str = "") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


def _sparse(name: str) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.pax_headers = {"GNU.sparse.major": "1", "GNU.sparse.minor": "0"}
    return info


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        ([_special("bad.txt", tarfile.SYMTYPE, "/etc/passwd"), ("bad.cls", b"1")], "member is a symbolic link"),
        ([_special("bad.txt", tarfile.LNKTYPE, "000001.txt"), ("bad.cls", b"1")], "member is a hard link"),
        ([_special("bad.txt", tarfile.CHRTYPE), ("bad.cls", b"1")], "member is a device"),
        ([_special("bad.txt", tarfile.FIFOTYPE), ("bad.cls", b"1")], "member is a pipe"),
        ([_sparse("bad.txt"), ("bad.cls", b"1")], "member is a sparse file"),
        ([("../bad.txt", b"x"), ("../bad.cls", b"1")], "member's name leaves the tar"),
        ([("/tmp/bad.txt", b"x"), ("/tmp/bad.cls", b"1")], "member's name leaves the tar"),
        ([("bad.txt", b"x"), ("bad.cls", b"1"), ("bad.pyd", pickle.dumps([1]))], "unpickled, which is never done"),
        ([("bad.txt", b"x"), ("bad.cls", b"1"), ("bad.a.pkl", pickle.dumps([1]))], "unpickled, which is never done"),
        ([("bad.txt", b"x"), ("bad.cls", b"1"), ("bad.txt", b"y")], "sample has a member twice"),
        ([("bad.txt", b"x"), ("bad.CLS", b"1"), ("bad.cls", b"0")], "sample has a member twice"),
        ([("bad.txt", b"x")], "label 'cls' is missing"),
        ([("bad.txt", b"\xff\xfe"), ("bad.cls", b"1")], "field 'txt' is not valid UTF-8"),
        ([("bad.txt", PNG[:8]), ("bad.cls", b"7")], "field 'txt' is not valid UTF-8"),
        ([("bad.txt", b"x"), ("bad.cls", b"7")], "label 'cls' is not a class index"),
        ([("bad.json", b"{"), ("bad.txt", b"x"), ("bad.cls", b"1")], "member 'json' is not JSON"),
        ([("bad.json", b'{"txt": "y"}'), ("bad.txt", b"x"), ("bad.cls", b"1")], "stands both inside json and in a"),
    ],
)
def test_a_bad_sample_is_put_aside_by_reference_and_the_others_stay(
    tmp_path: Path, bad: list[Any], reason: str
) -> None:
    write_tar(tmp_path / "in" / "a.tar", [*members_of(texts(9)), *bad, *members_of(texts(9, start=50))])
    manifest = prepare(tar_config(tmp_path / "in", max_rejected_share=0.1), [SPAM], tmp_path / "out", seed=0)
    assert [r.records for r in manifest.rejected] == [1]
    assert reason in manifest.rejected[0].reason
    assert len(list(read_split(tmp_path / "out", "train"))) == 18
    (entry,) = quarantined(tmp_path / "out")
    assert entry["source"] == "a.tar"
    assert set(entry["record"]) == {"key", "members"}
    assert entry["record"]["key"].endswith("bad")
    assert all(isinstance(at, int) for place in entry["record"]["members"].values() for at in place)


@pytest.mark.parametrize(
    "damage", ["cut in a member", "cut at a border", "header", "empty file", "gzip", "strung together"]
)
def test_a_damaged_tar_is_put_aside_whole_and_the_others_stay(tmp_path: Path, damage: str) -> None:
    write_tar(tmp_path / "in" / "a.tar", members_of(texts(40)))
    path = write_tar(tmp_path / "in" / "b.tar", members_of(texts(4, start=70)))
    data = path.read_bytes()
    with tarfile.open(path) as tar:
        last = tar.getmembers()[-1]
    broken = {
        "cut in a member": data[: last.offset_data + 1],
        "cut at a border": data[: last.offset],
        "header": data[: last.offset + 5] + b"\xff" + data[last.offset + 6 :],
        "empty file": b"",
        "gzip": gzip.compress(data),
        "strung together": data + data,
    }[damage]
    path.write_bytes(broken)
    manifest = prepare(tar_config(tmp_path / "in", max_rejected_share=0.1), [SPAM], tmp_path / "out", seed=0)
    assert manifest.samples_of("spam", "train") == 40
    assert all("tar" in reject.reason for reject in manifest.rejected)
    assert {entry["source"] for entry in quarantined(tmp_path / "out")} == {"b.tar"}
    with pytest.raises(InputError, match=r"at most 1.0% of its records may be invalid.*tar.*b\.tar"):
        prepare(tar_config(tmp_path / "in", max_rejected_share=0.01), [SPAM], tmp_path / "other", seed=0)


def test_an_empty_tar_is_put_aside(tmp_path: Path) -> None:
    write_tar(tmp_path / "in" / "a.tar", members_of(texts(40)))
    write_tar(tmp_path / "in" / "b.tar", [])
    manifest = prepare(tar_config(tmp_path / "in"), [SPAM], tmp_path / "out", seed=0)
    assert [(r.reason, r.records) for r in manifest.rejected] == [("tar holds no sample", 1)]


def test_equal_keys_of_two_tars_are_told_apart(tmp_path: Path) -> None:
    for name, start in (("a", 0), ("b", 100)):
        renamed = [{**sample, "__key__": f"{i}"} for i, sample in enumerate(texts(5, start=start))]
        write_tar(tmp_path / "in" / f"{name}.tar", members_of(renamed))
    prepare(tar_config(tmp_path / "in"), [SPAM], tmp_path / "out", seed=0)
    assert len({sample.key for sample in read_split(tmp_path / "out", "train")}) == 10


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ("a.tar.gz", r"a shard must be a plain \.tar.*got '.*a\.tar\.gz'; unpack a compressed one with gunzip"),
        ("part-{0..3}.tar", r"found none of \['part-1.tar'\]"),
        ("none-*.tar", "found none of"),
    ],
)
def test_what_cannot_be_adopted_is_refused_with_the_remedy(tmp_path: Path, files: str, message: str) -> None:
    path = write_tar(tmp_path / "in" / "part-0.tar", members_of(texts(4)))
    (tmp_path / "in" / "a.tar.gz").write_bytes(gzip.compress(path.read_bytes()))
    with pytest.raises(InputError, match=message):
        prepare(tar_config(tmp_path / "in", {"spam": {"train": files}}), [SPAM], tmp_path / "out", seed=0)
