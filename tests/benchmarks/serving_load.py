"""What the serving benchmark stands on: a model of real size, its registry, servers as processes, clients with load."""

import contextlib
import datetime as dt
import gzip
import itertools
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from http.client import HTTPConnection, HTTPException, HTTPResponse
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import psutil
import requests
import torch

from pipeline.modeling.adapter import AdapterConfig, build_adapter
from pipeline.modeling.base_model import BaseModelConfig, load_base
from pipeline.modeling.predictor import PredictorSpec
from pipeline.promotion.registry import Registry
from pipeline.synthetic import SyntheticAdsConfig, synthetic_ads_tasks, write_partition
from tests.pipeline.promotion.conftest import add_version, promote
from tests.processes import free_port, kill_tree

NAME = "bench"


def write_model(folder: Path, layers: int, seed: int = 0) -> Path:
    """Write an adapter of the synthetic Ads tasks on the embedded base's first layers, its weights moved."""
    base, tasks = BaseModelConfig(num_layers=layers), synthetic_ads_tasks()
    torch.manual_seed(seed)
    adapted: Any = build_adapter(AdapterConfig(), load_base(base), [task.name for task in tasks])
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter += 0.05 * torch.randn_like(parameter)
    adapted.save_pretrained(folder)
    PredictorSpec(tasks=tasks, base=base).write(folder / "predictor.json")
    return folder


