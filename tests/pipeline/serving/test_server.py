"""The server as clients see it: real HTTP, a real registry, the champion followed under load."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow.parquet as pq
import pytest
import requests
from prometheus_client.parser import text_string_to_metric_families

from pipeline.errors import InputError
from pipeline.modeling.predictor import Predictor
from pipeline.promotion.registry import Registry
from pipeline.serving.served_model import resolve
from tests.benchmarks.serving_faults import nonsense
from tests.benchmarks.serving_load import replicas
from tests.pipeline.promotion.conftest import add_version, promote, store, write_moved_adapter  # noqa: F401 - a fixture
from tests.processes import free_port, kill_tree

pytestmark = [pytest.mark.slow, pytest.mark.timeout(280)]
TOKEN = {"Authorization": "Bearer a-token"}
ROWS = [
    {"task": "query_ad", "query": "red shoes", "ad": "buy red shoes"},
    {"task": "pick", "query": "two and two", "choices": ["three", "four", "five"]},
]


@pytest.fixture(scope="module")
def predictors(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two adapters that answer differently."""
    return [write_moved_adapter(tmp_path_factory.mktemp("predictor") / "adapter", seed) for seed in range(2)]


class Server:
    """The running command."""

    def __init__(self, registry: Registry, answers: dict[str, list[float]], log: Path) -> None:
        self.registry, self.answers, self.log = registry, answers, log
        self.live, self.url = log.with_name("live"), ""

    def ask(self, rows: Any = ROWS, **options: Any) -> requests.Response:
        return requests.post(
            f"{self.url}/v1/score", **{"json": {"rows": rows}, "headers": TOKEN, "timeout": 30, **options}
        )

    def is_right(self, answer: dict[str, Any]) -> bool:
        """Whether the answers are those of the version that is said to have given them."""
        wanted = self.answers[answer["model"]]
        return [row["score"] for row in answer["answers"]] == pytest.approx(wanted, abs=1e-5)


@pytest.fixture(scope="module")
def server(store: str, predictors: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:  # noqa: F811
    registry = Registry("served", store)
    registry._client.create_registered_model(registry.name)
    answers = {}
    for folder in predictors:
        number = add_version(registry, folder)
        answers[f"models:/served/{number}"] = (
            Predictor.load(folder, "cpu").predict(pd.DataFrame(ROWS))["score"].tolist()
        )
    promote(registry, 1)
    log = tmp_path_factory.mktemp("server") / "log"
    found, port = Server(registry, answers, log), free_port()
    command = [sys.executable, "-m", "jobs", "serve", "--model", "models:/served@champion", "--port", str(port)]
    command += ["--tracking-uri", store, "--poll-s", "0.5", "--max-rows", "8", "--max-waiting-rows", "16"]
    command += ["--shadow", "1", "--log", str(found.live)]
    environment = os.environ | {"MTL_LORA_SERVE_TOKEN": "a-token"}
    with log.open("w") as out:
        process = subprocess.Popen(command, stdout=out, stderr=out, env=environment)
    try:
        found.url, deadline = f"http://127.0.0.1:{port}", time.monotonic() + 400
        while not _is_ready(found.url):
            assert process.poll() is None and time.monotonic() < deadline, log.read_text()[-3000:]
            time.sleep(0.5)
        yield found
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) in (0, 128 + signal.SIGTERM)
    finally:
        kill_tree(process)


def _is_ready(url: str) -> bool:
    try:
        return requests.get(f"{url}/readyz", timeout=2).status_code == 200
    except requests.RequestException:
        return False


def test_mixed_tasks_are_answered_as_the_predictor_does(server: Server) -> None:
    answer = server.ask().json()
    assert answer["model"] == "models:/served/1" and server.is_right(answer)
    tasks = requests.get(f"{server.url}/v1/tasks", headers=TOKEN, timeout=10).json()
    assert tasks["tasks"]["pick"] == {"kind": "choice", "fields": ["query", "choices"], "label_words": []}
    assert requests.get(f"{server.url}/v1/score", timeout=10).status_code == 405
    assert requests.get(f"{server.url}/v2", timeout=10).json()["error"].startswith("GET /v2 is nothing")
    assert "/v1/score" in requests.get(f"{server.url}/openapi.json", timeout=10).json()["paths"]


@pytest.mark.parametrize(
    ("options", "status", "words"),
    [
        ({"headers": {}}, 401, "must bring the server's token"),
        ({"headers": {"Authorization": "Bearer other"}}, 401, "must bring the server's token"),
        ({"json": None, "data": b"\xff\xfe{"}, 422, "must be JSON of the form"),
        ({"json": None, "data": b"[" * 100_000}, 422, "must be JSON"),
        ({"json": {"rows": []}}, 422, "must be JSON of the form"),
        ({"json": {"rows": [{"task": "query_ad"}] * 9}}, 413, "may have 8 rows, got 9"),
        ({"json": {"rows": [{"task": "x" * (1 << 20)}]}}, 413, "may have 1048576 bytes"),
        ({"json": {"rows": [{"query": "a"}]}}, 422, "must name its task"),
        ({"json": {"rows": [{"task": "query_at"}]}}, 422, "did you mean 'query_ad'"),
        ({"json": {"rows": [{"task": "pick", "query": "a", "choices": ["b"]}]}}, 422, "list of at least 2 choices"),
    ],
)
def test_a_bad_request_is_told_the_rule_and_nothing_of_the_server(
    server: Server, options: dict[str, Any], status: int, words: str
) -> None:
    found = server.ask(**options)
    assert found.status_code == status and words in found.json()["error"]
    assert "Traceback" not in found.text and "/site-packages/" not in found.text


