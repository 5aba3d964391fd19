"""A whole study of tiny runs: killed in the middle, started again, and shown."""

from __future__ import annotations

import gzip
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from mlflow import MlflowClient

from jobs.study.study import study
from jobs.study.trials import load_study
from tests.pipeline.training.ranks import tiny_encoder
from tests.processes import kill_tree


def _ground(root: Path) -> Path:
    """Write records of two tasks, their configuration and a study of both, and return the study's path."""
    for task in ("tone", "size"):
        folder = root / "data" / task
        folder.mkdir(parents=True)
        for split, count in {"train": 48, "test": 16}.items():
            words = ("good", "bad") if task == "tone" else ("big", "small")
            rows = [{"id": f"{i}", "text": f"{split} {i} is {words[i % 2]}", "label": i % 2} for i in range(count)]
            with gzip.open(folder / f"{split}.jsonl.gz", "wt") as file:
                file.writelines(json.dumps(row) + "\n" for row in rows)
    spec = {"template": "{text}:", "label_words": [" no", " yes"], "metric": "accuracy"}
    data = {"source": "records", "root": "data"}
    (root / "suite.yaml").write_text(yaml.safe_dump({"name": "s", "data": data, "tasks": {"tone": spec, "size": spec}}))
    values = {
        "name": "tiny",
        "run_root": str(root / "runs"),
        "data_root": str(root / "data"),
        "model": {"base": str(tiny_encoder(root / "base")), "dtype": "float32", "max_length": 32},
        "frozen_layers": 1,
        "samples": {"train": 24, "validation": 12, "test": 12},
        "learning_rates": [0.001, 0.01],
        "widenings": 0,
        "seeds": [1],
        "set": {"adapter.size": {"like": "lora", "r": 4}, "training.max_steps": 3, "training.global_batch_size": 8},
        "suites": {"one": {"config": str(root / "suite.yaml"), "shares_heads": True}},
        "arms": {
            "lora_word": {"prompt": "task_word", "set": {"adapter.method": "lora_per_task"}},  # shares nothing
            "mtl": {"set": {"adapter.method": "mtl_lora", "adapter.num_up_projections": 2}},
        },
        "reference": ["lora_word"],
        "recipes": ["mtl"],
    }
    path = root / "study.yaml"
    path.write_text(yaml.safe_dump(values, sort_keys=False))
    return path


def _start(path: Path) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "jobs.cli", "study", "--config", str(path)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    log = path.with_suffix(".log").open("ab")
    return subprocess.Popen(command, env=environment, stdout=log, stderr=log)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_killed_study_goes_on_runs_nothing_twice_and_ends_with_table_and_page(tmp_path: Path) -> None:
    path = _ground(tmp_path)
    folder = tmp_path / "runs/tiny"
    first = _start(path)
    try:
        deadline = time.monotonic() + 600
        while len(list(folder.glob("rows/**/row.json"))) < 2:
            assert first.poll() is None, path.with_suffix(".log").read_text()[-3000:]
            assert time.monotonic() < deadline
            time.sleep(0.05)
    finally:
        kill_tree(first)
    over = {row: row.stat().st_mtime_ns for row in folder.glob("rows/**/row.json")}

    found = study(load_study(path))
    assert all(row.stat().st_mtime_ns == written for row, written in over.items())
    rows = [json.loads(row.read_text()) for row in folder.glob("rows/**/row.json")]
    finals = {(row["arm"], row["seed"]) for row in rows if row["split"] == "test"}
    assert finals == {("untrained", 0), ("lora_word", 1), ("mtl", 1)}
    searched = {(row["arm"], row["rate"]) for row in rows if row["split"] == "validation"}
    assert {(arm, rate) for arm in ("lora_word", "mtl") for rate in (0.001, 0.01)} <= searched

    (suite,) = json.loads(Path(found["results"]).read_text())["suites"]
    assert [arm["name"] for arm in suite["arms"]] == ["lora_word", "mtl"]
    assert "p (Holm)" in Path(found["table"]).read_text()
    assert "Mean on the development part" in Path(found["page"]).read_text()

    client = MlflowClient(f"sqlite:///{tmp_path}/runs/mlflow.db")
    parent = json.loads((folder / "mlflow.json").read_text())["mlflow_run_id"]
    (experiment,) = [e for e in client.search_experiments() if e.name == "mtl-lora"]
    children = client.search_runs([experiment.experiment_id], f"tags.mlflow.parentRunId = '{parent}'")
    assert {run.info.run_name for run in children} == {
        "-".join(str(row[key]) for key in ("suite", "arm", "split", "rate", "seed")) for row in rows
    }

    page = Path(study(load_study(path), figures=True)["page"]).read_text()
    assert "lora_word: silhouette" in page and "mtl: mixing weights" in page and "Latency by batch size" in page
    assert all(row.stat().st_mtime_ns == written for row, written in over.items())
