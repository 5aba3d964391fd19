"""A verb as a Ray job on a cluster that someone else started, by Ray's own command."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.processes import free_port

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
BIN = Path(sys.executable).parent
ROOT = Path(__file__).resolve().parents[3]
SMALL = (
    "model.num_layers=2",
    "data.synthetic.rows_per_day=24",
    "training.max_steps=8",
    "training.checkpoint_steps=4",
    "training.log_steps=2",
    "training.global_batch_size=16",
    "training.micro_batch_size=4",
    "training.ledger=true",
)


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    port, dashboard = free_port(), free_port()
    command = [BIN / "ray", "start", "--head", "--block", f"--port={port}", f"--dashboard-port={dashboard}"]
    command += ["--num-cpus=2", "--object-store-memory=200000000", "--disable-usage-stats"]
    command += [f"--dashboard-agent-listen-port={free_port()}"]  # with its fixed one a second head takes no jobs
    environment = {**os.environ, "PATH": f"{BIN}:{os.environ['PATH']}", "RAY_AUTH_MODE": "token"}
    environment["RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S"] = "0"
    path = tmp_path_factory.mktemp("head") / "head.log"
    with path.open("w") as log:
        head = subprocess.Popen(command, env=environment, start_new_session=True, stdout=log, stderr=log)
    try:
        deadline = time.monotonic() + 400
        while True:
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", dashboard)) == 0:
                    break
            assert head.poll() is None and time.monotonic() < deadline, f"no dashboard: {path.read_text()[-3000:]}"
            time.sleep(0.5)
        yield f"http://127.0.0.1:{dashboard}"
    finally:
        os.killpg(head.pid, signal.SIGTERM)
        head.wait(timeout=60)


def _mtl_lora(*arguments: str, token: bool = True, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PATH": f"{BIN}:{os.environ['PATH']}", **variables}
    environment |= {"RAY_AUTH_MODE": "token"} if token else {"RAY_AUTH_MODE": "disabled"}
    command = [sys.executable, "-m", "jobs.cli", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=600, env=environment, cwd=ROOT)


def test_submitted_work_is_done_once_and_can_be_watched_and_stopped(address: str, tmp_path: Path) -> None:
    at = ["--address", address]
    verb = ["plan", "--no-calibrate", "--config", "demo", f"run_root={tmp_path}/runs", "name=sent", *SMALL]
    refused = _mtl_lora("submit", *at, *verb, token=False)
    assert refused.returncode == 2, refused.stderr[-2000:]
    assert "asks for its token" in refused.stderr

    first = _mtl_lora("submit", "--json", *at, *verb, MTL_LORA_LOG_FORMAT="json")
    assert first.returncode == 0, first.stdout[-2000:] + first.stderr[-2000:]
    found = json.loads(first.stdout)
    told = [json.loads(line) for line in first.stderr.splitlines()]
    assert {(each["run"], each["job"]) for each in told if "job" in each} == {("sent", found["job"])}, told
    assert found["attached"] is False
    assert found["result"]["steps"] == 8  # the verb's own result came back
    again = json.loads(_mtl_lora("submit", "--json", "--no-wait", *at, *verb).stdout)
    assert again == {"job": found["job"], "attached": True}
    attached = json.loads(_mtl_lora("submit", "--json", *at, *verb).stdout)
    assert attached["result"] == found["result"]  # in the messages of the job that another submit has begun
    state = json.loads(_mtl_lora("status", found["job"], "--json", *at).stdout)
    assert (state["state"], state["exit_code"]) == ("SUCCEEDED", 0)
    log = _mtl_lora("logs", found["job"], *at).stdout
    assert "test samples" in log
    assert "@mtl-lora" not in log  # messages are shown in words

    bad = _mtl_lora(
        "submit", *at, "plan", "--config", "demo", f"run_root={tmp_path}/runs", "training.global_batch_size=7"
    )
    assert bad.returncode == 2, bad.stdout[-2000:] + bad.stderr[-2000:]  # the job's own exit code
    lacking = _mtl_lora("submit", *at, "--secret", "NO_SUCH_SECRET", *verb)
    assert lacking.returncode == 2
    assert "NO_SUCH_SECRET" in lacking.stderr

    long = ["train", "--config", "demo", f"run_root={tmp_path}/runs", "name=long", *SMALL, "training.max_steps=5000"]
    job = json.loads(_mtl_lora("submit", "--json", "--no-wait", *at, *long).stdout)["job"]
    assert _mtl_lora("stop", job, *at).returncode == 0
    deadline = time.monotonic() + 400  # a job that has just begun trains one step and saves it first
    while json.loads(_mtl_lora("status", job, "--json", *at).stdout)["state"] not in ("STOPPED", "FAILED"):
        assert time.monotonic() < deadline
    jobs = {row["job"]: row["state"] for row in json.loads(_mtl_lora("list", "--json", *at).stdout)}
    assert jobs[found["job"]] == "SUCCEEDED"
    assert jobs[job] == "STOPPED"
    unknown = _mtl_lora("status", f"{job}x", *at)
    assert unknown.returncode == 2
    assert job in unknown.stderr  # a near name


AGAIN = """
import sys
from jobs.cluster.ray_jobs import Jobs
jobs = Jobs(sys.argv[1])
assert jobs.submit("true", {}, "weekly", is_done_once=False) == ("weekly", False)
assert jobs.follow("weekly", print) == 0
assert jobs.submit("true", {}, "weekly") == ("weekly", True)
assert jobs.submit("true", {}, "weekly", is_done_once=False) == ("weekly-try2", False)
"""


def test_work_of_every_week_is_done_again(address: str) -> None:
    environment = {**os.environ, "RAY_AUTH_MODE": "token"}  # of a process of its own: Ray reads it once
    command = [sys.executable, "-c", AGAIN, address]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, env=environment, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.nightly
def test_train_runs_on_a_cluster_that_someone_else_started(address: str, tmp_path: Path) -> None:
    environment = {**os.environ, "PATH": f"{BIN}:{os.environ['PATH']}", "RAY_AUTH_MODE": "token"}
    verb = [str(BIN / "mtl-lora"), "train", "--config", "demo", f"run_root={tmp_path}/runs", "name=foreign", *SMALL]
    command = [str(BIN / "ray"), "job", "submit", "--address", address, "--", *verb]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, env=environment)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert (tmp_path / "runs" / "foreign" / "adapter" / "adapter_model.safetensors").is_file()
