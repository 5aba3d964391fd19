"""A run whose shards lie in S3, through the command, on a real server."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.jobs.test_cli import ROWS, Run, _configuration, mtl_lora  # noqa: F401 - a fixture
from tests.pipeline.s3_server import ACCESS_KEY, SECRET_KEY, S3Server

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]
SMALL = ("training.global_batch_size=8", "training.micro_batch_size=4")


def test_prepare_publishes_and_plan_reads_there_without_a_secret_on_disk(
    mtl_lora: Run,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    server = S3Server(tmp_path / "s3")
    server.start()
    try:
        for name, value in server.environment().items():
            monkeypatch.setenv(name, value)
        path = _configuration(tmp_path, ROWS)
        cache = f"cache={{folder: {tmp_path}/cache, max_bytes: 1000000, patience_s: 20}}"
        plain = mtl_lora("plan", "--no-calibrate", "--config", path, "name=plain", *SMALL)
        there = mtl_lora("plan", "--no-calibrate", "--config", path, "publish=s3://shards/run/", cache, *SMALL)
        given = mtl_lora(
            "plan", "--no-calibrate", "--config", path, "name=given", "manifest=s3://shards/run", cache, *SMALL
        )
        assert plain.code == there.code == given.code == 0, plain.err + there.err + given.err
        assert "published as s3://shards/run/manifest.json" in there.err
        plans = [json.loads((tmp_path / "runs" / name / "plan.json").read_text()) for name in ("plain", "t", "given")]
        assert plans[0] == plans[1] == plans[2]
        assert list((tmp_path / "cache").glob("*.npz"))
        written = "".join(p.read_text() for p in (tmp_path / "runs").rglob("*") if p.suffix in (".yaml", ".json"))
        assert ACCESS_KEY not in written
        assert SECRET_KEY not in written + there.out + there.err + given.err
        server.kill()
        late = mtl_lora(
            "plan",
            "--no-calibrate",
            "--config",
            path,
            "name=late",
            "manifest=s3://shards/run",
            "cache.patience_s=2",
            *SMALL,
        )
        assert late.code == 2, late.err
        assert "must answer within 2 s, it did not" in late.err
    finally:
        server.kill()
