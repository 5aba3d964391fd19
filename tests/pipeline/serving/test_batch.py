"""Batch scoring on a real Ray cluster: whatever is killed, each row is scored once, and the files are the same."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from pipeline.errors import InputError
from pipeline.orchestration.cluster import cluster
from pipeline.orchestration.config import RayConfig
from pipeline.serving import batch_input
from pipeline.serving.batch import ScoringJob, score_files
from tests.pipeline.serving import null_model
from tests.processes import kill_tree

pytestmark = [pytest.mark.slow, pytest.mark.timeout(240)]
ROWS_A_FILE = 3 * batch_input.STRETCH_ROWS - 100


@pytest.fixture(scope="module", autouse=True)
def ray_cluster() -> Iterator[None]:
    with cluster(RayConfig(address="local")):
        yield


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("in")
    for day in range(3):
        (folder / f"day={day}").mkdir()
        rows = (
            {"id": f"{day}-{i}", "task": ("clicks", "topic")[i % 2], "text": "x" * (i % 97 + 1)}
            for i in range(ROWS_A_FILE)
        )
        (folder / f"day={day}/rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def _job(inputs: Path, output: Path) -> ScoringJob:
    return ScoringJob("null", null_model.load, null_model.TASKS, str(inputs), str(output))


def _contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*.parquet"))}


@pytest.fixture(scope="module")
def whole(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    output = tmp_path_factory.mktemp("whole") / "out"
    manifest = score_files(_job(inputs, output))
    assert (manifest.rows, manifest.rejected, len(manifest.files)) == (3 * ROWS_A_FILE, 0, 3)
    assert not (output / "_work").exists()
    for day in range(3):
        found = pq.read_table(output / f"day={day}/rows.parquet").column("id").to_pylist()
        assert found == [f"{day}-{i}" for i in range(ROWS_A_FILE)]
    assert score_files(_job(inputs, output)) == manifest
    return _contents(output)


def test_a_lost_worker_costs_no_row(inputs: Path, whole: dict[str, bytes], tmp_path: Path) -> None:
    load = partial(null_model.load_and_die_once, str(tmp_path / "died"))
    score_files(replace(_job(inputs, tmp_path / "out"), load=load, num_workers=2))
    assert (tmp_path / "died").exists()
    assert _contents(tmp_path / "out") == whole


def test_a_killed_call_goes_on_where_it_was(inputs: Path, whole: dict[str, bytes], tmp_path: Path) -> None:
    script = tmp_path / "score.py"
    script.write_text(
        "import sys\n"
        "from functools import partial\n"
        "from pipeline.orchestration.cluster import cluster\n"
        "from pipeline.orchestration.config import RayConfig\n"
        "from pipeline.serving.batch import ScoringJob, score_files\n"
        "from tests.pipeline.serving import null_model\n"
        "job = ScoringJob('null', partial(null_model.load, 1.0), null_model.TASKS, sys.argv[1], sys.argv[2])\n"
        "with cluster(RayConfig(address='local')):\n"
        "    score_files(job)\n"
    )
    output = tmp_path / "out"
    here = os.environ | {
        "PYTHONPATH": str(Path(__file__).resolve().parents[3])
    }  # the null model is no part of the package
    running = subprocess.Popen([sys.executable, str(script), str(inputs), str(output)], env=here)
    try:
        while len(list(output.glob("_work/*/*.parquet"))) + len(list(output.glob("_work/*.json"))) < 2:
            assert running.poll() is None, "it ended before it could be killed"
            time.sleep(0.1)
    finally:
        kill_tree(running)
    assert not (output / "_manifest.json").exists()
    score_files(_job(inputs, output))
    assert _contents(output) == whole


def test_a_row_that_the_model_refuses_goes_aside_and_too_many_stop_the_work(tmp_path: Path) -> None:
    rows = [{"task": "clicks", "text": "fine"}] * 30 + [{"task": "clicks", "text": "unspeakable"}]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    manifest = score_files(_job(tmp_path / "rows.jsonl", tmp_path / "out"))
    assert (manifest.rows, manifest.rejected) == (30, 1)
    assert "tokens must be the model's" in next(iter(manifest.reasons))
    with pytest.raises(InputError, match=r"at most 1% of the rows may be bad, 1 of 31 are"):
        score_files(replace(_job(tmp_path / "rows.jsonl", tmp_path / "stopped"), max_rejected_share=0.01))


def test_a_file_that_is_damaged_is_named(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl.gz").write_bytes(b"\x1f\x8b\x08\x00 no gzip")
    with pytest.raises(InputError, match=r"rows.jsonl.gz must be a whole file of its kind"):
        score_files(_job(tmp_path, tmp_path / "out"))
