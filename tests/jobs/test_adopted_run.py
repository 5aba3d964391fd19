"""Training on tars that others wrote, through the command, on two real ranks."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from pipeline.stream import MixedStream
from tests.pipeline.ingestion.foreign_tars import members_of, texts, write_shards, write_tar

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]


def _other_layouts(folder: Path) -> None:
    """Write tars as the system's ``tar`` and another tool do: folders, members of unknown kinds, texts in any order."""
    (folder / "files").mkdir()
    for name, data in members_of(texts(8, start=60)):
        (folder / "files" / name).write_bytes(data)
    subprocess.run(["tar", "-cf", folder / "train-0004.tar", "-C", folder / "files", "."], check=True)
    rows = [
        {**sample, "__key__": f"2026/week.01/{sample['__key__']}", "npy": b"\x93N"} for sample in texts(8, start=80)
    ]
    write_tar(folder / "train-0005.tar", sorted(members_of(rows), key=lambda member: member[0][-3:]))


@pytest.mark.nightly
def test_two_ranks_train_on_tars_of_several_tools_in_the_global_order(tmp_path: Path) -> None:
    write_shards(tmp_path / "in" / "train-%04d.tar", texts(48), 20)
    write_tar(tmp_path / "in" / "test.tar", members_of(texts(12, start=100)))
    (tmp_path / "in" / "train-0003.tar").write_bytes((tmp_path / "in" / "train-0002.tar").read_bytes()[:700])
    _other_layouts(tmp_path / "in")
    task = {"template": "Text: {txt}\nOdd:", "label_words": [" no", " yes"], "label_field": "cls"}
    config = {
        "name": "adopted",
        "run_root": str(tmp_path / "runs"),
        "data": {
            "source": "webdataset",
            "root": str(tmp_path / "in"),
            "files": {"odd": {"train": "train-{0000..0005}.tar", "test": "test.tar"}},
        },
        "tasks": {"odd": task},
        "model": {"num_layers": 2},
        "training": {"max_steps": 8, "global_batch_size": 8, "micro_batch_size": 4, "num_workers": 2, "ledger": True},
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(config))
    arguments = ["-m", "jobs.cli", "train", "--config", str(tmp_path / "run.yaml")]
    done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-4000:]
    run = tmp_path / "runs" / "adopted"
    rows = [json.loads(line) for line in (run / "samples.jsonl").read_text().splitlines()]
    stream = MixedStream(run / "shards", seed=0, global_batch_size=8)
    assert {row["rank"] for row in rows} == {0, 1}
    for step in range(8):
        assert [f"{r['task']}/{r['key']}" for r in rows if r["step"] == step] == stream.global_batch(step)
    assert len({row["key"] for row in rows}) == 64
    rejected = json.loads((run / "shards" / "manifest.json").read_text())["rejected"]
    assert [reject["reason"] for reject in rejected] == ["tar is cut off: it has no end mark"]
