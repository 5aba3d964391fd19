"""A tracking URI with a password stands in no file and in no variable of a job: it travels by the environment alone."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from jobs import SECRETS
from jobs.cluster.submission import _environment, _stage
from jobs.config import load_config

SECRET = "hunter2hunter2"


@pytest.mark.parametrize(
    "uri",
    [
        f"http://ads:{SECRET}@mlflow",
        f"https://{SECRET}@mlflow",
        f"postgresql://ads:a/{SECRET}@db/mlflow",
        f"postgresql://ads:a {SECRET}@db/mlflow",
        f"postgresql://db/mlflow?user=ads&password={SECRET}",
        f"https://mlflow/?token={SECRET}",
        f"mssql+pyodbc:///?odbc_connect=DRIVER%3Dx%3BPWD%3D{SECRET}",
    ],
)
@pytest.mark.parametrize("is_configured", [True, False])
def test_a_secret_reaches_no_file_and_no_job(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, uri: str, is_configured: bool
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://another" if is_configured else uri)
    path = tmp_path / "given.yaml"
    path.write_text("extends: demo\n" + (f"tracking: {{uri: '{uri}'}}\n" if is_configured else ""))
    config = load_config(path, [f"run_root={tmp_path / 'runs'}"])
    assert config.tracking.uri == uri
    config.write()
    (tmp_path / "staged").mkdir()
    _stage(config, tmp_path / "staged")
    path.unlink()
    files = [each for each in tmp_path.rglob("*") if each.is_file()]
    assert {"config.yaml"} <= {each.name for each in files}
    assert not [each for each in files if SECRET.encode() in each.read_bytes()]
    travels = _environment(config.tracking, ())
    assert SECRET not in str(travels) + str(config.shown())
    assert "MLFLOW_TRACKING_URI" in travels[SECRETS]
    assert os.environ["MLFLOW_TRACKING_URI"] == uri, "a cluster that is started here has it from here"
