"""One run over two Ray nodes in network namespaces of their own, which share S3 alone: shards from there, the run's
folder there. S3 goes away in the middle, and then one node for good."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from pipeline.contracts import CheckpointManifest
from pipeline.ingestion import publish
from pipeline.mirror import Mirror
from tests.pipeline.s3_server import BUCKET, S3Server
from tests.pipeline.training.running_job import (
    RunningJob,
    history,
    ledger_is_the_global_order,
    prepare_ground,
    write_config,
)

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]

PREFIX, HOST, NODES = "mtlnode", "10.231.7.254", {"mtlnode1": "10.231.7.1", "mtlnode2": "10.231.7.2"}
PORT = 6399


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True, timeout=20)


@pytest.fixture
def network() -> Iterator[None]:
    """Two namespaces, each with its own address and loopback, joined by a bridge on which this machine has one too."""
    try:
        _ip("link", "add", PREFIX, "type", "bridge")
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"needs the right to make network namespaces: {error}")
    try:
        _ip("addr", "add", f"{HOST}/24", "dev", PREFIX)
        _ip("link", "set", PREFIX, "up")
        for name, address in NODES.items():
            _ip("netns", "add", name)
            _ip("link", "add", f"{name}v", "type", "veth", "peer", "name", "eth0", "netns", name)
            _ip("link", "set", f"{name}v", "master", PREFIX, "up")
            _ip("-n", name, "addr", "add", f"{address}/24", "dev", "eth0")
            _ip("-n", name, "link", "set", "eth0", "up")
            _ip("-n", name, "link", "set", "lo", "up")
        yield
    finally:
        for name in NODES:
            _kill_all(name)
            with contextlib.suppress(subprocess.CalledProcessError):
                _ip("netns", "del", name)
        _ip("link", "del", PREFIX)


def _kill_all(name: str) -> None:
    found = subprocess.run(["ip", "netns", "pids", name], capture_output=True, text=True, timeout=20)
    for pid in found.stdout.split():
        with contextlib.suppress(ProcessLookupError):
            os.kill(int(pid), signal.SIGKILL)


def _start_node(name: str, log: Path, *arguments: str) -> None:
    """Start a node that keeps its files in a folder of its own."""
    command = ["ip", "netns", "exec", name, str(Path(sys.executable).with_name("ray")), "start", "--num-cpus=1"]
    command += ["--object-store-memory=100000000", f"--node-ip-address={NODES[name]}", "--disable-usage-stats"]
    environment = os.environ | {"MTL_LORA_CACHE": str(log.parent / name)}
    with log.open("ab") as out:
        done = subprocess.run([*command, *arguments], stdout=out, stderr=out, timeout=90, env=environment)
    assert done.returncode == 0, log.read_text()[-3000:]


def _await(job: RunningJob, there: Callable[[], bool]) -> None:
    job.wait_for(lambda: int(there()), "it is not in the bucket", 400)


def test_run_goes_on_through_an_outage_of_s3_and_without_the_node_that_died(
    tmp_path: Path, network: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = S3Server(tmp_path / "s3", HOST)
    server.start()
    head, other = NODES
    variables = server.environment() | {
        "RAY_AUTH_MODE": "disabled",
        "GLOO_SOCKET_IFNAME": "eth0",
        "RAY_health_check_period_ms": "1000",
        "RAY_health_check_failure_threshold": "3",
        "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "30",  # Ray may ask for the dead node's worker once more
        "DS_ACCELERATOR": "cpu",
    }
    for key, value in variables.items():
        monkeypatch.setenv(key, value)
    prepare_ground(tmp_path)
    steps, seen = 20, Mirror(f"s3://{BUCKET}/runs/two_nodes", tmp_path / "seen")
    config = write_config(
        tmp_path,
        "two_nodes",
        manifest=publish(tmp_path / "shards", f"s3://{BUCKET}/two_nodes"),
        min_workers=1,
        max_steps=steps,
    )
    where = (f"run_root=s3://{BUCKET}/runs", f"tracking.uri=sqlite:///{tmp_path}/mlflow.db")
    try:
        _start_node(head, tmp_path / "nodes.log", "--head", f"--port={PORT}", "--include-dashboard=false")
        _start_node(other, tmp_path / "nodes.log", f"--address={NODES[head]}:{PORT}")
        prefix = ("ip", "netns", "exec", head)
        monkeypatch.setenv("MTL_LORA_CACHE", str(tmp_path / head))
        with RunningJob(config, *where, address=f"{NODES[head]}:{PORT}", prefix=prefix) as job:
            _await(job, lambda: seen.fetch("checkpoints/step-00000004/manifest.json"))
            server.kill()
            assert CheckpointManifest.read(seen.folder / "checkpoints/step-00000004/manifest.json").num_ranks == 2
            time.sleep(4)
            server.start()
            _await(job, lambda: seen.fetch("checkpoints/step-00000008/manifest.json"))
            _kill_all(other)
            _await(job, lambda: seen.fetch("checkpoints/step-00000012/manifest.json"))
            assert job.end() == 0, job.tail()
            assert "training goes on from step" in job.log.read_text()
        run = Mirror(seen.url, tmp_path / "found")
        run.pull()
        last = sorted(path.name for path in (run.folder / "checkpoints").glob("step-*"))
        assert last == ["step-00000016", "step-00000020"]
        assert CheckpointManifest.read(run.folder / "checkpoints" / last[-1] / "manifest.json").num_ranks == 1
        assert ledger_is_the_global_order(run.folder, steps)
        assert [row["step"] for row in history(run.folder)] == list(range(1, steps + 1))
        ranks = [row["rank"] for row in map(json.loads, (run.folder / "samples.jsonl").read_text().splitlines())]
        assert set(ranks[: 8 * 16]) == {0, 1}
        assert set(ranks[-16:]) == {0}
        assert list((tmp_path / other).glob("runs/*/ranks/*"))  # left by the dead node, whichever rank ran there
        assert not list((tmp_path / head).glob("runs/*/ranks/*"))
    finally:
        server.kill()
