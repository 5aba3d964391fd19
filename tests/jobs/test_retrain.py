"""The weekly loop on a real Ray cluster, a real registry and the real base model, cut; killed after every stage."""

from __future__ import annotations

import datetime as dt
import hashlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from safetensors.torch import load_file

from jobs.config import load_config
from pipeline.ingestion import SyntheticAdsConfig, synthetic_ads_tasks, write_partition
from pipeline.promotion.registry import Registry
from tests.processes import kill_tree

pytestmark = [pytest.mark.long, pytest.mark.timeout(900)]
ROOT = Path(__file__).resolve().parents[2]
START = dt.date(2026, 1, 5)
ADS = SyntheticAdsConfig(rows_per_day=24)
COMMAND = "import sys; from jobs.cli import main; sys.argv = ['mtl-lora', 'retrain', *sys.argv[1:]]; main()"
DIRECT = """
import json, pathlib, sys
from jobs.config import load_config
from jobs.retrain import retrain
from pipeline import orchestration
from pipeline.errors import HeldBack
config = load_config(pathlib.Path(sys.argv[2]))
try:
    with orchestration.cluster(config.ray):
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


def settings(folder: Path, tasks: int = 4, **more: Any) -> Path:
    config = {
        "name": "weekly",
        "run_root": str(folder / "runs"),
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
        "promotion": {"gates": {"beat_base": False, "gain": "none", "margin": 1.0, "min_samples": 1}},
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
        out, _ = process.communicate(timeout=400)
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
    return load_config(path).run_root / champion.tags["run"]


def new_samples(folder: Path) -> list[str]:
    """Task and key of each trained sample of the run's own days, replayed ones left out."""
    first = load_config(folder / "config.yaml").data.windows["train"][0].strftime("%Y%m%d")
    rows = [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]
    return [f"{row['task']}/{row['key']}" for row in rows if row["key"][:8] >= first]


def test_three_weeks(tmp_path: Path) -> None:
    one_epoch = {"max_steps": None, "epochs": 1.0}
    path = settings(tmp_path, tasks=3, training=one_epoch)
    bring(tmp_path / "partitions", 0, 3, tasks=3)
    assert '"verdict": "PROMOTE"' in retrain(path, "--json")
    first = registry_of(path).champion()
    assert first is not None
    assert first.tags["trained_until"] == (START + dt.timedelta(days=1)).isoformat()
    before = new_samples(champion_folder(path))

    out = retrain(path, "--json")  # the same data again: no cluster is started, nothing is done
    assert '"verdict": "NOTHING_NEW"' in out
    assert "Starting a local Ray cluster" not in out

    # Two further days bring a fourth task; only its own parts are trained, from the champion on.
    bring(tmp_path / "partitions", 3, 2, tasks=4)
    path = settings(tmp_path, tasks=4, training=one_epoch, retraining={"only_new_tasks": True})
    assert '"champion": 1' in retrain(path, "--dry-run", "--json")
    assert '"verdict": "PROMOTE"' in retrain(path)
    second = registry_of(path).champion()
    assert second is not None
    assert second.tags["parent_version"] == str(first.number)
    folder = champion_folder(path)
    shared = load_file(load_config(path).run_root / "champions" / "ads-relevance-1" / "adapter_model.safetensors")
    for name, now in load_file(folder / "adapter" / "adapter_model.safetensors").items():
        old = shared[name]
        assert now[: len(old)].equal(old), name  # shared tensors whole, and the first three tasks' rows
    after = new_samples(folder)
    assert not set(before) & set(after)  # no day is trained on twice
    assert len(set(before)) == len(before)
    assert len(set(after)) == len(after)

    # As if the champion had been near perfect on one task: then its labels must have changed. Held before anything is
    # trained, the champion stays, the reason names the task.
    metrics = json.loads(second.tags["metrics"]) | {"query_ad_relevance": 0.999}
    registry = registry_of(path)
    registry._client.set_model_version_tag(registry.name, str(second.number), "metrics", json.dumps(metrics))
    second = registry.champion()
    bring(tmp_path / "partitions", 5, 2, tasks=4)
    path = settings(tmp_path, tasks=4, retraining={"max_champion_drop": 0.05})
    out = retrain(path, code=3)
    assert "query_ad_relevance: the champion scored 0.999" in out
    assert "query_vertical: the champion" not in out
    assert registry.champion() == second
    held = [p for p in load_config(path).run_root.glob("weekly-2026-01-11-*") if (p / "result.json").is_file()]
    assert len(held) == 1
    assert not (held[0] / "adapter").exists()
    assert "is finished: HOLD" in retrain(path, code=3)  # the same key again: nothing is done
    events = [
        json.loads(line)["event"] for line in (load_config(path).run_root / "notices.jsonl").read_text().splitlines()
    ]
    assert events == ["PROMOTE", "NOTHING_NEW", "PROMOTE", "HOLD"]


STAGES = ("shards/manifest.json", "checkpoints/*", "adapter/predictor.json", "evaluation.json", "decision.json")


def test_killed_after_every_stage_the_end_is_the_same(tmp_path: Path) -> None:
    ends = []
    for folder in (tmp_path / "broken", tmp_path / "unbroken"):
        folder.mkdir()
        bring(folder / "partitions", 0, 3)
        path = settings(folder)
        killed = [stage for stage in STAGES if kill_at(path, stage)] if folder.name == "broken" else []
        out = retrain(path)
        assert '"verdict"' in out
        ends.append((_state(path), _digest(champion_folder(path) / "adapter" / "adapter_model.safetensors")))
        if folder.name == "broken":
            assert len(killed) >= 4, killed  # one stage may be over before the kill comes
    assert ends[0] == ends[1]


def kill_at(path: Path, stage: str) -> bool:
    """Run until a stage's file is there, then kill everything; False if the run ended first."""
    process = start(path)
    root = load_config(path).run_root
    try:
        end = time.monotonic() + 300
        while time.monotonic() < end:
            if any(found for one in stage.split("|") for found in _files(root, one)):
                return process.poll() is None
            if process.poll() is not None:
                return False
            time.sleep(0.02)
        raise AssertionError(f"{stage} was not reached")
    finally:
        kill_tree(process)
        time.sleep(6)  # the lease of the killed one expires


def _files(root: Path, stage: str) -> Iterator[Path]:
    yield from root.glob(f"weekly-2026-*/{stage}")


def _state(path: Path) -> dict[str, Any]:
    registry = registry_of(path)
    champion = registry.champion()
    assert champion is not None
    versions = registry._client.search_model_versions(f"name = '{registry.name}'")
    return {
        "champion": champion.number,
        "aliases": champion.aliases,
        "versions": len(versions),
        "ledger": [(entry.action, entry.version) for entry in registry.ledger.chain()],
        "trained_until": champion.tags["trained_until"],
    }


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
