"""A history reaches MLflow whole and in order, whenever its server is there."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from pathlib import Path

import pytest

from pipeline.errors import masked
from pipeline.tracking import DataSet, History, Tracker, TrackingConfig, read_history, send_history
from tests.pipeline.promotion.test_registry_live import server


def _row(step: int) -> dict:
    return {"step": step, "num_steps": 90, "samples": 16 * step, "loss": 1 / step, "task_loss": {"a": 2 / step}}


def _tracker(uri: str, folder: Path) -> Tracker:
    return Tracker.start(
        TrackingConfig(uri=uri), "run", {"training": {"zero_stage": 2}}, {}, (folder / "artifacts").as_uri()
    )


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A fresh sqlite store, made once."""
    return f"sqlite:///{tmp_path_factory.mktemp('tracking')}/mlflow.db"


def _steps(tracker: Tracker, key: str) -> list[tuple[int, float]]:
    found = tracker._client.get_metric_history(tracker.run_id, key)
    return [(metric.step, metric.value) for metric in sorted(found, key=lambda metric: metric.timestamp)]


def test_rows_after_the_step_are_dropped_and_a_torn_line_too(tmp_path: Path) -> None:
    path = tmp_path / "history.jsonl"
    with History(path, None, 0) as history:
        for step in (10, 20, 30):
            history.append(_row(step))
    with path.open("a") as file:
        file.write('{"step": 40, "task_loss": {"a": 1}')
    with History(path, None, 20) as history:
        assert [row["step"] for row in read_history(path)] == [10, 20]
        history.append(_row(30))
    assert [row["step"] for row in read_history(path)] == [10, 20, 30]


def test_resumed_history_is_sent_once(store: str, tmp_path: Path) -> None:
    path, tracker = tmp_path / "history.jsonl", _tracker(store, tmp_path)
    for start in (0, 2, 2):  # killed twice after step 4, each time with a checkpoint at step 2
        with History(path, tracker, start) as history:
            for step in range(start + 1, 5):
                history.append(_row(step))
    send_history(tracker, path)
    assert _steps(tracker, "loss") == [(step, 1 / step) for step in range(1, 5)]
    assert _steps(tracker, "loss/a") == [(step, 2 / step) for step in range(1, 5)]
    assert _steps(tracker, "samples") == [(step, 16.0 * step) for step in range(1, 5)]


def test_data_sets_of_a_run_say_what_for_where_from_and_which(store: str, tmp_path: Path) -> None:
    import mlflow

    tracker = _tracker(store, tmp_path)
    manifest = tmp_path / "manifest.json"
    manifest.write_text("{}")
    train = DataSet("training", "train", str(manifest), "a" * 64, {"a": 3, "b": 4})
    test = DataSet("evaluation", "test", "s3://bucket/manifest.json", "a" * 64, {"a": 1, "b": 1})
    for _ in range(2):
        tracker.log_data(train, test)
    tracker.log_data(replace(test, manifest_sha256="b" * 64))
    inputs = tracker._client.get_run(tracker.run_id).inputs.dataset_inputs
    found = {(i.dataset.name, i.dataset.digest, *(tag.value for tag in i.tags)) for i in inputs}
    assert found == {
        ("train", "a" * 36, "training"),
        ("test", "a" * 36, "evaluation"),
        ("test", "b" * 36, "evaluation"),
    }
    assert len(inputs) == 3
    sources = {i.dataset.name: mlflow.data.get_source(i.dataset) for i in inputs}
    assert sources["test"].uri == "s3://bucket/manifest.json"
    assert Path(sources["train"].load(tmp_path / "loaded")).read_text() == "{}"
    profile = next(json.loads(i.dataset.profile) for i in inputs if i.dataset.name == "train")
    assert profile == {"samples": 7, "tasks": {"a": 3, "b": 4}, "manifest_sha256": "a" * 64}


def test_passwords_in_addresses_are_not_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    path = tmp_path / "history.jsonl"
    path.write_text(json.dumps(_row(1)) + "\n")
    send_history(Tracker("http://ads:hunter2@127.0.0.1:9", "run"), path)
    said = capsys.readouterr().err.replace("\n", " ")
    assert "http://ads:***@127.0.0.1:9 is away" in said
    assert "hunter2" not in said
    assert masked("of 'postgresql://a:p@ss@db/x' and https://:t@h, not http://h:1/a@b or a:b@c") == (
        "of 'postgresql://a:***@db/x' and https://:***@h, not http://h:1/a@b or a:b@c"
    )


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_killed_server_stalls_nothing_and_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.setattr("pipeline.tracking._RETRY_S", 0.5)
    monkeypatch.setattr("pipeline.tracking._CLOSE_S", 3.0)
    path = tmp_path / "history.jsonl"
    store, artifacts = f"sqlite:///{tmp_path}/mlflow.db", tmp_path / "artifacts"
    slowest = 0.0

    def train(history: History, steps: range) -> None:
        nonlocal slowest
        for step in steps:
            begin = time.monotonic()
            history.append(_row(step))
            slowest = max(slowest, time.monotonic() - begin)
            time.sleep(0.1)

    with server(store, artifacts, tmp_path / "first.log") as url:
        tracker = _tracker(url, tmp_path)
        history = History(path, tracker, 0).__enter__()
        train(history, range(1, 30))
    train(history, range(30, 50))  # the server is killed
    history.__exit__(None, None, None)
    send_history(tracker, path)
    assert f"MLflow at {url} is away" in capsys.readouterr().err
    history = History(path, tracker, 49).__enter__()
    train(history, range(50, 70))
    with server(store, artifacts, tmp_path / "second.log", port=int(url.rpartition(":")[2])):
        train(history, range(70, 90))
        history.__exit__(None, None, None)
        send_history(tracker, path)
        assert _steps(tracker, "loss") == [(step, 1 / step) for step in range(1, 90)]
        assert len(_steps(tracker, "system/cpu_utilization_percentage")) > 40
    assert slowest < 0.5
    assert json.loads((tmp_path / "history.jsonl.sent").read_text()) == 89
