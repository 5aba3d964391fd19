"""A real search under Ray Tune, killed in the middle and started again."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from jobs.config import load_config
from jobs.tuning.trials import Search
from pipeline.contracts import write_atomic
from pipeline.tracking import read_history
from tests.jobs.tuning.ground import write_ground
from tests.pipeline.training.ranks import tiny_base
from tests.processes import kill_tree

ENDED, HISTORY = "trial.json", "history.jsonl"


def _start(config: Path, *more: str) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "jobs.cli", "tune", "--config", str(config), "--json", *more]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    log = config.with_suffix(".log").open("ab")
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=log)


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_a_killed_search_goes_on_and_runs_no_finished_trial_again(tmp_path: Path) -> None:
    path = write_ground(tmp_path, str(tiny_base(tmp_path / "base", width=64)))
    folders = [trial.folder for trial in Search(load_config(path)).trials()]
    first = _start(path)
    try:
        deadline = time.monotonic() + 180
        while not any((folder / ENDED).is_file() for folder in folders):
            assert first.poll() is None, path.with_suffix(".log").read_text()[-3000:]
            assert time.monotonic() < deadline
            time.sleep(0.1)
    finally:
        kill_tree(first)  # SIGKILL, to the driver and all that it started
    over = {folder: (folder / HISTORY).read_bytes() for folder in folders if (folder / ENDED).is_file()}
    assert 0 < len(over) < len(folders)

    second = _start(path)
    out, _ = second.communicate(timeout=200)
    assert second.returncode == 0, path.with_suffix(".log").read_text()[-3000:]
    result = json.loads(out)
    for folder, before in over.items():
        assert (folder / HISTORY).read_bytes() == before
    for folder in folders:
        steps = [row["step"] for row in read_history(folder / HISTORY)]
        assert steps == sorted(set(steps))
        assert json.loads((folder / ENDED).read_text())["state"] in ("finished", "stopped")
    best = load_config(Path(result["config"]))
    assert best.tune is None
    assert best.training == Search(load_config(path)).trial(result["best_trial"]).training
    write_atomic(tmp_path / "page.html", Path(result["page"]).read_text())
    assert "Validation by step" in (tmp_path / "page.html").read_text()
