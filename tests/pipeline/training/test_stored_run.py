"""A run whose folder lies in a bucket: no disk is shared, and nothing but time tells it from one on a disk."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from pipeline.storage import filesystem
from tests.pipeline.s3_server import BUCKET, S3Server
from tests.pipeline.training.ranks import tiny_base
from tests.pipeline.training.running_job import write_config
from tests.processes import kill_tree

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

RUN = f"{BUCKET}/runs/stored"
CODE = """
import pathlib, sys
from jobs.config import load_config
from jobs.main_job import main_job, run_stage
from jobs.run import Run
from pipeline.orchestration.cluster import cluster
stored, local = (load_config(pathlib.Path(sys.argv[1]), [f"run_root={root}"]) for root in sys.argv[2:])
with cluster(stored.ray):
    main_job(Run(stored))
    run_stage(Run(local), "train")
"""
"""The main job on a root, then training alone on another one."""
GATES = {"beat_base": False, "gain": "none", "margin": 1.0, "min_samples": 1, "min_rarer_class": 1}


def _config(root: Path) -> Path:
    tiny_base(root / "base", width=64)
    path = write_config(root, "stored", max_steps=8, checkpoint_steps=2)
    values = yaml.safe_load(path.read_text())
    del values["manifest"]
    values["data"] = {"synthetic": {"rows_per_day": 12, "days": 4}}
    values["promotion"] = {"gates": GATES}
    path.write_text(json.dumps(values | {"tracking": {"uri": f"sqlite:///{root}/mlflow.db"}}))
    return path


def _start(config: Path, root: Path, machine: str) -> subprocess.Popen[bytes]:
    """Start a process as on a machine that has nothing of the run but its configuration."""
    environment = {**os.environ, "MTL_LORA_CACHE": str(root / machine), "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", CODE, str(config), f"s3://{BUCKET}/runs", str(root / "disk")]
    with (root / f"{machine}.log").open("wb") as log:
        return subprocess.Popen(command, env=environment, stdout=log, stderr=log)


def _steps(names: list[str]) -> list[str]:
    return sorted({name.split("/")[1] for name in names if name.startswith("checkpoints/step-")})


@pytest.mark.parametrize("end", [signal.SIGKILL, pytest.param(signal.SIGTERM, marks=pytest.mark.nightly)])
def test_a_run_in_a_bucket_goes_on_on_another_machine_to_the_bits_of_one_on_a_disk(
    end: signal.Signals, tmp_path: Path, s3_server: S3Server
) -> None:
    config = _config(tmp_path)
    files, _ = filesystem(f"s3://{RUN}")
    first = _start(config, tmp_path, "one")
    try:
        while not files.exists(f"{RUN}/checkpoints/step-00000002/manifest.json"):
            assert first.poll() is None, (tmp_path / "one.log").read_text()[-3000:]
            time.sleep(0.05)
        if end == signal.SIGTERM:
            first.send_signal(end)
            assert first.wait(200) == 128 + end, (tmp_path / "one.log").read_text()[-3000:]
    finally:
        kill_tree(first)
    assert not files.exists(f"{RUN}/adapter/predictor.json")
    newest = max(_steps([path.removeprefix(f"{RUN}/") for path in files.find(RUN) if path.endswith("/manifest.json")]))
    assert ("stopped by SIGTERM, saved" in (tmp_path / "one.log").read_text()) == (end == signal.SIGTERM)

    second = _start(config, tmp_path, "two")
    try:
        code = second.wait(700)
    finally:
        kill_tree(second)
    log = (tmp_path / "two.log").read_text()
    assert code == 0, log[-4000:]
    assert f"training goes on from step {int(newest.removeprefix('step-'))}" in log

    disk = tmp_path / "disk" / "stored"
    there = [path.removeprefix(f"{RUN}/") for path in files.find(RUN)]
    for name in (f"adapter/{path.name}" for path in (disk / "adapter").iterdir()):
        assert files.cat_file(f"{RUN}/{name}") == (disk / name).read_bytes(), name
    assert files.cat_file(f"{RUN}/samples.jsonl") == (disk / "samples.jsonl").read_bytes()
    losses = [
        [json.loads(line)["loss"] for line in text.splitlines()]
        for text in (files.cat_file(f"{RUN}/history.jsonl"), (disk / "history.jsonl").read_bytes())
    ]
    assert losses[0] == losses[1]
    assert _steps(there) == sorted(path.name for path in (disk / "checkpoints").glob("step-*"))
    made = ("shards/manifest.json", "plan.json", "evaluation.json", "export/serving.json", "decision.json")
    assert {*made, "config.yaml", "report.html"} <= set(there)
    left = {path.name for path in tmp_path.iterdir()} - {"base", "disk", "s3", "mlflow.db", config.name}
    assert left == {"one", "two", "one.log", "two.log"}
    assert not list((tmp_path / "two").glob("runs/*/ranks/*"))  # what the ranks held is gone
