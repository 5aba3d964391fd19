"""Tars as other tools lay them out: the order, resume, append, drift and webdataset's pipelines hold on all of them."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
import webdataset as wds

from pipeline.contracts import ShardManifest, TaskSpec
from pipeline.ingestion import DriftThresholds, compare_drift, prepare
from pipeline.ingestion.drift import Threshold
from pipeline.ingestion.profile import PROFILE
from pipeline.stream import MixedStream, SampleLedger, merge_ledgers, read_split
from pipeline.stream.wds_stage import to_sample
from pipeline.world import World
from tests.pipeline.ingestion.foreign_tars import JPEG, SPAM, members_of, tar_config, texts, write_shards, write_tar

BATCH = 4
TASK = TaskSpec(
    name="spam",
    template="{subject} {body}:",
    label_words=(" no", " yes"),
    label_field="verdict",
    columns={"verdict": "meta.json.verdict", "subject": "meta.json.subject", "body": "body.txt"},
    image_field="scan.jpg",
)


def _by_tar(folder: Path, *options: str) -> None:
    """Write the samples as files and pack them with the system's own ``tar``."""
    for number, start in enumerate((0, 11)):
        files = folder / f"files-{number}"
        files.mkdir(parents=True)
        for name, data in members_of(texts(11, start)):
            (files / name).write_bytes(data)
        names = ["."] if "./" in options else sorted(path.name for path in files.iterdir())
        given = [option for option in options if option != "./"]
        command = ["tar", "--sort=name", *given, "-cf", folder / f"{number}.tar", "-C", files, *names]
        subprocess.run(command, check=True)


def _by_another_tool(folder: Path) -> None:
    """Write several members a sample under nested folders, texts and labels in JSON, and members of unknown kinds."""
    rows: list[dict[str, Any]] = []
    for sample in texts(22):
        told = {"verdict": sample["cls"], "subject": "A subject"}
        key = f"2026/week.01/{sample['__key__']}"
        rows.append({"__key__": key, "scan.jpg": JPEG, "body.txt": sample["txt"], "meta.json": told, "npy": b"\x93N"})
    for number, some in enumerate((rows[:11], rows[11:])):
        write_tar(folder / "deep" / f"{number}.tar", members_of(some))


LAYOUTS = {
    "wds.ShardWriter": lambda folder: write_shards(folder / "%d.tar", texts(22), 11),
    "tar, GNU": lambda folder: _by_tar(folder, "--format=gnu"),
    "tar, pax": lambda folder: _by_tar(folder, "--format=posix"),
    "tar, ./": lambda folder: _by_tar(folder, "--format=gnu", "./"),
    "another tool": _by_another_tool,
}


def _adopted(folder: Path, layout: str) -> Path:
    LAYOUTS[layout](folder / "in")
    task, pattern = (TASK, "deep/*.tar") if layout == "another tool" else (SPAM, "[01].tar")
    manifest = prepare(tar_config(folder / "in", {"spam": {"train": pattern}}), [task], folder / "out", seed=0)
    assert (manifest.rejected, manifest.samples_of("spam", "train")) == ((), 22)
    return folder / "out"


def _ledger(shards: Path, folder: Path, ranks: int, resumed_at: int | None = None) -> list[tuple[int, str]]:
    """Read an epoch on so many ranks, where ``resumed_at`` says so with new streams from that step on."""
    for rank in range(ranks):
        world = World(rank, ranks)
        end = MixedStream(shards, 3, BATCH).steps_per_epoch
        for start, stop in [(0, end)] if resumed_at is None else [(0, resumed_at + 1), (resumed_at, end)]:
            stream = MixedStream(shards, 3, BATCH)
            with SampleLedger(folder, world, start) as ledger:
                for step in range(start, stop):
                    ledger.record(step, stream.samples(step, world))
    rows = [json.loads(line) for line in merge_ledgers(folder).read_text().splitlines()]
    return [(row["step"], row["key"]) for row in rows]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_each_layout_has_one_ledger_on_one_rank_on_two_and_resumed(tmp_path: Path, layout: str) -> None:
    shards = _adopted(tmp_path, layout)
    whole = _ledger(shards, tmp_path / "one", 1)
    assert len({key for _, key in whole[:22]}) == 22
    assert _ledger(shards, tmp_path / "two", 2) == whole
    assert _ledger(shards, tmp_path / "resumed", 2, resumed_at=2) == whole


