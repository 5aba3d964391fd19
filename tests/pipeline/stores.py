"""Stores for tests, each a folder whose files are to be had under a URL: a web server, a hub, and the emulators of two
clouds where their programs are installed."""

from __future__ import annotations

import base64
import contextlib
import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipeline.storage import filesystem
from tests.pipeline.https_server import HttpsServer, certificate
from tests.pipeline.hub_server import COMMIT, REPO, HubServer

_STARTUP_S = 300
_KEY = base64.b64encode(b"tester-secret").decode()


class Store:
    """A folder and the URL under which its files are to be had; ``send`` brings the files of the folder there."""

    def __init__(self, folder: Path, url: str, server: object = None) -> None:
        self.folder, self.url, self.server = folder, url, server

    def send(self) -> None:
        if self.server is not None:
            return  # it serves the folder itself
        fs, root = filesystem(self.url)
        for path in sorted(self.folder.rglob("*")):
            if path.is_file():
                fs.put_file(str(path), f"{root}/{path.relative_to(self.folder)}")


@contextlib.contextmanager
def web(folder: Path, patch: pytest.MonkeyPatch) -> Iterator[Store]:
    """Serve a folder over TLS."""
    folder.mkdir()
    with HttpsServer(folder, certificate(folder.parent)) as server:
        yield Store(folder, server.url, server)


@contextlib.contextmanager
def hub(folder: Path, patch: pytest.MonkeyPatch) -> Iterator[Store]:
    """Serve a folder as a data set of a hub."""
    from huggingface_hub import constants

    folder.mkdir()
    with HubServer(folder) as server:
        patch.setenv("HF_ENDPOINT", server.url)
        patch.setattr(constants, "HF_HUB_OFFLINE", False)
        yield Store(folder, f"hf://datasets/{REPO}@{COMMIT}", server)


@contextlib.contextmanager
def google(folder: Path, patch: pytest.MonkeyPatch) -> Iterator[Store]:
    """Start fake-gcs-server."""
    folder.mkdir()
    port = _free_port()
    url = f"http://127.0.0.1:{port}"
    command = [_program("fake-gcs-server"), "-backend", "memory", "-scheme", "http", "-host", "127.0.0.1"]
    with _running([*command, "-port", str(port), "-public-host", f"127.0.0.1:{port}"], port, folder.parent):
        patch.setenv("STORAGE_EMULATOR_HOST", url)
        patch.setenv("GOOGLE_CLOUD_PROJECT", "test")
        filesystem("gs://shards")[0].mkdir("shards")
        yield Store(folder, "gs://shards/place")


@contextlib.contextmanager
def azure(folder: Path, patch: pytest.MonkeyPatch, scheme: str = "az") -> Iterator[Store]:
    """Start Azurite."""
    folder.mkdir()
    port = _free_port()
    command = [_program("azurite-blob"), "--inMemoryPersistence", "--skipApiVersionCheck", "--silent"]
    with _running([*command, "--blobPort", str(port)], port, folder.parent):
        account = f"AccountName=tester;AccountKey={_KEY};BlobEndpoint=http://127.0.0.1:{port}/tester;"
        patch.setenv("AZURE_STORAGE_CONNECTION_STRING", f"DefaultEndpointsProtocol=http;{account}")
        filesystem("az://shards")[0].mkdir("shards")
        yield Store(folder, f"{scheme}://shards/place")


def _program(name: str) -> str:
    found = shutil.which(name)
    if found is None:
        pytest.skip(f"needs the program {name} on PATH")
    return found


@contextlib.contextmanager
def _running(command: list[str], port: int, folder: Path) -> Iterator[None]:
    with (folder / "server.log").open("ab") as log:
        process = subprocess.Popen(
            command, stdout=log, stderr=log, cwd=folder, env={**os.environ, "AZURITE_ACCOUNTS": f"tester:{_KEY}"}
        )
    try:
        deadline = time.monotonic() + _STARTUP_S
        while True:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
                break
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"{command[0]} did not start: {(folder / 'server.log').read_text()[-2000:]}")
            time.sleep(0.1)
        yield
    finally:
        process.kill()
        process.wait()


def _free_port() -> int:
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        return int(held.getsockname()[1])


STORES = {"https": web, "hf": hub, "gs": google, "az": azure, "abfs": lambda *at: azure(*at, scheme="abfs")}
