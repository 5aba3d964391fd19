"""The data of a run through the command: partitions added, drift held back, given shards, the plan."""

from __future__ import annotations

import json
import os
from pathlib import Path

from jobs.config import load_config
from jobs.run_folder import RunFolder
from pipeline.contracts import ShardManifest
from pipeline.stream import manifest_sha256
from tests.jobs.test_cli import ROWS, Run, _configuration, mtl_lora  # noqa: F401 - a fixture

LATER = [{"text_a": f"another note {i}", "label": int(i < 7)} for i in range(8)]


def _shards(folder: Path) -> dict[str, tuple[bytes, int]]:
    return {p.name: (p.read_bytes(), p.stat().st_mtime_ns) for p in folder.glob("*.tar")}


def test_append_adds_a_partition_and_leaves_the_old_shards_alone(mtl_lora: Run, tmp_path: Path) -> None:  # noqa: F811
    path = _configuration(tmp_path, ROWS)
    none = mtl_lora("prepare", "--config", path, "--append")
    assert none.code == 2, none.err
    assert "ShardManifest must be a file" in none.err
    assert mtl_lora("prepare", "--config", path).code == 0
    shards = tmp_path / "runs" / "t" / "shards"
    before = _shards(shards)
    _configuration(tmp_path, LATER)
    done = mtl_lora("prepare", "--config", path, "--append", "--json")
    assert done.code == 0, done.err
    manifest = json.loads(done.out)
    assert len(manifest["appended"]) == 1
    assert sum(shard["samples"] for shard in manifest["shards"]) == 32
    after = _shards(shards)
    assert {name: after[name] for name in before} == before
    assert len(after) == 2 * len(before)
    assert mtl_lora("prepare", "--config", path, "--append").code == 0
    assert _shards(shards) == after


def test_schemas_stand_beside_the_manifest(mtl_lora: Run, tmp_path: Path) -> None:  # noqa: F811
    assert mtl_lora("prepare", "--config", _configuration(tmp_path, ROWS)).code == 0
    schemas = tmp_path / "runs" / "t" / "shards" / "schemas"
    assert json.loads((schemas / "record-spam.schema.json").read_text())["required"] == ["text_a", "label"]
    assert (schemas / "ShardManifest.schema.json").is_file()


def test_drift_warns_or_holds_the_run_back(mtl_lora: Run, tmp_path: Path) -> None:  # noqa: F811
    many = [{"text_a": f"message number {i}", "label": i % 2} for i in range(60)]
    path = _configuration(tmp_path, many)
    assert mtl_lora("prepare", "--config", path, "name=earlier").code == 0
    _configuration(tmp_path, [row | {"label": 1} for row in many])
    against = f"drift.against={tmp_path}/runs/earlier/shards"
    held = mtl_lora("plan", "--no-calibrate", "--config", path, against)
    assert held.code == 3, held.err
    assert "held back: the data has drifted from" in held.err
    assert "hold: task 'spam': label_psi must be < 0.25" in held.err
    assert not (tmp_path / "runs" / "t" / "plan.json").exists()
    found = json.loads((tmp_path / "runs" / "t" / "drift.json").read_text())
    assert found["verdict"] == "hold"
    warned = mtl_lora(
        "plan", "--no-calibrate", "--config", path, against, "drift.thresholds.label_psi={warn: 0.1, hold: 100}"
    )
    assert warned.code == 0, warned.err
    assert "Drift from the earlier data" in warned.err and " warn" in warned.err
    calm = mtl_lora(
        "plan", "--no-calibrate", "--config", path, "name=calm", f"drift.against={tmp_path}/runs/t/shards/manifest.json"
    )
    assert calm.code == 0, calm.err
    assert "Drift from" not in calm.err
    missing = mtl_lora("plan", "--no-calibrate", "--config", path, f"drift.against={tmp_path}/nowhere")
    assert missing.code == 2, missing.err
    assert "DataProfile must be a file" in missing.err


