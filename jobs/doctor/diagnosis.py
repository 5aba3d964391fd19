"""All checks at once, each group in a process of its own, which is ended where it hangs."""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

from jobs.config import RunConfig
from jobs.doctor.finding import Finding, first_line
from jobs.doctor.machine import machine
from jobs.doctor.places import clock, storage
from jobs.doctor.services import ray_cluster, registry
from pipeline.errors import did_you_mean
from pipeline.json_text import parse_json


@dataclass(frozen=True)
class Group:
    """Checks that share a process.

    Args:
        run: yields what they find, one by one.
        timeout_s: they may take together.
        remedy: where they do not come to an end.
    """

    run: Callable[[RunConfig], Iterator[Finding]]
    timeout_s: float
    remedy: str


GROUPS: Mapping[str, Group] = {
    "machine": Group(machine, 90, "see what the machine is busy with"),
    "storage": Group(storage, 45, "check the mounts of run_root and data.root, the endpoint and the network"),
    "clock": Group(clock, 45, "check the network and the proxies"),
    "registry": Group(registry, 60, "check the server of tracking.uri and the network to it"),
    "cluster": Group(ray_cluster, 90, "check ray.address, the cluster's head and the network to it"),
}


def diagnose(config: RunConfig, groups: Mapping[str, Group] = GROUPS) -> list[Finding]:
    """Run all checks and return what they find, in the order of the groups and without secrets."""
    with ThreadPoolExecutor(len(groups)) as threads:
        parts = threads.map(lambda name: _in_process(config, name, groups[name]), groups)
        return [finding.without_secrets() for part in parts for finding in part]


def _in_process(config: RunConfig, name: str, group: Group) -> list[Finding]:
    with tempfile.TemporaryDirectory() as folder:
        told, errors = Path(folder) / "findings", Path(folder) / "errors"
        # A session of its own: what a hanging check has started ends with it.
        with errors.open("wb") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", "jobs.doctor", name, str(told)],
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                stderr=log,
                env={**os.environ, "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1", "MLFLOW_HTTP_REQUEST_TIMEOUT": "10"},
                start_new_session=True,
            )
            try:
                process.communicate(pickle.dumps(config), timeout=group.timeout_s)
            except subprocess.TimeoutExpired:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
                ended = Finding(name, f"no answer within {group.timeout_s:g} s", "fail", group.remedy)
            else:
                words = errors.read_text(errors="replace").strip().rpartition("\n")[2]
                ended = Finding(name, f"the check itself failed: {words[:300]}", "fail", group.remedy)
        lines = told.read_text().splitlines() if told.is_file() else []
    found = [Finding(**parse_json(line)) for line in lines]
    return found if process.returncode == 0 else [*found, ended]


def main() -> None:
    """Run one group, whose name and file for findings stand in the arguments, on the configuration from the input."""
    name, told = sys.argv[1:]
    if name not in GROUPS:
        raise SystemExit(f"a group of checks must be known, got {name!r}{did_you_mean(name, GROUPS)}")
    config: RunConfig = pickle.load(sys.stdin.buffer)
    with Path(told).open("w") as file:
        try:
            for finding in GROUPS[name].run(config):
                print(json.dumps(asdict(finding)), file=file, flush=True)
        except Exception as error:  # noqa: BLE001 - a check that fails in a way of its own is a finding
            words = f"{type(error).__name__}: {first_line(error)}"
            failed = Finding(name, words, "fail", GROUPS[name].remedy)
            print(json.dumps(asdict(failed)), file=file, flush=True)
