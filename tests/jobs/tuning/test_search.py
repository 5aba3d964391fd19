"""A real search under Ray Tune, killed in the middle and started again."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from jobs.config import load_config
from jobs.tuning.trials import Search
from pipeline.contracts import write_atomic
from pipeline.tracking import read_history
from tests.jobs.tuning.ground import write_ground
from tests.pipeline.training.ranks import tiny_base
from tests.processes import kill_tree

ENDED, HISTORY = "trial.json", "history.jsonl"
STEPS = 48


def _start(config: Path) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "jobs.cli", "tune", "--config", str(config), "--json"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    log = config.with_suffix(".log").open("ab")
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=log)


def _underway(folder: Path) -> int:
    """Return the step of the newest checkpoint of a trial that is not over, 0 for any other."""
    if (folder / ENDED).is_file():
        return 0
    steps = [int(path.parent.name.rpartition("-")[2]) for path in folder.glob("checkpoints/step-*/manifest.json")]
    return max(steps, default=0)


def _rows(folder: Path, step: int) -> list[dict[str, Any]]:
    return [row for row in read_history(folder / HISTORY) if row["step"] <= step]


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_killed_search_goes_on_and_runs_no_finished_trial_again(tmp_path: Path) -> None:
    path = write_ground(tmp_path, str(tiny_base(tmp_path / "base", width=64)), STEPS)
    folders = [trial.folder for trial in Search(load_config(path)).trials()]
    first = _start(path)
    try:
        deadline = time.monotonic() + 500
        while not (
            any((f / ENDED).is_file() for f in folders) and any(0 < _underway(f) <= STEPS // 2 for f in folders)
        ):
            assert first.poll() is None, path.with_suffix(".log").read_text()[-3000:]
            assert time.monotonic() < deadline
            time.sleep(0.1)
    finally:
        kill_tree(first)  # SIGKILL, to the driver and all that it started
    over = {folder: (folder / HISTORY).read_bytes() for folder in folders if (folder / ENDED).is_file()}
    assert 0 < len(over) < len(folders)
    # An unfinished trial's rows up to its newest checkpoint: with speeds in them no step leaves the same row twice.
    begun = {folder: _rows(folder, step) for folder in folders if (step := _underway(folder))}
    assert any(begun.values())

    second = _start(path)
    out, _ = second.communicate(timeout=600)
    assert second.returncode == 0, path.with_suffix(".log").read_text()[-3000:]
    result = json.loads(out)
    for folder, before in over.items():
        assert (folder / HISTORY).read_bytes() == before
    for folder, rows in begun.items():
        assert _rows(folder, rows[-1]["step"]) == rows
    for folder in folders:
        steps = [row["step"] for row in read_history(folder / HISTORY)]
        assert steps == sorted(set(steps))
        assert json.loads((folder / ENDED).read_text())["state"] in ("finished", "stopped")
    best = load_config(Path(result["config"]))
    assert best.tune is None
    assert (
        best.digest() == Search(load_config(path)).trial(result["best_trial"]).digest()
    )  # equal digest, equal adapter
    write_atomic(tmp_path / "page.html", Path(result["page"]).read_text())
    assert "Validation by step" in (tmp_path / "page.html").read_text()