@pytest.mark.parametrize("layout", LAYOUTS)
def test_webdatasets_own_pipelines_give_the_samples_of_each_layout_in_order(tmp_path: Path, layout: str) -> None:
    stream = MixedStream(_adopted(tmp_path, layout), 3, BATCH)
    steps = stream.steps_per_epoch
    expected = [list(stream.samples(step, World(0, 1))) for step in range(steps)]
    pipeline = wds.DataPipeline(stream.stage(World(0, 1)), wds.map(to_sample), wds.batched(BATCH, collation_fn=None))
    assert list(pipeline) == expected
    halves = [
        list(wds.DataPipeline(stream.stage(World(rank, 2), start_step=1), wds.map(to_sample))) for rank in range(2)
    ]
    half = BATCH // 2
    both = [halves[rank][at : at + half] for at in range(0, len(halves[0]), half) for rank in range(2)]
    assert [sample for part in both for sample in part] == [sample for step in expected[1:] for sample in step]


def test_appended_tars_join_the_order_and_only_their_new_texts_do(tmp_path: Path) -> None:
    write_shards(tmp_path / "in" / "%d.tar", texts(22), 11)
    prepare(tar_config(tmp_path / "in"), [SPAM], tmp_path / "out", seed=0)
    write_shards(tmp_path / "more" / "%d.tar", texts(10, start=16), 11)
    manifest = prepare(tar_config(tmp_path / "more"), [SPAM], tmp_path / "out", seed=0, append=True)
    assert (manifest.samples_of("spam", "train"), len(manifest.appended)) == (26, 1)
    assert [(reject.reason, reject.records) for reject in manifest.rejected] == [
        ("texts stand in an earlier partition", 6)
    ]
    stream = MixedStream(tmp_path / "out", 3, 13)
    given = sorted(key for step in range(2) for key in stream.global_batch(step))
    assert given == [f"spam/{number:06d}" for number in range(26)]
    assert _ledger(tmp_path / "out", tmp_path / "one", 1) == _ledger(tmp_path / "out", tmp_path / "two", 2, 3)


def test_adopted_tars_have_the_profile_of_copied_records_and_are_held_back_by_drift(tmp_path: Path) -> None:
    samples = texts(60)
    write_shards(tmp_path / "in" / "%d.tar", samples, 11)
    prepare(tar_config(tmp_path / "in"), [SPAM], tmp_path / "adopted", seed=0)
    (tmp_path / "records" / "spam").mkdir(parents=True)
    lines = [json.dumps({"id": s["__key__"], "txt": s["txt"], "cls": s["cls"]}) + "\n" for s in samples]
    (tmp_path / "records" / "spam" / "train.jsonl").write_text("".join(lines))
    records = tar_config(tmp_path / "records").model_copy(update={"source": "records", "files": {}})
    prepare(records, [SPAM], tmp_path / "copied", seed=0)
    profiles = [json.loads((tmp_path / place / PROFILE).read_text()) for place in ("adopted", "copied")]
    assert profiles[0] == profiles[1]
    write_shards(tmp_path / "next" / "%d.tar", [{**s, "txt": f"other words {s['txt'][12:]}"} for s in samples], 11)
    prepare(tar_config(tmp_path / "next"), [SPAM], tmp_path / "moved", seed=0)
    strict = DriftThresholds(new_words=Threshold(warn=0.005, hold=0.01))
    assert compare_drift(tmp_path / "adopted", tmp_path / "moved", strict).verdict == "hold"
    assert compare_drift(tmp_path / "adopted", tmp_path / "copied", strict).verdict == "ok"


def test_the_plans_lengths_are_those_of_copied_records(tmp_path: Path) -> None:
    shards = _adopted(tmp_path, "tar, pax")
    stream = MixedStream(shards, 0, 22)
    lengths = [len(SPAM.template.format(**sample.fields)) for sample in read_split(shards, "train")]
    found = [length for shard in ShardManifest.read(shards / "manifest.json").shards
             for length in _lengths(shards, shard.path)]  # fmt: skip
    assert sorted(found) == sorted(lengths)
    assert stream.num_samples == 22


def _lengths(shards: Path, path: str) -> list[int]:
    from pipeline.shard_index import ShardIndex, index_path

    return [int(n) for n in ShardIndex.from_bytes((shards / index_path(path)).read_bytes(), path).lengths]
