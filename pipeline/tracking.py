"""The one door to MLflow tracking: one run a job, written by the driver and by rank 0.

Rank 0 writes into a file and goes on; a thread carries the rows to MLflow, now or when the server is back.

The embedded default is sqlite beside the runs; a server is named by ``tracking.uri`` or ``MLFLOW_TRACKING_URI``.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import subprocess
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Any, Self
from urllib.parse import urlparse

from pipeline.contracts import write_atomic
from pipeline.errors import InputError, masked
from pipeline.json_text import parse_json
from pipeline.progress import say
from pipeline.settings import Settings

os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "WARNING")


class TrackingConfig(Settings):
    """Where runs and models are recorded."""

    uri: str = ""
    """MLflow tracking URI; empty: ``MLFLOW_TRACKING_URI``, else sqlite in the run root."""
    experiment: str = "mtl-lora"
    """MLflow experiment that holds the runs; made where it is missing."""

    def resolved(self, run_root: Path) -> TrackingConfig:
        """Return the configuration with its URI filled in."""
        uri = self.uri or os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{run_root.resolve()}/mlflow.db"
        return self.model_copy(update={"uri": uri})

    @property
    def shown(self) -> str:
        """The URI without a password, for eyes and files."""
        return masked(self.uri)

    @property
    def is_secret(self) -> bool:
        """Whether the URI holds a password: it then travels by the environment alone."""
        return self.shown != self.uri


PARENT = "mlflow.parentRunId"
"""Tag with the id of the run that a run is a part of."""


@dataclass(frozen=True)
class DataSet:
    """Samples that a run reads.

    Args:
        context: what they are read for, ``training`` or ``evaluation``.
        split: of the shards.
        manifest: absolute path or URL of the shards' manifest.
        manifest_sha256: of its bytes, which name every shard by digest.
        samples: how many each task has.
    """

    context: str
    split: str
    manifest: str
    manifest_sha256: str
    samples: Mapping[str, int]


class Tracker:
    """One MLflow run; plain values only, so it travels to a worker and connects there.

    Args:
        uri: tracking URI.
        run_id: the run that is written to.
    """

    def __init__(self, uri: str, run_id: str) -> None:
        self.uri, self.run_id = uri, run_id

    def __reduce__(self) -> tuple[Any, ...]:
        return Tracker, (self.uri, self.run_id)

    @cached_property
    def _client(self) -> Any:
        from mlflow import MlflowClient

        return MlflowClient(self.uri)

    @classmethod
    def start(
        cls, config: TrackingConfig, name: str, parameters: Mapping[str, Any], tags: Mapping[str, str], artifacts: str
    ) -> Tracker:
        """Open a run in the experiment, which is made where it is missing.

        Args:
            config: resolved tracking configuration.
            name: run name.
            parameters: logged flat, keys joined by dots.
            tags: logged as they are.
            artifacts: URL of the folder for artifacts of an experiment that is new in a local store.
        """
        from mlflow import MlflowClient

        client = MlflowClient(config.uri)
        experiment = client.get_experiment_by_name(config.experiment)
        if experiment is None:
            local = config.uri.startswith("sqlite:")
            location = artifacts if local else None
            experiment_id = client.create_experiment(config.experiment, artifact_location=location)
        else:
            experiment_id = experiment.experiment_id
        run = client.create_run(experiment_id, run_name=name, tags=dict(tags))
        tracker = cls(config.uri, run.info.run_id)
        tracker.log_parameters(parameters)
        return tracker

    def log_parameters(self, parameters: Mapping[str, Any]) -> None:
        """Log nested parameters, keys joined by dots, values cut to what MLflow stores."""
        from mlflow.entities import Param

        flat = [Param(key, str(value)[:6000]) for key, value in _flatten(parameters).items()]
        for first in range(0, len(flat), 100):
            self._client.log_batch(self.run_id, params=flat[first : first + 100])

    def log_metrics(self, metrics: Mapping[str, float | None], step: int, time_ms: int | None = None) -> None:
        """Log numbers of one step in one call; those that are None or not finite are left out.

        Args:
            metrics: by name.
            step: of the run.
            time_ms: when they were measured, since 1970; now, where it is not given. The same number of the same step
                and time is stored once, however often it is logged.
        """
        from mlflow.entities import Metric

        now = int(time.time() * 1000) if time_ms is None else time_ms
        rows = [Metric(k, float(v), now, step) for k, v in metrics.items() if v is not None and abs(v) < float("inf")]
        if rows:
            self._client.log_batch(self.run_id, metrics=rows)

    def log_data(self, *data_sets: DataSet) -> None:
        """Log data sets as the run's inputs; one that it has already is not logged again."""
        from mlflow.entities import Dataset, DatasetInput, InputTag

        inputs = []
        for data in data_sets:
            scheme = urlparse(data.manifest).scheme or "local"
            profile = {"samples": sum(data.samples.values()), "tasks": dict(data.samples)}
            profile |= {"manifest_sha256": data.manifest_sha256}
            # MLflow stores 36 characters of a digest.
            digest, source = data.manifest_sha256[:36], json.dumps({"uri": data.manifest})
            dataset = Dataset(data.split, digest, scheme, source, profile=json.dumps(profile))
            inputs.append(DatasetInput(dataset, [InputTag("mlflow.data.context", data.context)]))
        self._client.log_inputs(self.run_id, inputs)

    def log_artifact(self, path: Path) -> None:
        """Store one file with the run."""
        self._client.log_artifact(self.run_id, str(path))

    def set_tags(self, tags: Mapping[str, str]) -> None:
        """Set tags of the run."""
        from mlflow.entities import RunTag

        self._client.log_batch(self.run_id, tags=[RunTag(k, v) for k, v in tags.items()])

    def end(self, status: str = "FINISHED") -> None:
        """Close the run as FINISHED, FAILED or KILLED."""
        self._client.set_terminated(self.run_id, status)

    def end_if_reachable(self, status: str) -> None:
        """Close the run, or leave it open where the server is away: for a job that must end now."""
        before = os.environ.get(_RETRIES)
        os.environ[_RETRIES] = "0"
        with contextlib.suppress(Exception):
            self.end(status)
        del os.environ[_RETRIES]
        if before is not None:
            os.environ[_RETRIES] = before


