"""The weekly loop in a folder: days are brought, the command is run, its registry is looked at."""

from __future__ import annotations

import datetime as dt
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml

from jobs.config import load_config
from pipeline.promotion.registry import Registry
from pipeline.synthetic import SyntheticAdsConfig, synthetic_ads_tasks, write_partition
from tests.processes import kill_tree

ROOT = Path(__file__).resolve().parents[2]
START = dt.date(2026, 1, 5)
ADS = SyntheticAdsConfig(rows_per_day=24)
COMMAND = "import sys; from jobs.cli import main; sys.argv = ['mtl-lora', 'retrain', *sys.argv[1:]]; main()"
DIRECT = """
import json, pathlib, sys
from jobs.config import load_config
from jobs.weekly.loop import retrain
from pipeline.orchestration.cluster import cluster
from pipeline.errors import HeldBack
config = load_config(pathlib.Path(sys.argv[2]))
try:
    with cluster(config.ray):
        print(json.dumps(retrain(config)))
except HeldBack as held:
    sys.exit(print(held, flush=True) or 3)
"""
"""The same as the command within a job: half a minute sooner."""


def bring(root: Path, first: int, count: int, tasks: int = 4) -> None:
    for number in range(first, first + count):
        day = START + dt.timedelta(days=number)
        for path in write_partition(ADS, day, root)[tasks:]:
            path.unlink()
        (root / day.isoformat() / "_SUCCESS").touch()


def settings(folder: Path, tasks: int = 4, root: str = "", **more: Any) -> Path:
    config = {
        "name": "weekly",
        "run_root": root or str(folder / "runs"),
        "data": {"source": "records", "root": str(folder / "partitions"), "max_rejected_share": 0.2},
        "tasks": [task.model_dump(mode="json") for task in synthetic_ads_tasks()[:tasks]],
        "model": {"num_layers": 2},
        "training": {
            "max_steps": 6,
            "checkpoint_steps": 2,
            "log_steps": 2,
            "global_batch_size": 8,
            "micro_batch_size": 4,
            "learning_rate": 0.003,
            "ledger": True,
        },
        "retraining": {"max_champion_drop": 0.9, "replay_share": 0.5, "lease_ttl_s": 5},
        "promotion": {
            "gates": {"beat_base": False, "gain": "none", "margin": 1.0, "min_samples": 1, "min_rarer_class": 1}
        },
        "drift": {"thresholds": {name: {"warn": 9, "hold": 99} for name in ("label_psi", "length_psi", "new_words")}},
    }
    for key, value in more.items():
        config[key] = {**config.get(key, {}), **value}  # type: ignore[dict-item]
    path = folder / "weekly.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


def start(path: Path, *more: str, code: str = DIRECT) -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", code, "--config", str(path), *more]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=pipe, stderr=subprocess.STDOUT, text=True)


def retrain(path: Path, *more: str, code: int = 0) -> str:
    process = start(path, *more, code=COMMAND if more else DIRECT)
    try:
        out, _ = process.communicate(timeout=900)
    finally:
        kill_tree(process)
    assert process.returncode == code, out[-6000:]
    return out


def registry_of(path: Path) -> Registry:
    config = load_config(path)
    return Registry(config.promotion.model_name, config.tracking.uri)


def champion_folder(path: Path) -> Path:
    champion = registry_of(path).champion()
    assert champion is not None
    return load_config(path).run_root / champion.provenance.run


def new_samples(folder: Path) -> list[str]:
    """Task and key of each trained sample of the run's own days, replayed ones left out."""
    first = load_config(folder / "config.yaml").data.windows["train"][0].strftime("%Y%m%d")
    rows = [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]
    return [f"{row['task']}/{row['key']}" for row in rows if row["key"][:8] >= first]
