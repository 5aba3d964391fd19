from __future__ import annotations

import io

import webdataset as wds
from hypothesis import given
from hypothesis import strategies as st

from pipeline.ingestion.tar_writer import SampleTarWriter
from pipeline.shard_index import ShardIndex, scan_tar

KEYS = st.text("abcXYZ019_-", min_size=1, max_size=90)


@given(members=st.dictionaries(KEYS, st.binary(max_size=2000), max_size=12))
def test_tar_writer_writes_the_bytes_of_webdataset(members: dict[str, bytes]) -> None:
    ours, theirs = io.BytesIO(), io.BytesIO()
    with SampleTarWriter(ours) as tar:
        starts = [tar.add(f"{key}.json", data) for key, data in members.items()]
    with wds.TarWriter(theirs, user="", group="", mode=0o644, mtime=0, encoder=False) as tar:
        for key, data in members.items():
            tar.write({"__key__": key, "json": data})
    assert ours.getvalue() == theirs.getvalue()
    index = scan_tar(io.BytesIO(ours.getvalue()), "x")
    assert list(index.offsets) == starts
    assert [ours.getvalue()[o : o + s] for o, s in zip(index.offsets, index.sizes, strict=True)] == [*members.values()]
    if members:
        again = ShardIndex.from_bytes(index.to_bytes(), "x")
        assert [*again.keys] == [*members] and again.to_bytes() == index.to_bytes()