def ads_rows(count: int) -> list[dict[str, Any]]:
    """Return rows of the synthetic Ads tasks, mixed as traffic is, each with its task."""
    by_task = []
    with tempfile.TemporaryDirectory() as folder:
        config = SyntheticAdsConfig(rows_per_day=-(-count // len(synthetic_ads_tasks())))
        for path in write_partition(config, dt.date(2026, 1, 5), Path(folder)):
            task = {"task": path.name.split(".")[0]}
            by_task.append([task | json.loads(line) for line in gzip.decompress(path.read_bytes()).splitlines()])
    answers = ("date", "label", "label_probabilities")
    mixed = [{k: v for k, v in row.items() if k not in answers} for rows in zip(*by_task, strict=True) for row in rows]
    return mixed[:count]


@contextlib.contextmanager
def registered(layers: int, versions: int = 1) -> Iterator[Registry]:
    """Yield a registry with so many versions of a model, the first of them champion."""
    from mlflow import MlflowClient

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        uri = f"sqlite:///{folder}/mlflow.db"
        client = MlflowClient(uri, uri)
        client.create_experiment("test", artifact_location=(folder / "artifacts").as_uri())
        client.create_registered_model(NAME)
        registry = Registry(NAME, uri)
        for seed in range(versions):
            add_version(registry, write_model(folder / f"adapter-{seed}", layers, seed))
        promote(registry, 1)
        yield registry


@contextlib.contextmanager
def process(arguments: Sequence[str], ready: str, **variables: str) -> Iterator[subprocess.Popen[bytes]]:
    """Run a Python module until the block ends; it begins when an address of it answers with 200."""
    with tempfile.TemporaryFile() as log:
        here = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"} | variables
        command = [sys.executable, "-m", *arguments]
        running = subprocess.Popen(command, stdout=log, stderr=log, env=here, start_new_session=True)
        try:
            deadline = time.monotonic() + 180
            while not _answers(ready):
                if running.poll() is not None or time.monotonic() > deadline:
                    log.seek(0)
                    raise RuntimeError(f"{arguments} must serve {ready}, it does not:\n{log.read()[-3000:].decode()}")
                time.sleep(0.2)
            yield running
        finally:
            kill_tree(running)


def _answers(url: str) -> bool:
    try:
        return requests.get(url, timeout=2).status_code == 200
    except requests.RequestException:
        return False


@contextlib.contextmanager
def served(registry: Registry, *options: str, token: str = "") -> Iterator[str]:
    """Yield the address of ``mtl-lora serve``, which follows the champion."""
    port = free_port()
    arguments = ["jobs", "serve", "--model", f"models:/{NAME}@champion", "--port", str(port)]
    arguments += ["--tracking-uri", registry.uri, *options]
    url = f"http://127.0.0.1:{port}"
    with process(arguments, f"{url}/readyz", MTL_LORA_SERVE_TOKEN=token):
        yield url


@dataclass
class Answers:
    """What clients got."""

    seconds: list[float] = field(default_factory=list)
    """Of each answer with status 200."""
    statuses: Counter[str] = field(default_factory=Counter)
    """Status → requests; a request that got none counts under its error's name."""
    wrong: int = 0
    """Answers that were not what the version that is named in them says, and refusals without what they must bring."""
    elapsed_s: float = 0.0

    @property
    def per_second(self) -> float:
        """Requests answered a second."""
        return len(self.seconds) / self.elapsed_s

    def milliseconds(self, share: float) -> float:
        """Return a quantile of the answers' times."""
        return 1000 * float(np.quantile(self.seconds, share))


Judge = Callable[[int, Any, Any], bool]
"""Status, headers and decoded body of an answer → whether it is right."""


def load(
    url: str,
    bodies: Sequence[Any],
    *,
    clients: int,
    seconds: float,
    judge: Judge | None = None,
    pause_s: float = 0.0,
    stop: threading.Event | None = None,
) -> Answers:
    """Ask from so many clients at once, each its next request when the one before is answered.

    Args:
        url: of the requests.
        bodies: asked in turn.
        clients: how many, a connection each.
        seconds: how long.
        judge: looks at each answer.
        pause_s: of a client between two requests.
        stop: ends it earlier.
    """
    found, where = Answers(), urlsplit(url)
    end = time.perf_counter() + seconds
    encoded = [json.dumps(body).encode() for body in bodies]

    def client(number: int) -> None:
        connection = Connection(where.netloc)
        for turn in itertools.count(number, clients):
            begun = time.perf_counter()
            if begun > end or (stop and stop.is_set()):
                return
            try:
                answer, body = connection.ask("POST", where.path, encoded[turn % len(encoded)], {})
            except (OSError, HTTPException) as error:
                found.statuses[type(error).__name__] += 1
                continue
            found.statuses[str(answer.status)] += 1
            if answer.status == 200:
                found.seconds.append(time.perf_counter() - begun)
            if judge is not None:
                found.wrong += not judge(answer.status, answer.headers, json.loads(body))
            time.sleep(pause_s)

    begun = time.perf_counter()
    with ThreadPoolExecutor(clients) as pool:
        list(pool.map(client, range(clients)))
    found.elapsed_s = time.perf_counter() - begun
    return found


class Connection:
    """One client's connection, which stands between requests and is made anew where it was lost."""

    def __init__(self, netloc: str) -> None:
        self._connection = HTTPConnection(netloc, timeout=60)

    def ask(self, method: str, path: str, body: bytes, headers: dict[str, str]) -> tuple[HTTPResponse, bytes]:
        """Return the answer to a request and its body."""
        try:
            self._connection.request(method, path, body, {"Content-Type": "application/json", **headers})
            answer = self._connection.getresponse()
            return answer, answer.read()
        except (OSError, HTTPException):
            self._connection.close()
            raise


def replicas() -> list[psutil.Process]:
    """Return the processes under this one that hold a served model."""
    return [p for p in psutil.Process().children(recursive=True) if "ServeReplica:mtl-lora:scores" in _title(p)]


def fronts() -> list[psutil.Process]:
    """Return the processes under this one that read requests."""
    return [p for p in psutil.Process().children(recursive=True) if "ServeReplica:mtl-lora:server" in _title(p)]


def _title(one: psutil.Process) -> str:
    with contextlib.suppress(psutil.Error):
        return " ".join(one.cmdline())
    return ""


def private_mib(one: psutil.Process) -> float:
    """Return a process's own memory in MiB, without what it shares: Ray's store is shared memory, and files are."""
    with contextlib.suppress(OSError):
        lines = Path(f"/proc/{one.pid}/status").read_text().splitlines()
        return sum(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) / 1024
    return 0.0