def test_nonsense_is_refused_and_nothing_else(server: Server) -> None:
    some = islice(nonsense(0, ["query_ad", "pick"]), 2000)
    with requests.Session() as session:
        for method, path, body, headers in some:
            found = session.request(method, server.url + path, data=body, headers=headers, timeout=10)
            assert 400 <= found.status_code < 500 and "Traceback" not in found.text, (method, path, body, found.text)


def test_a_challenger_scores_in_the_shadow_and_the_scores_of_both_are_kept(server: Server) -> None:
    deadline = time.monotonic() + 400
    while requests.get(f"{server.url}/readyz", timeout=10).json()["challenger"] != "models:/served/2":
        server.ask()  # requests are what a challenger is looked for at
        assert time.monotonic() < deadline, server.log.read_text()[-3000:]
        time.sleep(0.3)
    for number in range(3):
        answer = server.ask(headers={**TOKEN, "X-Request-Id": f"mine-{number}"})
        assert answer.headers["X-Request-Id"] == answer.json()["request"] == f"mine-{number}"
        assert answer.json()["model"] == "models:/served/1"
    while len(rows := _logged(server.live, "mine-")) < 3 * 2 * 2:  # a file may be written between two requests
        assert time.monotonic() < deadline
        time.sleep(0.5)
    assert len(rows) == 3 * 2 * 2
    for row in rows:
        assert row["role"] == {"models:/served/1": "live", "models:/served/2": "shadow"}[row["model"]]
        assert row["score"] == pytest.approx(server.answers[row["model"]][row["row"]], abs=1e-5)


def _logged(folder: Path, request: str) -> list[dict[str, Any]]:
    tables = [pq.read_table(path) for path in folder.glob("scores/*/*.parquet")]
    return [row for table in tables for row in table.to_pylist() if row["request"].startswith(request)]


def test_the_champion_is_followed_under_load_forwards_and_back_and_no_request_is_lost(server: Server) -> None:
    found: list[dict[str, Any]] = []
    stop = threading.Event()

    def client() -> None:
        while not stop.is_set():
            answer = server.ask()
            found.append(answer.json() if answer.status_code == 200 else {"status": answer.status_code})

    clients = [threading.Thread(target=client) for _ in range(3)]
    for one in clients:
        one.start()
    try:
        for change, wanted in ((lambda: promote(server.registry, 2), 2), (server.registry.rollback, 1)):
            change()
            deadline = time.monotonic() + 400
            while not found or found[-1].get("model") != f"models:/served/{wanted}":
                assert time.monotonic() < deadline, f"{found[-1:]}, {server.log.read_text()[-3000:]}"
                time.sleep(0.2)
    finally:
        stop.set()
        for one in clients:
            one.join(30)
    assert [answer for answer in found if "status" in answer] == []
    assert all(map(server.is_right, found))
    assert {answer["model"] for answer in found} == {"models:/served/1", "models:/served/2"}


def test_overload_is_told_and_passes(server: Server) -> None:
    statuses: list[tuple[int, str | None]] = []

    def client() -> None:
        answer = server.ask(ROWS * 4)
        statuses.append((answer.status_code, answer.headers.get("Retry-After")))

    clients = [threading.Thread(target=client) for _ in range(40)]
    for one in clients:
        one.start()
    for one in clients:
        one.join(60)
    assert len(statuses) == 40 and {status for status, _ in statuses} == {200, 429}
    assert all(retry == "1" for status, retry in statuses if status == 429)
    assert server.is_right(server.ask().json())


def test_what_was_done_is_counted(server: Server) -> None:
    assert requests.get(f"{server.url}/metrics", timeout=10).status_code == 401
    text = requests.get(f"{server.url}/metrics", headers=TOKEN, timeout=10).text
    found = {sample.name: sample for family in text_string_to_metric_families(text) for sample in family.samples}
    assert {"mtl_lora_requests_total", "mtl_lora_rows_total", "mtl_lora_request_seconds_sum"} <= found.keys()


def test_a_lost_model_is_told_as_unavailable_at_worst_and_comes_back(server: Server) -> None:
    (model,) = replicas()
    assert model.nice() == os.nice(0)  # and was not set back behind others before
    model.kill()
    deadline = time.monotonic() + 400
    found: list[int] = []
    while not found or found[-1] != 200:
        assert time.monotonic() < deadline, found
        answer = server.ask()
        found.append(answer.status_code)
        assert answer.status_code in (200, 503) and (answer.status_code == 200 or answer.headers["Retry-After"] == "1")
    assert server.is_right(server.ask().json())


def test_what_cannot_be_served_is_refused_before_anything_starts(store: str, tmp_path: Path) -> None:  # noqa: F811
    for reference, words in (("models:/nothing@champion", "nothing"), (str(tmp_path), "which is none of them")):
        with pytest.raises(InputError, match=words):
            resolve(reference, store)
    command = [sys.executable, "-m", "jobs", "serve", "--model", "models:/served/1", "--host", "0.0.0.0"]
    environment = {k: v for k, v in os.environ.items() if k != "MTL_LORA_SERVE_TOKEN"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 2 and "must ask for a token" in done.stderr, done.stderr[-2000:]