def test_given_shards_serve_another_run(mtl_lora: Run, tmp_path: Path) -> None:  # noqa: F811
    path = _configuration(tmp_path, ROWS)
    small = ("training.global_batch_size=8", "training.micro_batch_size=4")
    assert mtl_lora("plan", "--no-calibrate", "--config", path, *small).code == 0
    given = f"manifest={tmp_path}/runs/t/shards"
    assert mtl_lora("plan", "--no-calibrate", "--config", path, "name=second", given, *small).code == 0
    plans = [json.loads((tmp_path / "runs" / name / "plan.json").read_text()) for name in ("t", "second")]
    assert plans[0] == plans[1]
    assert not (tmp_path / "runs" / "second" / "shards").exists()
    appended = mtl_lora("prepare", "--config", path, "name=second", given, "--append")
    assert appended.code == 2, appended.err
    assert "only a run's own shards can be appended to" in appended.err
    other = mtl_lora("plan", "--no-calibrate", "--config", path, "name=third", given, "tasks.spam.metric=accuracy")
    assert other.code == 2, other.err
    assert (
        "tasks must be those of the given shards, with equal templates and label words, ['spam'] are not" in other.err
    )
    both = mtl_lora("plan", "--no-calibrate", "--config", path, given, "publish=s3://bucket/x")
    folder = mtl_lora("plan", "--no-calibrate", "--config", path, f"publish={tmp_path}")
    assert both.code == folder.code == 2
    assert "for shards that this run prepares" in both.err


def test_plan_shows_the_epoch_of_each_task(mtl_lora: Run, tmp_path: Path) -> None:  # noqa: F811
    path = _configuration(tmp_path, ROWS)
    done = mtl_lora(
        "plan",
        "--no-calibrate",
        "--config",
        path,
        "--json",
        "training.global_batch_size=8",
        "training.micro_batch_size=4",
    )
    assert done.code == 0, done.err
    epoch = json.loads(done.out)["epoch"]
    manifest = ShardManifest.read(tmp_path / "runs" / "t" / "shards" / "manifest.json")
    assert epoch["tasks"]["spam"]["bytes"] == sum(s.bytes for s in manifest.shards_of("spam", "train"))
    assert epoch["tasks"]["spam"]["samples"] == epoch["samples"] == 8
    for shown in ("spam", "100.00%", "padding", "share asked", epoch["schedule_sha256"][:16]):
        assert shown in done.err, done.err
    assert manifest_sha256(tmp_path / "runs" / "t" / "shards") == manifest_sha256(
        tmp_path / "runs" / "t" / "shards" / "manifest.json"
    )


def test_plan_holds_back_a_run_that_the_machine_cannot_take(mtl_lora: Run, tmp_path: Path) -> None:  # noqa: F811
    path = _configuration(tmp_path, ROWS)
    many = ("training.global_batch_size=8", "training.num_workers=8")
    held = mtl_lora("plan", "--no-calibrate", "--config", path, *many, "model.max_length=16")
    cores = len(os.sched_getaffinity(0))
    if cores < 8:
        assert held.code == 3, held.err
        assert f"training.num_workers must be at most the machine's CPUs, {cores}, got 8; lower it" in held.err
    numbers = json.loads((tmp_path / "runs" / "t" / "plan.json").read_text())
    assert numbers["tokens"]["spam"] > 0
    assert numbers["training"]["rank_bytes"] > 4 * numbers["training"]["parameters"]
    assert "Training, estimated" in held.err
    unknown = mtl_lora("plan", "--no-calibrate", "--config", path, "training.task_weights={span: 2}")
    assert unknown.code == 2
    assert "training.task_weights must name tasks, got 'span'; did you mean 'spam'?" in unknown.err
    double = mtl_lora("plan", "--no-calibrate", "--config", path, "training.deepspeed={zero_optimization: {stage: 1}}")
    assert double.code == 2
    assert "must leave 'zero_optimization.stage' to training.zero_stage" in double.err


def test_the_data_of_a_trained_run_is_not_replaced(mtl_lora: Run, tmp_path: Path) -> None:  # noqa: F811
    path = _configuration(tmp_path, ROWS)
    assert mtl_lora("prepare", "--config", path).code == 0
    config = load_config(path)
    RunFolder(config.folder).bind(config.digest())  # as training does
    folder = tmp_path / "runs" / "t"
    before = _shards(folder / "shards"), (folder / "config.yaml").read_bytes()
    for verb in ("prepare", "plan"):
        other = mtl_lora(verb, "--config", path, "data.max_samples={train: 2}")
        assert other.code == 2, other.err
        assert "was trained with another" in other.err
    assert (_shards(folder / "shards"), (folder / "config.yaml").read_bytes()) == before
    assert mtl_lora("prepare", "--config", path).code == 0
