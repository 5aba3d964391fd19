from __future__ import annotations

import os
import tarfile
from pathlib import Path
from typing import Any

import pytest

from pipeline.contracts import TaskSpec
from pipeline.errors import InputError
from pipeline.ingestion import prepare
from pipeline.stream import MixedStream, read_split
from tests.pipeline.ingestion.foreign_tars import (
    JPEG,
    PNG,
    SPAM,
    members_of,
    tar_config,
    texts,
    write_shards,
    write_tar,
)


def test_shards_of_webdatasets_own_writer_are_read_where_they_lie(tmp_path: Path) -> None:
    write_shards(tmp_path / "in" / "part-%04d.tar", texts(25), 10)
    before = {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in (tmp_path / "in").iterdir()}
    config = tar_config(tmp_path / "in", {"spam": {"train": "part-{0000..0002}.tar"}})
    manifest = prepare(config, [SPAM], tmp_path / "out", seed=0)
    assert [shard.samples for shard in manifest.shards] == [10, 10, 5]
    samples = list(read_split(tmp_path / "out", "train"))
    assert [(s.key, s.fields, s.label) for s in samples] == [
        (f"{i:06d}", {"txt": f"text number {i}"}, i % 2) for i in range(25)
    ]
    assert not list((tmp_path / "out").glob("*.tar"))
    assert {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in (tmp_path / "in").iterdir()} == before
    stream = MixedStream(tmp_path / "out", seed=1, global_batch_size=5)
    assert sorted(key for step in range(5) for key in stream.global_batch(step)) == [f"spam/{i:06d}" for i in range(25)]


CAPTION = TaskSpec(
    name="caption", template="{text}\nTrue:", label_words=(" no", " yes"), label_field="truth", image_field="jpg"
)


@pytest.mark.parametrize("layout", ["nested", "pax", "gnu", "ustar", "scattered", "with dots", "json", "extra"])
def test_each_layout_gives_the_same_samples(tmp_path: Path, layout: str) -> None:
    samples = texts(8)
    members, form = members_of(samples), tarfile.PAX_FORMAT
    folder = tarfile.TarInfo("./deep")
    folder.type = tarfile.DIRTYPE
    if layout == "nested":
        members = [folder, *((f"./deep/er.v2/{name}", data) for name, data in members)]
    elif layout in ("pax", "gnu"):
        form = tarfile.GNU_FORMAT if layout == "gnu" else form
        members = [(f"{'long-' * 40}é/{name}", data) for name, data in members]
    elif layout == "ustar":
        form = tarfile.USTAR_FORMAT
        members = [(f"{'long-' * 24}/{name}", data) for name, data in members]
    elif layout == "scattered":
        members = members[::2] + members[1::2][::-1]
    elif layout == "with dots":
        members = [("README", b"read me"), ("._000000.txt", b"\0\1"), ("__meta__", b"x"), *members]
    elif layout == "json":
        members = members_of([{"__key__": s["__key__"], "json": {"txt": s["txt"], "cls": s["cls"]}} for s in samples])
    elif layout == "extra":
        members = [each for name, data in members for each in ((name, data), (f"{name[:6]}.{name[7:]}.npy", b"\x93N"))]
    write_tar(tmp_path / "in" / "a.tar", members, form)
    manifest = prepare(tar_config(tmp_path / "in"), [SPAM], tmp_path / "out", seed=0)
    assert manifest.rejected == ()
    found = list(read_split(tmp_path / "out", "train"))
    assert [(s.fields["txt"], s.label) for s in found] == [(s["txt"], float(s["cls"])) for s in samples]
    assert len({s.key for s in found}) == 8


def test_images_and_several_tasks_in_one_tar_are_told_by_a_field(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = []
    for i in range(6):
        said = {"task": "caption", "text": f"t {i}", "truth": i % 2}
        rows.append({"__key__": f"a/{i}", "json": said, "jpg": JPEG + bytes([i])})
    rows[1]["png"] = PNG  # it has its jpg as well
    rows += [{"__key__": f"b/{i}", "task": "spam", "txt": f"text {i}\n", "cls": i % 2} for i in range(4)]
    write_tar(tmp_path / "in" / "a.tar", members_of(rows))
    config = tar_config(tmp_path / "in", {"*": {"train": "a.tar"}})
    manifest = prepare(config, [SPAM, CAPTION], tmp_path / "out", seed=0)
    assert {(s.task, s.samples, s.adopted.url) for s in manifest.shards if s.adopted} == {
        ("spam", 4, str(tmp_path / "in" / "a.tar")), ("caption", 6, str(tmp_path / "in" / "a.tar"))
    }  # fmt: skip
    found = {s.key: s for s in read_split(tmp_path / "out", "train")}
    assert found["a-3"].image == JPEG + b"\3"
    assert found["b-2"].fields == {"txt": "text 2"}
    stream = MixedStream(tmp_path / "out", seed=0, global_batch_size=5)
    assert len({key for step in range(2) for key in stream.global_batch(step)}) == 10


def test_a_changed_or_missing_tar_is_noticed_before_and_while_it_is_read(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "in" / "a.tar", members_of(texts(8)))
    prepare(tar_config(tmp_path / "in"), [SPAM], tmp_path / "out", seed=0)
    reading = read_split(tmp_path / "out", "train")
    next(reading)
    whole = path.read_bytes()
    with path.open("r+b") as file:
        file.write(whole.replace(b"text number", b"test number"))
    with pytest.raises(InputError, match="was changed or is damaged"):
        list(reading)
    os.utime(path, (1, 1))
    with pytest.raises(InputError, match=r"1 of 1 are gone or have changed since.*run prepare again"):
        MixedStream(tmp_path / "out", seed=0, global_batch_size=2)
    prepare(tar_config(tmp_path / "in"), [SPAM], tmp_path / "out", seed=0)
    assert next(read_split(tmp_path / "out", "train")).fields == {"txt": "test number 0"}
    path.unlink()
    with pytest.raises(InputError, match="gone or have changed"):
        next(read_split(tmp_path / "out", "train"))


def test_columns_and_label_maps_hold_whenever_a_sample_is_read(tmp_path: Path) -> None:
    rows = [
        {"__key__": f"{i}", "json": {"said": {"text": f"text {i}"}, "verdict": ["ham", "spam"][i % 2]}}
        for i in range(8)
    ]
    write_tar(tmp_path / "in" / "a.tar", members_of(rows))
    spec = SPAM.model_copy(
        update={"columns": {"txt": "said.text", "cls": "verdict"}, "label_map": {"ham": "no", "spam": 1}}
    )
    prepare(tar_config(tmp_path / "in"), [spec], tmp_path / "out", seed=0)
    samples = list(read_split(tmp_path / "out", "train"))
    assert [(s.fields, s.label) for s in samples] == [({"txt": f"text {i}"}, i % 2) for i in range(8)]
