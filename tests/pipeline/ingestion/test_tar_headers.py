"""The quick look at a tar's headers against the one that knows every kind of tar."""

from __future__ import annotations

import io
import os
import subprocess
import tarfile
import tempfile
from pathlib import Path

import pytest
import webdataset as wds
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pipeline.ingestion.tar_headers import plain_members
from pipeline.ingestion.tar_members import DamagedTarError, TarMember, any_members, tar_members
from tests.pipeline.ingestion.foreign_tars import write_tar

NAME = st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1, max_size=120)
KIND = st.sampled_from([tarfile.REGTYPE] * 6 + [tarfile.DIRTYPE, tarfile.SYMTYPE, tarfile.AREGTYPE])
MEMBER = st.tuples(NAME, KIND, st.binary(max_size=1500), st.sampled_from([0, 1, 1.25, -3.5]))


def _tar(members: list[tuple[str, bytes, bytes, float]], form: int) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=form) as tar:
        for name, kind, data, time in members:
            info = tarfile.TarInfo(name)
            is_file = kind in (tarfile.REGTYPE, tarfile.AREGTYPE)
            info.type, info.size, info.mtime = kind, len(data) if is_file else 0, time
            tar.addfile(info, io.BytesIO(data) if is_file else None)
    return buffer.getvalue()


def _all(data: bytes, way: object) -> list[TarMember] | str:
    with tempfile.TemporaryFile() as file:
        file.write(data)
        file.flush()
        try:
            return list(way(file, len(data)))  # type: ignore[operator]
        except DamagedTarError as error:
            return str(error)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    members=st.lists(MEMBER, max_size=8),
    form=st.sampled_from([tarfile.PAX_FORMAT, tarfile.GNU_FORMAT, tarfile.USTAR_FORMAT]),
    hurt=st.none() | st.tuples(st.integers(0, 20_000), st.integers(0, 255)),
    cut=st.none() | st.integers(0, 20_000),
)
def test_the_quick_look_says_what_the_thorough_one_says(
    members: list[tuple[str, bytes, bytes, float]], form: int, hurt: tuple[int, int] | None, cut: int | None
) -> None:
    try:
        data = bytearray(_tar(members, form))
    except (ValueError, UnicodeError):  # a name or time that the form cannot hold
        return
    if hurt is not None and hurt[0] < len(data):
        data[hurt[0]] = hurt[1]
    content = bytes(data[:cut])
    assert _all(content, tar_members) == _all(content, any_members)


def test_what_tools_write_is_looked_at_quickly(tmp_path: Path) -> None:
    with wds.ShardWriter(str(tmp_path / "%d.tar"), maxcount=100, verbose=0) as writer:
        for number in range(20):
            writer.write({"__key__": f"{number:06d}", "txt": "some words", "cls": 1, "jpg": b"\xff\xd8\xff" * 40_000})
    (tmp_path / "files").mkdir()
    for number in range(3):
        (tmp_path / "files" / f"{number}.txt").write_text("words")
    subprocess.run(["tar", "-cf", tmp_path / "1.tar", "-C", tmp_path / "files", "."], check=True)
    for name, count in (("0.tar", 60), ("1.tar", 3)):
        with (tmp_path / name).open("rb") as file:
            found = plain_members(file, os.fstat(file.fileno()).st_size)
        assert found is not None
        assert len(found) == count


@pytest.mark.parametrize("size", [b"-0000001000\0", b"+0000001000\0", b"0o000001000\0", b"00000_01000\0"])
def test_a_size_that_is_no_plain_number_is_damage_and_leads_nowhere(tmp_path: Path, size: bytes) -> None:
    data = bytearray(write_tar(tmp_path / "a.tar", [("a.txt", b"x" * 600), ("b.txt", b"y")]).read_bytes())
    at = data.index(b"b.txt")
    data[at + 124 : at + 136] = size
    data[at + 148 : at + 156] = b" " * 8
    data[at + 148 : at + 156] = b"%06o\0 " % sum(data[at : at + 512])
    assert _all(bytes(data), tar_members) == "tar has a damaged header"
