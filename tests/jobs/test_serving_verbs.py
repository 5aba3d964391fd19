"""What ``score`` takes: the model knows how its records are written, and a word on the command line goes over that. And
people are told what the server writes down.
"""

from __future__ import annotations

import contextlib
import json
import threading
import time
from pathlib import Path

import pytest

from jobs.config import RunConfig
from jobs.run import Run
from jobs.serving_verbs import _reading, serve, watch
from jobs.stages.train import _keep_adapter
from mtl_lora.files import WEIGHTS_FILE
from pipeline.errors import InputError
from pipeline.ingestion import DataConfig
from pipeline.modeling.predictor import PREDICTOR_FILE, PredictorSpec
from pipeline.serving.live_log import note_drift, take_back
from pipeline.serving.server_config import ServerConfig

KNOWN = DataConfig.model_validate(
    {
        "source": "records",
        "root": "data",
        "max_rejected": 3,
        "csv": {"delimiter": ";", "encoding": "cp1252"},
        "columns": {"id": "Row Id"},
    }
).reading()


def test_a_model_keeps_how_records_are_found_and_nothing_else_of_its_data() -> None:
    assert KNOWN == {"csv": {"delimiter": ";", "encoding": "cp1252"}, "columns": {"id": "Row Id"}}
    assert DataConfig(source="records", root="data").reading() == {}


def test_the_command_goes_over_what_the_model_knows() -> None:
    found = _reading(KNOWN, ['data.csv.delimiter="\\t"', "data.columns.task=Kind", "data.json_encoding=latin-1"])
    assert (found.csv.delimiter, found.csv.encoding, found.json_encoding) == ("\t", "cp1252", "latin-1")
    assert found.columns == {"id": "Row Id", "task": "Kind"}
    assert _reading(KNOWN, []).reading() == KNOWN


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("data.windows.train=[1,2]", r"score takes keys of data .*csv.*, got \['windows'\]"),
        ("training.max_steps=3", r"got \['training'\]"),
        ("data.csv.encoding=utf-99", "must be one that Python knows"),
        ("delimiter", "must read key.sub=value"),
    ],
)
def test_what_is_no_reading_is_refused(override: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        _reading({}, [override])


def test_a_trained_adapter_says_how_its_records_were_read(tmp_path: Path) -> None:
    settings = {
        "name": "run",
        "run_root": tmp_path,
        "tasks": {"t": {"template": "{text}:", "label_words": [" no", " yes"]}},
    }
    for name, data in (("told", {"csv": {"delimiter": ";"}}), ("plain", {})):
        config = RunConfig.model_validate(
            {**settings, "name": name, "data": {"source": "records", "root": "data", **data}}
        )
        (tmp_path / "checkpoint" / "adapter").mkdir(parents=True, exist_ok=True)
        (tmp_path / "checkpoint" / "adapter" / WEIGHTS_FILE).write_bytes(b"")
        config.folder.mkdir()
        _keep_adapter(Run(config), tmp_path / "checkpoint")
        written = PredictorSpec.read(config.folder / "adapter" / PREDICTOR_FILE)
        assert written.reading == data
        assert ("reading" in json.loads((config.folder / "adapter" / PREDICTOR_FILE).read_text())) == bool(data)


def test_a_challenger_that_is_taken_back_and_drift_are_told_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    url, stop = str(tmp_path / "log"), threading.Event()
    take_back(url, "models:/ads/3", "an earlier one")
    known = {"model": "models:/ads@champion", "poll_s": 0.01, "log": {"url": url}}
    watching = threading.Thread(target=watch, args=(ServerConfig.model_validate(known), stop))
    watching.start()
    try:
        time.sleep(0.1)
        take_back(url, "models:/ads/4", "it fails")
        note_drift(url, ["task 'clicks': length_psi must be < 0.1, got 0.4"])
        notices, deadline = tmp_path / "runs/notices.jsonl", time.monotonic() + 10
        while not notices.exists() or len(notices.read_text().splitlines()) < 2:
            assert time.monotonic() < deadline
            time.sleep(0.02)
        time.sleep(0.1)
    finally:
        stop.set()
        watching.join()
    found = [json.loads(line) for line in notices.read_text().splitlines()]
    assert sorted(notice["event"] for notice in found) == ["DRIFT", "TAKEN_BACK"]
    assert [notice["version"] for notice in found if notice["event"] == "TAKEN_BACK"] == ["models:/ads/4"]


def test_a_registry_s_password_is_in_no_configuration_of_a_server(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://another")
    given: list[ServerConfig] = []
    monkeypatch.setattr("pipeline.orchestration.cluster.cluster", lambda config: contextlib.nullcontext())
    monkeypatch.setattr("pipeline.serving.server.run_server", lambda config, *_: given.append(config))
    monkeypatch.setattr("jobs.serving_verbs.watch", lambda *_: None)
    for uri in ("http://ads:hunter2@mlflow", "http://mlflow"):
        serve("models:/ads@champion", tracking_uri=uri)
    assert [config.tracking_uri for config in given] == ["", "http://mlflow"]
    assert "hunter2" not in str(given)
    assert given[0].registry == "http://ads:hunter2@mlflow", "of the environment, which a local cluster has from here"
