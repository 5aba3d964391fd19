"""The short season: the loop as its users run it, week after week, beside a real MLflow server."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.processes import kill_tree

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]
ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.nightly
def test_short_season(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tests.season", "--short", "--folder", str(tmp_path / "season")]
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)
        try:
            code = process.wait(timeout=1100)
        finally:
            kill_tree(process)
    assert code == 0, (tmp_path / "log").read_text()[-4000:]
    season = json.loads((tmp_path / "season" / "season.json").read_text())
    assert [week["verdict"] for week in season["weeks"]] == ["PROMOTE", "PROMOTE", "PROMOTE", "NOTHING_NEW"]
    assert season["samples_trained_once"] > 0
    assert len(list((tmp_path / "season" / "daily").glob("*/_manifest.json"))) == 1
    assert "data:image" in (tmp_path / "season" / "season.html").read_text()