class History:
    """The history of a training run: a row to a line of a file, and from there to MLflow; used as a context manager.

    Training never waits for MLflow. Rows are sent in order by a thread; while the server is away they stand in the
    file, and ``PATH.sent`` holds the last step that arrived. What is left at the end is sent by :func:`send_history`.

    Args:
        path: the file.
        tracker: the MLflow run; None: the file is all.
        step: rows of later steps are dropped, for a run that goes on from there.
    """

    def __init__(self, path: Path, tracker: Tracker | None, step: int) -> None:
        self.path, self.tracker = path, tracker
        rows = [row for row in read_history(path) if row["step"] <= step]
        write_atomic(path, "".join(json.dumps(row) + "\n" for row in rows))
        self._rows: queue.SimpleQueue[dict[str, Any] | None] = queue.SimpleQueue()
        self._closing = threading.Event()
        self._monitors: list[Any] = []
        self._thread = threading.Thread(target=self._carry, name="History", daemon=True)

    def __enter__(self) -> Self:
        if self.tracker is not None:
            self._thread.start()
        return self

    def append(self, row: Mapping[str, Any]) -> None:
        """Write a row, with the time and the machine's load; it has a ``step``."""
        whole = {**row, "time_ms": int(time.time() * 1000), "system": self._system()}
        with self.path.open("a") as file:
            file.write(json.dumps(whole) + "\n")
        self._rows.put(whole)

    def _carry(self) -> None:
        tracker = self.tracker
        if tracker is None:
            return
        os.environ.setdefault(_RETRIES, "0")  # this thread tries again itself
        from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

        self._monitors = SystemMetricsMonitor(tracker.run_id, tracking_uri=tracker.uri).monitors
        sent = _last_sent(self.path)
        waiting: list[dict[str, Any]] = read_history(self.path)
        while True:
            for row in waiting:  # a run that went on from a checkpoint repeats rows that are there already
                while row["step"] > sent and not _sent(tracker, self.path, row):
                    if self._closing.wait(_RETRY_S):
                        return
                sent = max(sent, row["step"])
            row_or_end = self._rows.get()
            if row_or_end is None:
                return
            waiting = [row_or_end]

    def _system(self) -> dict[str, float]:
        found: dict[str, float] = {}
        for monitor in self._monitors:
            monitor.collect_metrics()
            found |= monitor.aggregate_metrics()
            monitor.clear_metrics()
        return found

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._thread.is_alive():
            self._closing.set()
            self._rows.put(None)
            self._thread.join(_CLOSE_S)


_RETRIES = "MLFLOW_HTTP_REQUEST_MAX_RETRIES"
_RETRY_S = 5.0
_CLOSE_S = 20.0


def read_history(path: Path) -> list[dict[str, Any]]:
    """Return the rows of a history; a last line that was cut off is left out.

    Raises:
        InputError: a line is no row.
    """
    if not path.is_file():
        return []
    with path.open("rb") as file:
        return [_row(path, number, line) for number, line in enumerate(file, 1) if line.endswith(b"\n")]


def _row(path: Path, number: int, line: bytes) -> dict[str, Any]:
    try:
        row = dict(parse_json(line))
        if type(row.get("step")) is not int:
            raise ValueError(f"its step is {row.get('step')!r}")
    except (ValueError, TypeError) as error:
        raise InputError(
            f"a history must hold a JSON object with a whole step a line, line {number} of {path} is none: {error}; "
            "delete the file, it is written anew from the last checkpoint on"
        ) from error
    return row


def send_history(tracker: Tracker, path: Path) -> None:
    """Send the rows that have not reached MLflow; where its server is away, say so and leave them for the next time."""
    sent = _last_sent(path)
    for row in read_history(path):
        if row["step"] > sent and not _sent(tracker, path, row):
            place = masked(tracker.uri)
            say(f"WARNING: MLflow at {place} is away; {path} keeps the rows from step {row['step']} for it")
            return


def _last_sent(path: Path) -> int:
    mark = path.with_name(f"{path.name}.sent")
    return int(mark.read_text()) if mark.is_file() else -1


def _sent(tracker: Tracker, path: Path, row: Mapping[str, Any]) -> bool:
    from mlflow.exceptions import MlflowException

    numbers: dict[str, float | None] = {}
    for key, value in row.items():
        if isinstance(value, Mapping):
            numbers |= {f"{key.removeprefix('task_')}/{name}": each for name, each in value.items()}
        elif isinstance(value, int | float) and key not in ("step", "num_steps", "time_ms"):
            numbers[key] = value
    try:
        tracker.log_metrics(numbers, row["step"], row.get("time_ms"))
    except (MlflowException, OSError):
        return False
    write_atomic(path.with_name(f"{path.name}.sent"), str(row["step"]))
    return True


def _flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            flat.update(_flatten(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def git_commit() -> str:
    """Return the commit of the code that runs, ``unknown`` outside a repository."""
    folder = Path(__file__).parent
    try:
        found = subprocess.run(["git", "rev-parse", "HEAD"], cwd=folder, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return "unknown"
    return found.stdout.strip() if found.returncode == 0 else "unknown"
