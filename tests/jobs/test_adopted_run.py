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


def test_two_ranks_train_on_adopted_shards_in_the_global_order(tmp_path: Path) -> None:
    write_shards(tmp_path / "in" / "train-%04d.tar", texts(48), 20)
    write_tar(tmp_path / "in" / "test.tar", members_of(texts(12, start=100)))
    (tmp_path / "in" / "train-0003.tar").write_bytes((tmp_path / "in" / "train-0002.tar").read_bytes()[:700])
    task = {"template": "Text: {txt}\nOdd:", "label_words": [" no", " yes"], "label_field": "cls"}
    config = {
        "name": "adopted",
        "run_root": str(tmp_path / "runs"),
        "data": {
            "source": "webdataset",
            "root": str(tmp_path / "in"),
            "files": {"odd": {"train": "train-{0000..0003}.tar", "test": "test.tar"}},
        },
        "tasks": {"odd": task},
        "model": {"num_layers": 2},
        "training": {"max_steps": 6, "global_batch_size": 8, "micro_batch_size": 4, "num_workers": 2, "ledger": True},
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(config))
    arguments = ["-m", "jobs.cli", "train", "--config", str(tmp_path / "run.yaml")]
    done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-4000:]
    run = tmp_path / "runs" / "adopted"
    rows = [json.loads(line) for line in (run / "samples.jsonl").read_text().splitlines()]
    stream = MixedStream(run / "shards", seed=0, global_batch_size=8)
    assert {row["rank"] for row in rows} == {0, 1}
    for step in range(6):
        assert [f"{r['task']}/{r['key']}" for r in rows if r["step"] == step] == stream.global_batch(step)
    rejected = json.loads((run / "shards" / "manifest.json").read_text())["rejected"]
    assert [reject["reason"] for reject in rejected] == ["tar is cut off: it has no end mark"]
