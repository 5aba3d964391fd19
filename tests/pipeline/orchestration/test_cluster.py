"""A local run's own cluster: where it listens, whom it refuses, and what it tells."""

from __future__ import annotations

import ipaddress
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import psutil
import pytest

from tests.processes import kill_tree

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
TOKEN = "4f1c" * 16
PASSWORD = "hunter2hunter2"
OURS = """
import json, sys, ray
from pipeline.orchestration.cluster import cluster
from pipeline.orchestration.config import RayConfig
with cluster(RayConfig()) as dashboard:
    assert ray.get(ray.remote(lambda: 1).remote()) == 1
    print(json.dumps([dashboard, ray.get_runtime_context().gcs_address]), flush=True)
    sys.stdin.read()
"""
DRIVER = """
import sys, ray
ray.init(address=sys.argv[1])
print("let in with", ray.get(ray.remote(lambda: 1).remote()))
"""


@pytest.fixture(scope="module")
def started() -> Iterator[tuple[subprocess.Popen[str], str, str]]:
    environment = {**os.environ, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": TOKEN}
    command = [sys.executable, "-c", OURS, "--tracking-uri", f"http://ads:{PASSWORD}@mlflow"]
    process = subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        yield process, *json.loads(process.stdout.readline())
    finally:
        kill_tree(process)


def _is_loopback(address: str) -> bool:
    found = ipaddress.ip_address(address)
    return (getattr(found, "ipv4_mapped", None) or found).is_loopback


def test_nothing_of_a_local_cluster_listens_beyond_the_loopback(
    started: tuple[subprocess.Popen[str], str, str],
) -> None:
    root = psutil.Process(started[0].pid)
    family = [(one.name(), one.net_connections()) for one in (root, *root.children(recursive=True))]
    found = [(name, c.laddr) for name, connections in family for c in connections if c.status == psutil.CONN_LISTEN]
    assert len(found) > 10, found
    assert [(name, at) for name, at in found if not _is_loopback(at.ip)] == []


def test_a_password_of_the_command_line_is_in_no_other_one_and_not_told_to_who_sees_the_cluster(
    started: tuple[subprocess.Popen[str], str, str],
) -> None:
    process, dashboard, _ = started
    lines = [" ".join(one.cmdline()) for one in psutil.Process(process.pid).children(recursive=True)]
    with urlopen(Request(f"{dashboard}/api/jobs/", headers={"Authorization": f"Bearer {TOKEN}"})) as answer:
        told = answer.read().decode()
    assert "--tracking-uri" in told
    assert PASSWORD not in "".join(lines) + told


def _status(dashboard: str, token: str) -> int:
    headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {token}"} if token else {})
    try:
        with urlopen(Request(f"{dashboard}/api/jobs/", b'{"entrypoint": "true"}', headers), timeout=60) as answer:
            return int(answer.status)
    except HTTPError as error:
        return error.code


def test_a_cluster_with_a_token_refuses_drivers_and_jobs_without_it(
    started: tuple[subprocess.Popen[str], str, str],
) -> None:
    _, dashboard, address = started
    assert [_status(dashboard, token) for token in ("", TOKEN[::-1], TOKEN)] == [401, 403, 200]
    command = [sys.executable, "-c", DRIVER, address]
    right: dict[str, str] = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": TOKEN}
    for given in ({"RAY_AUTH_MODE": "disabled"}, {**right, "RAY_AUTH_TOKEN": TOKEN[::-1]}, right):
        environment = {key: value for key, value in os.environ.items() if key != "RAY_AUTH_TOKEN"} | given
        environment["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"  # an address on the loopback is taken as it stands
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200)
        assert ("let in" in done.stdout) is (given is right), done.stdout + done.stderr[-3000:]
        assert ("token is missing or incorrect" in done.stderr) is (given is not right), done.stderr[-3000:]
