"""Adopted shards against our own of the same samples."""

from __future__ import annotations

import json
import tarfile
import tempfile
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pipeline.contracts import Sample, TaskSpec
from pipeline.ingestion import DataConfig, prepare
from pipeline.stream import MixedStream, read_split
from pipeline.world import World
from tests.pipeline.ingestion.foreign_tars import members_of, tar_config, write_shards, write_tar

TASKS = [
    TaskSpec(name="first", template="{txt}:", label_words=(" no", " yes"), label_field="cls"),
    TaskSpec(name="second", template="{txt} {more}:", label_words=(" a", " b", " c"), kind="multiclass"),
]
WORD = st.text(st.characters(codec="utf-8", exclude_characters="\r\n"), max_size=8)
FORMATS = (tarfile.PAX_FORMAT, tarfile.GNU_FORMAT, tarfile.USTAR_FORMAT)


def _records(data: st.DataObject) -> dict[str, list[dict[str, Any]]]:
    first = st.builds(lambda t, c: {"txt": "." + t, "cls": c}, WORD, st.integers(0, 1))
    second = st.builds(lambda t, m, c: {"txt": "." + t, "more": m, "label": c}, WORD, WORD, st.integers(0, 2))
    lists = {"first": st.lists(first, min_size=2, max_size=9), "second": st.lists(second, min_size=2, max_size=9)}
    return {task: data.draw(found) for task, found in lists.items()}


def _content(sample: Sample) -> dict[str, Any]:
    return sample.model_dump(exclude={"key"})


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_adopted_shards_give_the_samples_and_ranks_that_our_own_shards_of_them_give(data: st.DataObject) -> None:
    with tempfile.TemporaryDirectory() as name:
        root, a_shard = Path(name), data.draw(st.integers(1, 4))
        for task, records in _records(data).items():
            path = root / "records" / task / "train.jsonl"
            path.parent.mkdir(parents=True)
            path.write_text("".join(json.dumps(record) + "\n" for record in records))
            inside = data.draw(st.booleans())
            samples = [{"__key__": f"d{i // 3}/s{i}", **({"json": r} if inside else r)} for i, r in enumerate(records)]
            if data.draw(st.booleans()):
                write_shards(root / "in" / f"{task}-%03d.tar", samples, a_shard)
                continue
            for number, start in enumerate(range(0, len(samples), a_shard)):
                # Samples count from their first members; the others may stand anywhere after those.
                groups = [members_of([sample]) for sample in samples[start : start + a_shard]]
                heads, rest = [group[0] for group in groups], [each for group in groups for each in group[1:]]
                path = root / "in" / f"{task}-{number:03d}.tar"
                write_tar(path, [*heads, *data.draw(st.permutations(rest))], data.draw(st.sampled_from(FORMATS)))
        keep = {"duplicates": "keep", "conflicts": "keep"}
        own = DataConfig.model_validate(
            {"source": "records", "root": str(root / "records"), "samples_per_shard": a_shard, **keep}
        )
        adopted = tar_config(root / "in", {t.name: {"train": f"{t.name}-*.tar"} for t in TASKS}, **keep)
        prepare(own, TASKS, root / "own", seed=0)
        prepare(adopted, TASKS, root / "adopted", seed=0)
        for one, other in zip(read_split(root / "own", "train"), read_split(root / "adopted", "train"), strict=True):
            assert _content(one) == _content(other)
        streams = [MixedStream(root / place, seed=3, global_batch_size=2) for place in ("own", "adopted")]
        for step in range(streams[0].steps_per_epoch + 1):
            whole = [[_content(s) for s in stream.samples(step, World(0, 1))] for stream in streams]
            assert whole[0] == whole[1]
            for stream in streams:
                parts = [_content(s) for rank in range(2) for s in stream.samples(step, World(rank, 2))]
                assert parts == whole[0]
