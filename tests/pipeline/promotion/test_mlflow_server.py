"""The registered model where MLflow's own server runs it, as KServe does: mixed tasks, and what it refuses."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import requests

from pipeline.modeling.predictor import Predictor
from pipeline.promotion.registry import Registry
from tests.pipeline.promotion.conftest import add_version, write_moved_adapter
from tests.processes import free_port, kill_tree

ROWS: list[dict[str, Any]] = [
    {"task": "query_ad", "query": "red shoes", "ad": "buy red shoes"},
    {"task": "pick", "query": "two and two", "choices": ["three", "four", "five"]},
]


@pytest.mark.slow
@pytest.mark.timeout(180)
def test_mlflows_server_answers_mixed_tasks_and_refuses_what_is_none(store: str, tmp_path: Path) -> None:
    folder = write_moved_adapter(tmp_path / "adapter")
    registry = Registry("mlflow-server", store)
    registry._client.create_registered_model(registry.name)
    number, port = add_version(registry, folder), free_port()
    command = [sys.executable, "-m", "mlflow", "models", "serve", "-m", f"models:/{registry.name}/{number}"]
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"  # it starts uvicorn by its name
    with (tmp_path / "log").open("w") as log:
        server = subprocess.Popen(
            [*command, "--env-manager", "local", "-p", str(port)],
            env=os.environ | {"MLFLOW_TRACKING_URI": store, "PATH": path},
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    try:
        _wait(server, f"http://127.0.0.1:{port}/ping", tmp_path / "log")

        def ask(rows: list[dict[str, Any]]) -> requests.Response:
            return requests.post(f"http://127.0.0.1:{port}/invocations", json={"dataframe_records": rows}, timeout=60)

        answers = ask(ROWS).json()["predictions"]
        wanted = Predictor.load(folder, "cpu").predict(pd.DataFrame(ROWS)).to_dict("records")
        for answer, known in zip(answers, wanted, strict=True):
            assert answer["score"] == pytest.approx(known["score"], abs=1e-5)
            assert (answer["task"], answer["label_word"]) == (known["task"], known["label_word"])
        for wrong, words in (
            ([{"task": "query_at"}], "did you mean 'query_ad'"),
            ([{"query": "a", "ad": "b"}], "task"),
            ([{"task": "query_ad", "query": "a"}], "field 'ad' is missing"),
        ):
            refused = ask(wrong)
            assert refused.status_code == 400 and words in refused.text
        assert ask(ROWS[:1]).status_code == 200
        several = [ROWS, ROWS[:1], ROWS[1:], ROWS[::-1]] * 8
        with ThreadPoolExecutor(8) as clients:  # its threads call one model at the same time
            for rows, answer in zip(several, clients.map(ask, several), strict=True):
                assert answer.status_code == 200, answer.text
                for row, found in zip(rows, answer.json()["predictions"], strict=True):
                    assert found["score"] == pytest.approx(wanted[ROWS.index(row)]["score"], abs=1e-5)
    finally:
        kill_tree(server)


def _wait(server: subprocess.Popen[Any], url: str, log: Path) -> None:
    deadline = time.monotonic() + 400
    while True:
        try:
            if requests.get(url, timeout=2).status_code == 200:
                return
        except requests.RequestException:
            pass
        assert server.poll() is None and time.monotonic() < deadline, log.read_text()[-3000:]
        time.sleep(0.3)
