"""The weekly loop on a real Ray cluster, a real registry, a real bucket and the real base model, cut."""

from __future__ import annotations

import datetime as dt
import json
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from jobs.config import load_config
from pipeline.mirror import Mirror
from pipeline.modeling.base_model import BaseModelConfig, resolve_base
from tests.jobs.weekly import START, bring, champion_folder, new_samples, registry_of, retrain, settings
from tests.pipeline.s3_server import BUCKET, S3Server

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]


@pytest.fixture
def base() -> Path:
    """The embedded base as it was converted for all tests, which a new cache would do anew."""
    return resolve_base(BaseModelConfig())


@pytest.fixture
def bucket(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, s3_server: S3Server) -> Mirror:
    """A root of all runs in a bucket, and a machine's cache."""
    monkeypatch.setenv("MTL_LORA_CACHE", str(tmp_path / "one"))
    return Mirror(f"s3://{BUCKET}/runs", tmp_path / "bucket")


def test_three_weeks_on_two_machines_that_share_a_bucket(
    tmp_path: Path, base: Path, bucket: Mirror, monkeypatch: pytest.MonkeyPatch
) -> None:
    one_epoch = {"max_steps": None, "epochs": 1.0}
    common: dict[str, Any] = {
        "root": bucket.url,
        "tracking": {"uri": f"sqlite:///{tmp_path}/mlflow.db"},
        "model": {"base": str(base)},
    }
    path = settings(tmp_path, tasks=3, training=one_epoch, **common)
    bring(tmp_path / "partitions", 0, 3, tasks=3)
    assert '"verdict": "PROMOTE"' in retrain(path, "--json")
    first = registry_of(path).champion()
    assert first is not None
    assert first.provenance.trained_until == START + dt.timedelta(days=1)
    before = new_samples(champion_folder(path))

    result = champion_folder(path) / "result.json"
    result.unlink()  # as if it had been killed right after the promotion
    bucket.remove(f"{result.parent.name}/{result.name}")
    monkeypatch.setenv("MTL_LORA_CACHE", str(tmp_path / "two"))  # another machine, which has nothing of it
    result = champion_folder(path) / "result.json"
    assert "was cut off after its promotion; finishing it" in retrain(path)
    assert json.loads(result.read_text())["verdict"] == "PROMOTE"
    assert registry_of(path).champion() == first

    out = retrain(path, "--json")  # the same data again: no cluster is started, nothing is done
    assert '"verdict": "NOTHING_NEW"' in out
    assert "Starting a local Ray cluster" not in out

    # Two further days bring a fourth task; only its own parts are trained, from the champion on.
    bring(tmp_path / "partitions", 3, 2, tasks=4)
    path = settings(tmp_path, tasks=4, training=one_epoch, retraining={"only_new_tasks": True}, **common)
    assert '"champion": 1' in retrain(path, "--dry-run", "--json")
    assert '"verdict": "PROMOTE"' in retrain(path)
    second = registry_of(path).champion()
    assert second is not None
    assert second.provenance.parent == first.number
    folder = champion_folder(path)
    cached = load_config(path).run_root / "champions" / f"ads-relevance-{registry_of(path).place}-1"
    shared = load_file(cached / "adapter_model.safetensors")
    for name, now in load_file(folder / "adapter" / "adapter_model.safetensors").items():
        old = shared[name]
        assert now[: len(old)].equal(old), name  # shared tensors whole, and the first three tasks' rows
    after = new_samples(folder)
    assert after  # the others learn nothing here
    assert {name.partition("/")[0] for name in after} == {load_config(path).tasks[3].name}
    assert not set(before) & set(after)  # no day is trained on twice
    assert len(set(before)) == len(before)
    assert len(set(after)) == len(after)

    # As if the champion had been near perfect on one task: then its labels must have changed. Held before anything is
    # trained, the champion stays, the reason names the task.
    metrics = second.provenance.metrics | {"query_keyword_relevance": 0.999}
    registry = registry_of(path)
    registry._client.set_model_version_tag(registry.name, str(second.number), "metrics", json.dumps(metrics))
    second = registry.champion()
    bring(tmp_path / "partitions", 5, 2, tasks=4)
    path = settings(tmp_path, tasks=4, retraining={"max_champion_drop": 0.05}, **common)
    out = retrain(path, code=3)
    assert "query_keyword_relevance: the champion scored 0.999" in out
    assert "query_vertical: the champion" not in out
    assert registry.champion() == second
    held = [p for p in load_config(path).run_root.glob("weekly-2026-01-11-*") if (p / "result.json").is_file()]
    assert len(held) == 1
    assert not (held[0] / "adapter").exists()
    assert "is finished: HOLD" in retrain(path, code=3)  # the same key again: nothing is done
    bucket.pull()
    events = [json.loads(line)["event"] for line in (bucket.folder / "notices.jsonl").read_text().splitlines()]
    assert events == ["PROMOTE", "PROMOTE", "NOTHING_NEW", "NOTHING_NEW", "PROMOTE", "HOLD"]
    there = bucket.folder / folder.name
    assert f"warm_start: {bucket.url}/champions/" in (there / "config.yaml").read_text()
    assert load_file(there / "adapter" / "adapter_model.safetensors").keys() == shared.keys()
    assert list((tmp_path / "two" / "runs").glob("champions-*/shared/*/adapter_model.safetensors"))  # of the ranks
    assert json.loads((bucket.folder / held[0].name / "result.json").read_text())["verdict"] == "HOLD"
    assert not (tmp_path / "runs").exists()
